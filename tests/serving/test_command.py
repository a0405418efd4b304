"""``kvfusion serve``: errors before a model is loaded, and a complete run as a process."""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path

import httpx
import pytest
import tiny
from indexes import WordEmbedder
from serving_client import request
from starlette.testclient import TestClient

from kvfusion_rag import InvalidInputError, KVFusionGenerator
from kvfusion_rag.cli import COMMANDS, main
from kvfusion_rag.cli import serve as serve_command
from kvfusion_rag.cli.arguments.library import open_library
from kvfusion_rag.cli.options import open_chosen_store
from kvfusion_rag.cli.parser import build_parser, parse
from kvfusion_rag.retrieval import watch_folder
from kvfusion_rag.serving import ServingOptions, create_app
from kvfusion_rag.serving.library import Library
from kvfusion_rag.store import as_store

ROOT = Path(__file__).parent.parent.parent
KEY = "key-of-the-first-tenant"
KEEPER = {"text": "The last keeper, Thomas Grant, moved to the mainland.", "id": "keeper"}


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--host", "0.0.0.0"], "no API key"),
        (["--api-key-env", "KVFUSION_NO_SUCH_VARIABLE"], "is not set"),
        (["--api-keys-file", "/no/such/file"], "'/no/such/file' does not exist"),
        (["--port", "70000"], "'70000' is not a whole number from 0 to 65,535"),
        (["--port", "-1"], "not a whole number"),
        (["--max-concurrency", "0"], "not a whole number from 1"),
        (["--mode", "sideways"], "invalid choice"),
        (["--focus", "some"], "not a number of documents from 1, auto or none"),
        (["--store-codec", "v8"], "without --store"),
        (["--namespace", "../up", "--port", "0"], "namespace is"),
        (["--allowed-origin", "*"], "the allowed origin is '*'"),
        (["--allowed-host", "rag.internal:8000"], "the allowed host is 'rag.internal:8000'"),
        (["--trusted-proxy", "*"], "'*' is not an IP address"),
        (["--tenant-concurrency", "0"], "not a whole number from 1"),
        (["--store-namespace-bytes", "much"], "is not a size"),
        (["--docs", "/no/such/folder"], "'/no/such/folder' does not exist"),
        (["--questions", __file__], "--questions is given without --docs"),
        (["--watch", "--index", "kept"], "--watch is given without --docs"),
        (["--uploads", "kept", "--max-uploads", "0"], "--max-uploads 0, which allows no files"),
        (["--max-uploads", "-1"], "not a whole number from 0"),
        (["--served-model-name", " "], "is blank"),
    ],
)
def test_invalid_options_are_reported_in_one_line_before_loading(capsys, argv, message):
    assert main(["serve", *argv]) == 2
    out, err = capsys.readouterr()
    assert out == "" and message in err and err.count("\n") == 1


def test_short_key_is_rejected_and_not_printed(capsys, monkeypatch):
    monkeypatch.setenv("RAG_KEY", "hunter2")
    assert main(["serve", "--api-key-env", "RAG_KEY"]) == 2
    err = capsys.readouterr().err
    assert "at least 16" in err and "hunter2" not in err


def test_missing_package_is_reported_with_the_command_to_install_it(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    monkeypatch.delitem(sys.modules, "kvfusion_rag.serving")
    assert main(["serve"]) == 2
    err = capsys.readouterr().err
    assert 'pip install -c constraints.txt ".[serve]"' in err and err.count("\n") == 1


@pytest.mark.parametrize(
    "changes",
    [
        {"mode": "sideways"},
        {"focus": 0},
        {"max_concurrency": 0},
        {"tenant_concurrency": 0},
        {"max_body_bytes": 1.5},
        {"max_documents": True},
        {"timeout": 0},
        {"timeout": float("nan")},
        {"timeout": float("inf")},
    ],
)
def test_options_are_checked(changes):
    with pytest.raises(ValueError, match=next(iter(changes))):
        ServingOptions(**changes)


@pytest.mark.parametrize(
    ("options", "disk", "memory"),
    [
        (["--store", "kv"], None, None),
        (["--store", "kv", "--store-namespace-bytes", "5GiB"], 5 << 30, 256 << 20),
        (["--store", "kv", "--store-namespace-bytes", "1GiB", "--store-max-bytes", "2GiB"], 1 << 30, 512 << 20),
        (["--store-namespace-bytes", "64MiB"], None, 64 << 20),
    ],
)
def test_namespaces_can_be_capped_on_disk_and_in_memory(tmp_path, monkeypatch, options, disk, memory):
    monkeypatch.chdir(tmp_path)
    parser = argparse.ArgumentParser()
    serve_command.add_arguments(parser)
    store = as_store(open_chosen_store(parser.parse_args(options)))
    assert store.memory.caps.namespace_bytes == memory
    assert (store.disk and store.disk.caps.namespace_bytes) == disk


# The library of a server, with the real embedding model


def opened(generator: KVFusionGenerator, *argv: str) -> AbstractContextManager[Library | None]:
    return open_library(parse(build_parser(COMMANDS), ["serve", *argv, "--json"]), generator)


@pytest.fixture
def docs(tmp_path: Path) -> Path:
    folder = tmp_path / "docs"
    folder.mkdir()
    (folder / "keeper.txt").write_text(KEEPER["text"])
    (folder / "ferry.md").write_text("# The ferry\n\nThe ferry carries forty cars.")
    return folder


def test_library_has_the_files_of_the_arguments_with_kvs_and_example_questions(docs, capsys):
    pytest.importorskip("sentence_transformers")
    (docs / "questions.jsonl").write_text(json.dumps({"question": "Who was the keeper?"}) + "\n")
    generator = tiny.generator()
    with opened(generator, "--docs", str(docs), "--top-k", "1") as library:
        assert [file.name for file in library.files("")] == ["ferry.md", "keeper.txt"]
        (found,) = library.search("", "Who was the keeper?")
        assert found.id == "keeper.txt#1" and library.questions == ("Who was the keeper?",)
        assert generator.prefill([found])[0].origin == "memory"
        library.uploads_of("").add("mill.md", b"The mill is old.")
        assert library.search("", "How old is the mill?")[0].id == "upload:mill.md#1"
    assert not list(docs.rglob("mill.md")) and capsys.readouterr().out == ""


def test_index_of_the_documents_is_used_and_unchanged_by_uploads(docs, tmp_path):
    pytest.importorskip("sentence_transformers")
    assert main(["index", str(docs), "--json", "--chunk-tokens", "64"]) == 0
    with opened(
        tiny.generator(), "--docs", str(docs), "--chunk-tokens", "64", "--uploads", str(tmp_path / "kept")
    ) as library:
        library.uploads_of("").add("mill.md", b"The mill is old.")
    with opened(
        tiny.generator(), "--index", str(docs / ".kvfusion"), "--chunk-tokens", "64", "--max-uploads", "0"
    ) as library:
        assert [file.name for file in library.files("")] == ["ferry.md", "keeper.txt"]
    with opened(tiny.generator(), "--uploads", str(tmp_path / "kept"), "--chunk-tokens", "64") as library:
        assert [(file.name, file.uploaded) for file in library.files("")] == [("mill.md", True)]


def until(holds: Callable[[], bool]) -> None:
    """Wait until something holds. Another thread makes it true."""
    while not holds():  # the limit of all tests ends a test that waits in vain
        time.sleep(0.01)


def test_watched_files_are_read_when_they_change(docs, capsys, monkeypatch):
    monkeypatch.setattr("kvfusion_rag.retrieval.SentenceTransformerEmbedder", lambda name, device: WordEmbedder())
    monkeypatch.setattr("kvfusion_rag.retrieval.watch_folder", partial(watch_folder, seconds=0.01))
    generator = tiny.generator()
    with opened(generator, "--docs", str(docs), "--watch") as library:
        client = TestClient(create_app(generator, library=library), base_url="http://localhost")
        assert client.get("/v1/library").json()["watched"]
        (docs / "mill.md").write_text("The mill is old.")
        (docs / "ferry.md").unlink()
        until(
            lambda: [file["name"] for file in client.get("/v1/library").json()["files"]] == ["keeper.txt", "mill.md"]
        )
        (found,) = library.search("", "How old is the mill?", 1)
        ((key,),) = generator.store_keys([found]).values()
        until(lambda: key in generator.store)
        for file in docs.iterdir():
            file.unlink()
        until(lambda: library.files("") == [])
        (docs / "late.txt").write_text("The ferry is late.")
        until(lambda: [file.name for file in library.files("")] == ["late.txt"])
    assert "no files to index" in capsys.readouterr().err


def test_documents_that_are_joined_are_not_prefilled(docs):
    pytest.importorskip("sentence_transformers")
    generator = tiny.generator()
    with opened(generator, "--docs", str(docs), "--mode", "concat", "--focus", "none"):
        assert len(generator.store.memory) == 0


def test_server_without_documents_has_no_library():
    with opened(tiny.generator()) as library:
        assert library is None


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{}", "question is None"),
        ("[]", "must be a JSON object"),
        ("x", "is not JSON"),
        ('{"question": " "}', "blank"),
    ],
)
def test_example_questions_of_another_form_are_an_error_before_the_index_is_opened(docs, line, message):
    (docs / "questions.jsonl").write_text(line)
    with pytest.raises(InvalidInputError, match=message), opened(tiny.generator(), "--docs", str(docs)):
        pass


STUCK = """
import sys, threading
from fakes import RecordingGenerator
from kvfusion_rag.cli import serve as command
from kvfusion_rag.serving import bind, create_app, serve, server

class Stuck(RecordingGenerator):
    def step(self):
        self.threads.append(0)
        if len(self.threads) > 1:
            threading.Event().wait()  # a pass that does not end

server.SHUTDOWN_SECONDS, command.STOP_SECONDS = 0.2, 1.5
with bind("127.0.0.1", 0) as listener:
    serve(create_app(Stuck()), listener, lambda url: print(url, flush=True), command._end_soon)
"""


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_process_ends_although_a_pass_does_not(number, code):
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests" / "helpers")])
    server = subprocess.Popen(
        [sys.executable, "-c", STUCK],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": path},
    )  # fmt: skip
    try:
        assert server.stdout is not None
        url = server.stdout.readline().strip()
        with httpx.stream("POST", f"{url}/v1/chat/completions", json=request(stream=True), timeout=60) as response:
            lines = response.iter_lines()
            next(lines)
            server.send_signal(number)
            rest = "\n".join(lines)
        _, err = server.communicate(timeout=60)
    finally:
        server.kill()
        server.wait()
    assert '"stopping"' in rest and rest.rstrip().endswith("data: [DONE]")
    assert server.returncode == code and "work in progress was not finished" in err and "Traceback" not in err


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 0), pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow)]
)
def test_server_process_runs_until_a_signal(tmp_path, capsys, speaker_folder, number, code):
    keys = tmp_path / "keys.json"
    keys.write_text(json.dumps({KEY: "tenant-a"}))
    command = ["serve", "--port", "0", "--api-keys-file", str(keys), "--api-key-env", "RAG_KEY", "--metrics"]
    command += ["--focus", "3"]
    server = subprocess.Popen(
        [sys.executable, "-m", "kvfusion_rag.cli", *command, "--store", tmp_path / "kv", "--model", speaker_folder],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env={**os.environ, "RAG_KEY": "key-of-the-environment"},
    )
    try:
        assert server.stdout is not None
        line = server.stdout.readline()
        assert line.startswith("serving tiny-speaker at http://127.0.0.1:")
        assert line.endswith(" (stop with Ctrl-C)\n")
        url = line.split()[3].rstrip(",")
        assert f"a page at {url.removesuffix('/v1')} (" in line
        with httpx.Client(base_url=url, timeout=60) as client:
            assert client.get("/models").status_code == 401
            headers = {"authorization": f"Bearer {KEY}"}
            (model,) = client.get("/models", headers=headers).json()["data"]
            assert model["kvfusion"]["focus"] == 3
            body = {
                "model": "tiny-speaker",
                "messages": [{"role": "user", "content": "Who was the last keeper?"}],
                "documents": [KEEPER],
            }
            answer = client.post("/chat/completions", json=body, headers=headers).json()
            assert answer["choices"][0]["message"]["content"] == "thomas grant"
            assert answer["kvfusion"]["cited_text"] == "Thomas Grant"
            other = {"authorization": "Bearer key-of-the-environment"}
            (source,) = client.post("/chat/completions", json=body, headers=other).json()["kvfusion"]["sources"]
            assert source["origin"] == "computed"  # this key has another namespace
            # This request is in progress when the signal arrives:
            with client.stream(
                "POST", "/chat/completions", json={**body, "stream": True}, headers=headers
            ) as response:
                server.send_signal(number)
                assert response.read().endswith(b"data: [DONE]\n\n")
        out, err = server.communicate(timeout=60)
    finally:
        server.kill()
        server.wait()
    assert server.returncode == code, err
    assert out == "" and "Traceback" not in err
    assert main(["store", "verify", str(tmp_path / "kv"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["whole"] == 4  # document and prefix, twice
