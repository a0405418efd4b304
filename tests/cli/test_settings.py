"""Defaults from ``kvfusion.toml`` and environment variables: their order, their checks, and ``kvfusion config``."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from commands import run
from hypothesis import given
from hypothesis import strategies as st

from kvfusion_rag import InvalidInputError
from kvfusion_rag.cli import COMMANDS, main, serve
from kvfusion_rag.cli.parser import build_parser, parse
from kvfusion_rag.cli.settings.files import read_file
from kvfusion_rag.cli.settings.settings import variable_of

LEAVES = [leaf for leaf in build_parser(COMMANDS).leaves() if leaf.options]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current folder, and no settings of this machine."""
    monkeypatch.chdir(tmp_path)
    for name in [name for name in os.environ if name.startswith("KVFUSION_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "user"))
    monkeypatch.setattr(
        "kvfusion_rag.cli.settings.files.user_config_path", lambda name, appauthor: tmp_path / "user" / name
    )
    (tmp_path / "user" / "kvfusion-rag").mkdir(parents=True)
    monkeypatch.setattr(serve, "run", lambda args: 0)  # if a mistake is not found, nothing is served
    return tmp_path


def arguments(*argv: str):
    return parse(build_parser(COMMANDS), list(argv))


def write(text: str, name: str = "kvfusion.toml") -> None:
    Path(name).write_text(text, encoding="utf-8")


# One order of precedence


LEVELS = ["default", "user's [global]", "user's [serve]", "[global]", "[serve]", "variable", "command line"]


@pytest.mark.parametrize("highest", range(len(LEVELS)), ids=LEVELS)
def test_higher_level_decides(monkeypatch, highest):
    """Each level sets another port. All levels up to the highest are present."""
    ports = [8000, 1, 2, 3, 4, 5, 6][: highest + 1]
    sections = {
        number: f"[{'global' if number % 2 else 'serve'}]\nport = {number}\n" for number in ports if number < 5
    }
    write("".join(sections.get(number, "") for number in (1, 2)), "user/kvfusion-rag/kvfusion.toml")
    write("".join(sections.get(number, "") for number in (3, 4)))
    if 5 in ports:
        monkeypatch.setenv("KVFUSION_PORT", "5")
    assert arguments("serve", *(["--port", "6"] if 6 in ports else [])).port == ports[-1]


def test_action_goes_before_its_command_and_that_before_all_commands():
    write("[global]\nnamespace = 'a'\n[store]\nnamespace = 'b'\n[store.clear]\nnamespace = 'c'\n")
    assert arguments("store", "clear", "kv").namespace == "c"
    assert arguments("store", "missing", "kv").namespace == "b"
    assert arguments("serve").namespace == "a"


def test_chosen_file_replaces_the_others(monkeypatch):
    write("[serve]\nport = 1\n")
    write("[serve]\nhost = 'localhost'\n", "other.toml")
    assert arguments("serve", "--config", "other.toml").port == 8000
    assert arguments("serve", "--config", "none").port == 8000
    monkeypatch.setenv("KVFUSION_CONFIG", "other.toml")
    assert (arguments("serve").host, arguments("serve").port) == ("localhost", 8000)
    assert arguments("serve", "--config", "none").host == "127.0.0.1"


def test_list_of_the_command_line_replaces_that_of_a_file():
    write("[global]\nstop = ['a', 'b']\n")
    assert arguments("ask", "who?").stop == ["a", "b"]
    assert arguments("ask", "who?", "--stop", "c").stop == ["c"]


def test_flag_of_a_file_can_be_switched_off(monkeypatch):
    write("[serve]\nmetrics = true\n")
    assert arguments("serve").metrics and not arguments("serve", "--no-metrics").metrics
    monkeypatch.setenv("KVFUSION_METRICS", "off")
    assert not arguments("serve").metrics and arguments("serve", "--metrics").metrics


def test_required_option_may_be_set_by_a_file(folder):
    (folder / "docs").mkdir()
    write("[adapt]\ndocs = ['docs']\noutput = 'out'\n")
    args = arguments("adapt")
    assert (args.docs, args.output) == (["docs"], Path("out"))


def test_empty_variable_sets_nothing(monkeypatch):
    monkeypatch.setenv("KVFUSION_MODEL", "")
    assert arguments("serve").model is None


@pytest.mark.parametrize(
    ("text", "values"), [("docs", ["docs"]), ('["docs", "a.txt"]', ["docs", "a.txt"]), ('["docs"]', ["docs"])]
)
def test_variable_has_one_value_or_a_list_in_json(folder, monkeypatch, text, values):
    (folder / "docs").mkdir()
    write("x", "a.txt")
    monkeypatch.setenv("KVFUSION_DOCS", text)
    assert arguments("serve").docs == values


@pytest.mark.parametrize(("value", "read"), [(-1, -1), (0, 0), (2, 2)])
def test_verbosity_is_a_setting(monkeypatch, value, read):
    write(f"[global]\nverbosity = {value}\n")
    assert arguments("doctor").verbosity == read and arguments("doctor", "-v").verbosity == 1


@pytest.mark.parametrize("leaf", LEAVES, ids=lambda leaf: "-".join(leaf.command))
def test_names_in_files_are_those_of_the_command_line(leaf):
    for option in leaf.options.values():
        assert f"--{option.name}" in option.action.option_strings or option.name == "verbosity"
        assert option.action.type or option.action.nargs == 0 or option.action.choices


# Checks


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[serve]\nprot = 1", "kvfusion.toml: 'prot' in [serve] is not an option of kvfusion serve; did you mean 'po"),
        ("[ask]\ntop_k = 1", "'top_k' in [ask] is not an option of kvfusion ask; did you mean 'top-k'?"),
        ("[global]\nthread = 2", "'thread' in [global] is not an option of any command; did you mean 'threads'?"),
        ("[store.clear]\nal = true", "'al' in [store.clear] is not an option of kvfusion store clear; did you"),
        ("[store.clean]\nall = true", "'clean' in [store] is not an option of kvfusion store"),
        ("[serv]\nport = 1", "there is no command for the section [serv]; did you mean 'serve'?"),
        ("port = 1", "'port' is in no section; write it below [global] or a command."),
        ("[global]\nconfig = 'x'", "'config' in [global] is not an option"),
        ("[serve]\nport = '9000'", "[serve] port: '9000' is not a number; remove the quotation marks."),
        ("[serve]\nport = 70000", "kvfusion.toml [serve] port: '70000' is not a whole number from 0 to 65,535."),
        ("[serve]\nport = 1.5", "'1.5' is not a whole number from 0 to 65,535."),
        ("[serve]\nport = true", "'true' is not a whole number from 0 to 65,535."),
        ("[serve]\nport = [1]", "'[1]' is not a single value."),
        ("[serve]\nmodel = 5", "5 is not a text in quotation marks."),
        ('[serve]\nstore = "a\\u0000b"', "'a\\x00b' contains a null character."),
        ('[serve]\ndocs = ["a\\u0000b"]', "'a\\x00b' contains a null character."),
        ("[serve]\nmodel = 2026-12-01", "is not a text in quotation marks."),
        ("[serve]\nmetrics = 'yes'", "'yes' is not true or false."),
        ("[serve]\nmode = 'fuse'", "'fuse' is not one of auto, fusion, concat, ape; did you mean 'fusion'."),
        ("[serve]\ndocs = 'docs'", "'docs' is not a list of values, such as [...]."),
        ("[serve]\nserved-model-name = ['a', 1]", "1 is not a text in quotation marks."),
        ("[serve]\nport = ", "the configuration 'kvfusion.toml' is not a TOML file: Invalid value (at "),
        ("a = " + "[" * 5000, "the configuration 'kvfusion.toml' is not a TOML file: "),
    ],
)  # fmt: skip
def test_mistake_in_a_file_is_one_line_before_any_work(capsys, text, message):
    write(text)
    code, out, err = run(capsys, "serve")
    assert (code, out) == (2, "") and err.count("\n") == 1
    assert message in err


def test_mistakes_in_names_are_found_by_every_command(capsys):
    write("[serve]\nprot = 1")
    assert "did you mean 'port'?" in run(capsys, "doctor")[2]


@pytest.mark.parametrize(
    ("variable", "text", "message"),
    [
        ("KVFUSION_PROT", "1", "the environment variable KVFUSION_PROT sets no option; did you mean KVFUSION_PORT?"),
        ("KVFUSION_PORT", "many", "KVFUSION_PORT: 'many' is not a whole number from 0 to 65,535."),
        ("KVFUSION_METRICS", "2", "KVFUSION_METRICS: '2' is not one of true, 1, yes, on, false, 0, no, off."),
        ("KVFUSION_MODE", "fuse", "KVFUSION_MODE: 'fuse' is not one of auto, fusion, concat, ape"),
        ("KVFUSION_DOCS", "[1]", "KVFUSION_DOCS: '[1]' is not a list of texts in JSON"),
        ("KVFUSION_DOCS", "[" * 9000, "is not a list of texts in JSON"),
        ("KVFUSION_CONFIG", "none.toml", "KVFUSION_CONFIG: 'none.toml' does not exist."),
    ],
)
def test_mistake_in_a_variable_is_one_line_before_any_work(capsys, monkeypatch, variable, text, message):
    monkeypatch.setenv(variable, text)
    code, out, err = run(capsys, "serve")
    assert (code, out) == (2, "") and err.count("\n") == 1
    assert message in err


def test_variables_of_other_programs_are_ignored(monkeypatch):
    monkeypatch.setenv("KVFUSION_SERVICE_HOST", "10.0.0.1")  # Kubernetes sets it for a service named kvfusion
    monkeypatch.setenv("KVFUSION_BACKUP_FOLDER", "/backup")
    monkeypatch.setenv("KVFUSION_API_KEY", "sk-secret")  # what --api-key-env may name
    assert arguments("serve").host == "127.0.0.1"


@pytest.mark.parametrize("text", ["[serve]\napi-key = 'sk-secret'", "[global]\ntoken = 'sk-secret'",
                                  "[serve]\napi-key-env = 'sk-secret'", "api-key = 'sk-secret'",
                                  "[serve]\nindex = 'chroma://me:sk-secret@db'"])  # fmt: skip
def test_secrets_are_in_no_message(capsys, text):
    write(text)
    code, out, err = run(capsys, "serve")
    assert code == 2 and "sk-secret" not in out + err


@given(data=st.binary(max_size=60) | st.text("[]{}=.\"'#\n abglo", max_size=60).map(str.encode))
def test_any_bytes_are_settings_or_an_error(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "random.toml"
    path.write_bytes(data)
    known = {(): {"a"}, ("ab",): {"a"}, ("ab", "b"): {"a"}}
    try:
        assert read_file(path, known).sections.keys() <= known.keys()
    except InvalidInputError as error:
        assert str(path) in str(error)


def test_large_file_is_rejected(tmp_path):
    (tmp_path / "large.toml").write_text("#" * (1 << 21))
    with pytest.raises(InvalidInputError, match="more than 1,048,576 bytes"):
        read_file(tmp_path / "large.toml", {(): set()})


# kvfusion config


def test_config_shows_values_and_what_set_them(capsys, monkeypatch):
    write("[global]\nstore = 's3://key:secret@bucket/kv'\nthreads = 3\n[serve]\nport = 9000\n")
    monkeypatch.setenv("KVFUSION_TOP_K", "7")
    code, out, err = run(capsys, "config", "--json", "serve", "--host", "::1")
    assert (code, err) == (0, "") and "secret" not in out
    options = json.loads(out)["options"]
    shown = {name: (one["value"], one["origin"]) for name, one in options.items()}
    assert shown.keys() == {option.name for option in LEAVES_OF["serve"].options.values()}
    assert shown["host"] == ("::1", "command line")
    assert shown["top-k"] == (7, "KVFUSION_TOP_K")
    assert shown["port"] == (9000, "kvfusion.toml [serve]")
    assert shown["store"] == ("s3://***@bucket/kv", "kvfusion.toml [global]")
    assert shown["timeout"] == (600, "default")
    text = run(capsys, "config", "serve")[1]
    assert "9000  (kvfusion.toml [serve])" in text and "secret" not in text and text.count("\n") == len(shown) + 1


LEAVES_OF = {" ".join(leaf.command): leaf for leaf in LEAVES}


def test_config_needs_no_other_arguments(capsys):
    code, out, _ = run(capsys, "config", "adapt")
    assert code == 0 and "-  (required)" in out


def test_config_lists_all_settings(capsys, monkeypatch):
    assert run(capsys, "config") == (0, "no file or variable sets an option\n", "")
    write("[global]\nthreads = 3\n")
    monkeypatch.setenv("KVFUSION_PORT", "9000")
    assert run(capsys, "config")[1] == 'KVFUSION_PORT: "9000"\nkvfusion.toml [global] threads: 3\n'


def test_help_needs_no_valid_settings(capsys):
    write("[serve]\nprot = 1")
    assert main(["serve", "--help"]) == 0


@pytest.mark.parametrize("leaf", LEAVES, ids=lambda leaf: "-".join(leaf.command))
def test_every_variable_belongs_to_one_option(leaf):
    variables = [variable_of(option.name) for option in leaf.options.values()]
    assert len(set(variables)) == len(variables)
