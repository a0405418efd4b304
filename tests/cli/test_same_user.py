"""``kvfusion ask`` with a running server of the same user: the same answer, and never a question for anybody else."""

from __future__ import annotations

import json
import os
import re
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import tiny
from commands import run
from indexes import WordEmbedder

from kvfusion_rag import KVFusionGenerator
from kvfusion_rag.cli import COMMANDS, ask, serve
from kvfusion_rag.cli.arguments.library import open_library
from kvfusion_rag.cli.options import index_folder
from kvfusion_rag.cli.parser import build_parser, parse
from kvfusion_rag.cli.same_user.listening import private_listener
from kvfusion_rag.cli.same_user.place import socket_place
from kvfusion_rag.home import home
from kvfusion_rag.serving import Access, ServingOptions

QUESTION = "Where is the office?"
KEY = "key-of-the-first-tenant"
LINE = "answered by the running server over these documents (--no-server loads the model here)"


def speaker() -> KVFusionGenerator:
    return tiny.speaker("in lima", mode="fusion")


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The models that commands loaded."""
    loaded: list[str] = []

    def load(args: Any) -> KVFusionGenerator:
        loaded.append(str(args.model))
        return speaker()

    monkeypatch.setattr(ask, "load_generator", load)
    monkeypatch.setattr("kvfusion_rag.retrieval.SentenceTransformerEmbedder", lambda name, device: WordEmbedder())
    return loaded


@contextmanager
def serving(docs: Path, *argv: object, access: Access | None = None) -> Iterator[Path]:
    """Serve ``docs`` as the command does, and yield the socket for ``ask``."""
    args = parse(build_parser(COMMANDS), ["serve", "--docs", str(docs), "--json", *map(str, argv)])
    generator = speaker()
    with (
        open_library(args, generator) as library,
        serve._for_ask(args, generator, library, access or Access(), ServingOptions(mode="concat", focus=1)),
    ):
        yield socket_place(args, index_folder(args))


def without_times(text: str) -> list[str]:
    """Return the lines, without the times and how many tokens came from the store."""
    return [re.sub(r", \d+ from the store.*", "", line) for line in text.splitlines()]


# The same answer


@pytest.mark.parametrize(
    "options",
    [
        (),
        ("--stream",),
        ("--top-k", 1),
        ("--mode", "concat"),
        ("--focus", 1),
        ("--max-new-tokens", 1),
        ("--stop", "l"),
    ],
)
def test_server_prints_what_a_local_run_prints_without_loading_a_model(capsys, loads, docs, options):
    asked = ["ask", QUESTION, "--docs", docs, *options]
    with serving(docs):
        code, out, _ = run(capsys, *asked)
        assert (code, loads) == (0, [])
        here = run(capsys, *asked, "--no-server")[1]
    assert loads == ["None"]
    lines = without_times(out)
    lines.remove(LINE)
    assert lines == without_times(here)


def test_json_of_a_server_is_that_of_a_local_run_except_for_times_and_origins(capsys, loads, docs):
    asked = ["ask", QUESTION, "--docs", docs, "--json"]
    with serving(docs):
        found, here = (json.loads(run(capsys, *asked, *more)[1]) for more in ((), ("--no-server",)))
    assert (found.pop("by_server"), here.pop("by_server")) == (True, False)
    for data in (found, here):
        del data["timings"], data["usage"]["cached_document_tokens"]
        for source in data["sources"]:
            del source["origin"], source["miss"]
    assert found.pop("update")["skipped"] == here.pop("update")["skipped"]
    assert found == here and found["answer"] == "In Lima"


def test_server_reads_files_that_changed_since_it_began(capsys, loads, docs):
    with serving(docs):
        (docs / "peru.md").write_text("The office is on the moon.")
        (docs / "new.md").write_text("Where is the office? In Lima, as before.")
        (docs / "rice.txt").unlink()
        found = json.loads(run(capsys, "ask", QUESTION, "--docs", docs, "--json")[1])
    assert not loads and found["by_server"]
    assert sorted(source["id"] for source in found["sources"]) == ["new.md#1", "peru.md#1"]
    assert found["citations"][0]["document_id"] == "new.md#1"


def test_server_that_holds_the_index_answers_for_it(capsys, loads, docs):
    assert run(capsys, "index", docs, "--chunk-tokens", 40, "--json")[0] == 0
    with serving(docs, "--chunk-tokens", 40):
        (docs / "new.txt").write_text("Bread is baked.")
        code, out, _ = run(capsys, "ask", QUESTION, "--docs", docs, "--chunk-tokens", 40)
    assert (code, loads) == (0, []) and LINE in out
    assert out.startswith(f"updated the index {docs / '.kvfusion'}: 1 added, 0 changed, 0 removed\n\nIn Lima\n")


@pytest.mark.parametrize("stream", [(), ("--stream",)])
def test_error_is_that_of_a_local_run(capsys, loads, docs, stream):
    asked = ["ask", "word " * 3000, "--docs", docs, *stream]
    with serving(docs):
        found, here = (run(capsys, *asked, *more) for more in ((), ("--no-server",)))
    assert loads == ["None"] and found == here and found[0] == 2 and found[2].count("\n") == 1


# Other settings


@pytest.mark.parametrize(
    "options",
    [
        ("--no-server",),
        ("--shuffle-check", 1),
        ("--attribute",),
        ("--show-prompt",),
        ("--model", "other"),
        ("--adapter", "none"),
        ("--decoder", "other"),
        ("--dtype", "float32"),
        ("--device", "cpu"),
        ("--engine", "auto"),
        ("--chunk-tokens", 30),
        ("--embedding-model", "other"),
        ("--namespace", "a"),
        ("--store", "kv"),
        ("--index", "index"),
        ("--max-reasoning-tokens", 3),
    ],
)
def test_other_settings_are_answered_by_a_local_run(capsys, loads, docs, options, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with serving(docs):
        code, out, _ = run(capsys, "ask", QUESTION, "--docs", docs, *options)
    assert code == 0 and len(loads) == 1 and LINE not in out


def test_other_documents_are_answered_by_a_local_run(capsys, loads, docs):
    with serving(docs):
        run(capsys, "ask", QUESTION, "--docs", docs / "peru.md")
        assert len(loads) == 1
        run(capsys, "ask", QUESTION, "--docs", docs / ".." / docs.name)
        assert len(loads) == 1, "the same folder by another name"


def test_model_that_was_trained_again_is_another_model(docs, tmp_path):
    model = tiny.save(tmp_path / "model")

    def place() -> Path:
        argv = ["ask", QUESTION, "--docs", str(docs), "--model", str(model)]
        return socket_place(parse(build_parser(COMMANDS), argv), None)

    first = place()
    assert place() == first
    os.utime(model / "model.safetensors", (1, 1))
    assert place() != first


@pytest.mark.parametrize("name", ["a\0b", "a" * 300, "org/model", ""])
def test_name_that_is_no_path_is_taken_as_it_is(docs, name):
    args = parse(build_parser(COMMANDS), ["ask", QUESTION, "--docs", str(docs)])
    places = set()
    for args.model in (name, f"{name}x"):
        places.add(socket_place(args, None))
    assert len(places) == 2


# Who is asked


def stale(place: Path) -> None:
    """Leave the socket of a server that was killed."""
    place.unlink(missing_ok=True)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(place))
    place.chmod(0o600)


@pytest.mark.parametrize(
    "change",
    [
        lambda place: place.chmod(0o660),
        lambda place: place.parent.chmod(0o755),
        lambda place: (place.rename(place.with_name("real")), place.symlink_to("real")),
        lambda place: (place.unlink(), place.write_text("http://localhost:1")),
    ],
    ids=["mode", "folder", "link", "file"],
)
def test_socket_that_others_could_have_made_is_ignored(capsys, loads, docs, change):
    with serving(docs) as place:
        change(place)
        code, out, _ = run(capsys, "ask", QUESTION, "--docs", docs)
        place.parent.chmod(0o700)
    place.with_name("real").unlink(missing_ok=True)
    assert code == 0 and len(loads) == 1 and LINE not in out


def test_server_of_another_user_is_ignored(capsys, loads, docs, monkeypatch):
    with serving(docs):
        other = os.geteuid() + 1
        monkeypatch.setattr(os, "geteuid", lambda: other)
        out = run(capsys, "ask", QUESTION, "--docs", docs)[1]
    assert len(loads) == 1 and LINE not in out


def test_server_that_was_killed_is_ignored_and_replaced(capsys, loads, docs):
    with serving(docs) as place:
        pass
    assert not place.exists()
    stale(place)
    assert LINE not in run(capsys, "ask", QUESTION, "--docs", docs)[1] and len(loads) == 1
    with serving(docs):
        assert LINE in run(capsys, "ask", QUESTION, "--docs", docs)[1] and len(loads) == 1


def test_socket_is_private_and_the_first_server_keeps_it(capsys, loads, docs):
    with serving(docs) as place:
        assert place.parent == home() / "servers"
        assert (place.stat().st_mode & 0o777, place.parent.stat().st_mode & 0o777) == (0o600, 0o700)
        with serving(docs):
            pass
        assert LINE in run(capsys, "ask", QUESTION, "--docs", docs)[1]
    assert not place.exists()


def test_folder_of_others_gets_no_socket(tmp_path):
    (tmp_path / "open").mkdir(mode=0o755)
    with private_listener(tmp_path / "open" / "x.sock") as listener:
        assert listener is None
    assert not list((tmp_path / "open").iterdir())


def test_path_that_is_too_long_for_a_socket_is_no_error(tmp_path):
    with private_listener(tmp_path / ("x" * 120) / "x.sock") as listener:
        assert listener is None


def test_server_with_keys_needs_one_of_them(capsys, loads, docs, monkeypatch):
    monkeypatch.setenv("RAG_KEY", KEY)
    monkeypatch.setenv("OTHER_KEY", "another-key-of-another-server")
    asked = ["ask", QUESTION, "--docs", docs]
    with serving(docs, access=Access({KEY: "a"})):
        for more in ((), ("--api-key-env", "OTHER_KEY")):
            code, out, err = run(capsys, *asked, *more)
            assert code == 0 and LINE not in out and "the API key is missing or wrong" in err
        assert len(loads) == 2
        assert LINE in run(capsys, *asked, "--api-key-env", "RAG_KEY")[1] and len(loads) == 2
    code, _, err = run(capsys, *asked, "--api-key-env", "NO_SUCH_VARIABLE")
    assert code == 2 and "'NO_SUCH_VARIABLE' is not set" in err


def test_server_without_files_of_its_own_has_no_socket(loads, tmp_path):
    args = parse(build_parser(COMMANDS), ["serve", "--uploads", str(tmp_path / "kept"), "--json"])
    generator = speaker()
    with (
        open_library(args, generator) as library,
        serve._for_ask(args, generator, library, Access(), ServingOptions()),
    ):
        assert not socket_place(args, None).exists()
