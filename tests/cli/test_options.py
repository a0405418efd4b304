"""Laws of all options of all commands: help, values that are checked, and outputs that are checked before any work."""

from __future__ import annotations

import argparse
import ast
import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvfusion_rag.adapting.options import AdaptOptions
from kvfusion_rag.cli import COMMANDS, main
from kvfusion_rag.cli.arguments import paths
from kvfusion_rag.cli.arguments.fields import attribute_docs
from kvfusion_rag.cli.parser import add_common, build_parser, parse
from kvfusion_rag.errors import ModelLoadError
from kvfusion_rag.training.config import TrainingConfig

PACKAGE = Path(__file__).parent.parent.parent / "kvfusion_rag"
CLASSES = {
    node.name
    for file in PACKAGE.rglob("*.py")
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
    if isinstance(node, ast.ClassDef) and len(re.findall("[A-Z][a-z]", node.name)) > 1
}
FOLDERS = (paths.output_folder, paths.existing_folder, paths.store_place, paths.index_place)
OUTPUTS = (paths.output_file, paths.plot_file, *FOLDERS)


def parsers() -> Iterator[tuple[list[str], argparse.ArgumentParser]]:
    """Yield every command, and every action or subject of one, with its parser."""
    for name, module in COMMANDS.items():
        parser = argparse.ArgumentParser()
        module.add_arguments(parser)
        inner = [a for a in parser._actions if isinstance(a, argparse._SubParsersAction)]
        if not inner:
            yield [name], parser
        for choice, subparser in inner[0].choices.items() if inner else ():
            yield [name, choice], subparser


def common() -> argparse.ArgumentParser:
    """Return a parser of the options that every command has."""
    parser = argparse.ArgumentParser()
    add_common(parser)
    return parser


PARSERS = [*parsers(), (["doctor"], common())]
OPTIONS = [
    pytest.param(command, action, id="-".join([*command, action.dest]))
    for command, parser in PARSERS
    for action in parser._actions
    if action.dest != "help"
]


# Help


@pytest.mark.parametrize(("command", "action"), OPTIONS)
def test_help_explains_each_option_in_words(command, action):
    assert action.help and len(re.findall(r"[A-Za-z]{2,}", action.help)) >= 3
    assert "`" not in action.help and not CLASSES & set(re.findall(r"\w+", action.help))
    if action.option_strings and action.nargs != 0 and not action.required:
        assert "default: " in action.help, "what happens without it"
    if action.option_strings and action.nargs != 0:
        assert action.choices or action.metavar, "a placeholder of its own"


@pytest.mark.parametrize(("command", "action"), OPTIONS)
def test_help_names_the_default_that_is_used(command, action):
    if isinstance(action.default, int | float | str) and action.default not in (
        False,
        "",
        "shipped",
        argparse.SUPPRESS,
    ):
        words = {"generate,cold,memory,disk": "all four", "0.0": "0", "1.0": "1"}
        assert f"default: {words.get(str(action.default), action.default)}" in action.help


@pytest.mark.parametrize(
    "command", [[], *([name] for name in COMMANDS), *(c for c, _ in PARSERS if len(c) > 1)], ids=" ".join
)
def test_help_is_plain_text(capsys, command):
    assert main([*command, "--help"]) == 0
    out = capsys.readouterr().out
    assert "`" not in out and "None" not in out and len(out.splitlines()) > 5


@pytest.mark.parametrize("kind", [TrainingConfig, AdaptOptions])
def test_every_field_of_a_configuration_is_explained(kind):
    assert attribute_docs(kind).keys() == kind.__dataclass_fields__.keys()


# Values


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with files that the commands can read. No model can be loaded."""

    def refuse(*args: object, **options: object) -> None:
        raise ModelLoadError("a model would be loaded now")

    monkeypatch.chdir(tmp_path)
    for place in ("model.location.locate_model", "cli.options.load_encoder", "training.run.locate_model",
                  "adapting.run.locate_model", "retrieval.embedding._load", "benchmark.store_speed.random_backbone",
                  "benchmark.speed.random_backbone", "serving.bind"):  # fmt: skip
        monkeypatch.setattr(f"kvfusion_rag.{place}", refuse)
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs/a.txt").write_text("The river runs past an old mill.")
    (tmp_path / "store").mkdir()
    (tmp_path / "store/format.json").write_text('{"version": 1}')
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "binary").write_bytes(bytes(range(256)))
    (tmp_path / "nested.json").write_text("[" * 100_000)
    row = {"id": "1", "question": "q?", "answers": ["mill"], "passages": [{"text": "an old mill", "gold": True}]}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    return tmp_path


NEEDED = {  # arguments with which a command comes to its model
    "ask": ["who?", "--docs", "docs"],
    "chat": ["--docs", "docs"],
    "answer": ["rows.jsonl", "--docs", "docs"],
    "index": ["docs"],
    "store stats": ["store"],
    "store verify": ["store"],
    "store missing": ["store"],
    "store clear": ["store"],
    "store forget": ["store", "docs"],
    "store estimate": ["docs"],
    "serve": [],
    "bench answer": ["--shape", "tiny"],
    "bench store": ["--shape", "tiny"],
    "bench engines": [],
    "doctor": ["model"],
    "build-data": ["rows.jsonl", "--out", "out.jsonl"],
    "train": ["rows.jsonl", "--output", "out"],
    "adapt": ["--docs", "docs", "--output", "adapted"],
    "evaluate": ["rows.jsonl"],
    "config": [],
    "completion": ["bash"],
    "calibrate": ["rows.jsonl"],
}
HOSTILE = ["", " ", "~nosuchuser/x", "a" * 300, "loop", "loop/x", "docs", "binary", "nested.json", "binary/x", "-1",
           "9" * 31, "9" * 5000, "nan", "inf", "1e400", "\udcff", "cuda:99", "none/x", "{}"]  # fmt: skip


def with_value(command: list[str], action: argparse.Action, value: str) -> list[str]:
    """Return the command line on which an argument has this value."""
    needed = NEEDED[" ".join(command)]
    if action.option_strings:
        return [*command, *needed, f"{action.option_strings[0]}={value}"]
    return [*command, value, *needed[1:]] if not value.startswith("-") else [*command, *needed[1:], "--", value]


def is_accepted(action: argparse.Action, value: str) -> bool:
    """Return whether the parser accepts ``value``. Only argparse's own error may reject it."""
    if action.choices is not None:
        return value in action.choices
    assert action.type is not None, "every value is checked while the command line is read"
    try:
        action.type(value)
    except argparse.ArgumentTypeError as error:
        assert len(str(error)) < 1000 and "\n" not in str(error)
        return False
    return True


@pytest.mark.parametrize(("command", "action"), [one for one in OPTIONS if one.values[1].nargs != 0])
def test_no_value_of_an_option_ends_in_a_traceback(folder, capsys, command, action):
    accepted = [value for value in HOSTILE if is_accepted(action, value)]
    for value in accepted[:2]:  # the slow test of random command lines tries others
        argv = with_value(command, action, value)
        assert main(argv) in (0, 1, 2), argv
        assert "Traceback" not in capsys.readouterr().err, argv


@pytest.mark.parametrize("value", HOSTILE)
def test_value_that_is_not_accepted_is_one_line(folder, capsys, value):
    for argv in (
        ["ask", "who?", "--docs", "docs", f"--chunk-tokens={value}"],
        ["index", "docs", f"--embedding-model={value}"],
    ):
        assert main(argv) == 2
        out, err = capsys.readouterr()
        assert out == "" and err.count("\n") == 1 and len(err) < 1000


UNUSABLE = ["docs/a.txt/x", "loop", "loop/x", "~nosuchuser/x", "a" * 300, ""]


@pytest.mark.parametrize(
    ("command", "action"), [one for one in OPTIONS if one.values[1].type in OUTPUTS and one.values[1].option_strings]
)
def test_unusable_output_is_an_error_before_any_work(folder, capsys, command, action):
    is_folder = action.type in FOLDERS
    before = sorted(folder.rglob("*"))
    unusable = [*UNUSABLE, "docs/a.txt" if is_folder else "docs", *([] if is_folder else ["absent/x"])]
    assert not [value for value in unusable if is_accepted(action, value)]
    assert main(with_value(command, action, unusable[0])) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith(f"kvfusion: error: argument {action.option_strings[0]}: ")
    assert sorted(folder.rglob("*")) == before


def test_every_option_that_writes_is_checked():
    writing = {"output", "out", "plot", "markdown", "predictions", "resume", "index", "store", "folder"}
    for command, parser in PARSERS:
        for action in parser._actions:
            if action.dest in writing and action.nargs != 0:
                assert action.type in OUTPUTS, (command, action.dest)


@pytest.mark.parametrize("command", ["train", "evaluate"])
def test_plot_of_another_kind_is_an_error_before_any_work(folder, capsys, command):
    assert main([command, *NEEDED[command], "--plot", "a.bmp"]) == 2
    assert "must end in one of .png, .svg, .pdf" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["build-data", "rows.jsonl", "--out", "rows.jsonl", "--force"], "is also an input"),
        (["build-data", "rows.jsonl", "--out", "docs.jsonl", "--corpus", "docs.jsonl"], "'docs.jsonl' does not exist"),
        (["evaluate", "rows.jsonl", "--output", "rows.jsonl", "--force"], "is also an input"),
        (["evaluate", "rows.jsonl", "--output", "binary"], "already exists; name another file or replace it with"),
        (["train", "rows.jsonl", "--output", "out", "--plot", "rows.png"], "is also an input"),
        (["serve", "--api-keys-file", "nested.json"], "cannot be read"),
        (["serve", "--api-keys-file", "docs"], "is a folder"),
        (["ask", "who?", "--docs", "docs", "--device", "cuda:99"], "argument --device: device is 'cuda:99'"),
        (["train", "rows.jsonl", "--output", "out", "--learning-rate", "0"], "learning_rate is 0.0"),
        (["adapt", "--docs", "docs", "--output", "out", "--min-f1", "2"], "min_f1 is 2.0"),
    ],
)
def test_arguments_that_do_not_fit_together_are_errors_before_any_work(folder, capsys, argv, message):
    (folder / "rows.png").symlink_to(folder / "rows.jsonl")
    assert main(argv) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("command", NEEDED)
def test_options_that_are_not_given_have_their_defaults(folder, command):
    name, *rest = command.split()
    plain = argparse.ArgumentParser()
    COMMANDS[name].add_arguments(plain)
    expected = vars(plain.parse_args([*rest, *NEEDED[command]]))
    found = vars(parse(build_parser(COMMANDS), [name, *rest, *NEEDED[command]]))
    assert {option: found[option] for option in expected} == expected


def test_usable_arguments_come_to_the_model(folder, capsys):
    """The laws above are about commands that would otherwise load a model."""
    reached = set()
    for command, needed in NEEDED.items():
        main([*command.split(), *needed])
        if "a model would be loaded now" in capsys.readouterr().err:
            reached.add(command)
    assert reached == NEEDED.keys() - {
        "store stats", "store verify", "store missing", "store clear", "build-data",
        "config", "completion",
        "calibrate",  # one row is too few, which is checked before the model is loaded
    }  # fmt: skip
