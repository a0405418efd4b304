"""The command line: errors, signals, ``index`` and ``doctor``, and commands as processes."""

from __future__ import annotations

import gc
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from commands import run
from indexes import LIGHTHOUSE, reasons
from tiny import config
from transformers import GPTNeoConfig, MambaConfig

from kvfusion_rag import UnsupportedModelError, __version__
from kvfusion_rag.cli import ask, doctor, main
from kvfusion_rag.cli.console import collection_paused
from kvfusion_rag.model.location import DEFAULT_MODEL
from kvfusion_rag.retrieval import SkippedFile
from kvfusion_rag.retrieval.collection import DATABASE_FILE
from kvfusion_rag.retrieval.files.kinds import KNOWN_TYPES

ROOT = Path(__file__).parent.parent.parent
KEEPER = "Who was the last keeper of the Harrow Point Lighthouse?"


# Errors


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "COMMAND"),
        (["sing"], "invalid choice: 'sing'"),
        (["ask"], "QUESTION"),
        (["ask", "Who?"], "pass them with --docs"),
        (["ask", " ", "--docs", "."], "argument QUESTION: ' ' is blank"),
        (["ask", "Who?", "--docs", "/no/such/path"], "'/no/such/path' does not exist"),
        (["ask", "Who?", "--index", "/no/such/path"], "'/no/such/path' does not exist"),
        (["ask", "Who?", "--docs", ".", "--top-k", "0"], "'0' is not a whole number from 1"),
        (["ask", "Who?", "--docs", ".", "--mode", "mix"], "invalid choice: 'mix'"),
        (["ask", "Who?", "--docs", ".", "--focus", "0"], "'0' is not a number of documents from 1, auto or none"),
        (["ask", "Who?", "--docs", ".", "--focus", "all"], "'all' is not a number of documents from 1, auto or none"),
        (["ask", "Who?", "--docs", ".", "--json", "--stream"], "cannot be combined"),
        (["ask", "Who?", "--docs", ".", "--frobnicate"], "unrecognized arguments: --frobnicate"),
        (["index"], "PATH"),
        (["index", "/no/such/path"], "does not exist"),
        (["doctor", "/no/such/path"], "to load a model from"),
    ],
)
def test_invalid_arguments_print_one_line_and_return_2(capsys, monkeypatch, argv, message):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    code, out, err = run(capsys, *argv)
    assert (code, out) == (2, "")
    assert err.startswith("kvfusion: error: ")
    assert message in err
    assert err.count("\n") == 1 and err.endswith("\n")


def test_library_errors_print_one_line(capsys, generator, docs):
    for argv in (
        ["ask", "Who?", "--docs", docs / "data.bin"],
        ["ask", "Who?", "--docs", docs, "--temperature", "-1"],
        ["ask", "Who?", "--docs", docs, "--index", docs],
        ["ask", "Who?", "--docs", docs, "--chunk-tokens", "1"],
    ):
        code, out, err = run(capsys, *argv)
        assert (code, out, err.count("\n")) == (2, "", 1), err


def test_unexpected_errors_are_not_hidden(generator, docs):
    generator.error = RuntimeError("a bug")
    with pytest.raises(RuntimeError, match="a bug"):
        main(["ask", "Who?", "--docs", str(docs)])


def test_help_and_version(capsys):
    assert run(capsys, "--version") == (0, f"kvfusion {__version__}\n", "")
    for argv in (["--help"], ["ask", "--help"], ["index", "--help"], ["doctor", "--help"]):
        code, out, err = run(capsys, *argv)
        assert (code, err) == (0, "")
        assert out.startswith("usage: kvfusion")


def test_environment_and_logging_are_restored(capsys, generator, docs):
    own = logging.getLogger("kvfusion_rag")
    before = (dict(os.environ), list(own.handlers), logging.getLogger("transformers").level)
    handler = signal.getsignal(signal.SIGINT)
    run(capsys, "ask", "Who?", "--docs", docs)
    assert (dict(os.environ), list(own.handlers), logging.getLogger("transformers").level) == before
    assert signal.getsignal(signal.SIGINT) is handler
    assert not (docs / ".kvfusion").exists()


@pytest.mark.parametrize(
    ("own", "expected"),
    [({}, "passive 10000"), ({"OMP_WAIT_POLICY": "active"}, "active None"), ({"GOMP_SPINCOUNT": "7"}, "None 7")],
)
def test_waiting_threads_sleep_unless_the_user_decides(capsys, monkeypatch, own, expected):
    for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in own.items():
        monkeypatch.setenv(name, value)
    code = "import os; print(os.environ.get('OMP_WAIT_POLICY'), os.environ.get('GOMP_SPINCOUNT'))"
    children = []
    monkeypatch.setattr(
        doctor, "run", lambda args: children.append(subprocess.check_output([sys.executable, "-c", code], text=True))
    )
    run(capsys, "doctor")
    assert children == [f"{expected}\n"]
    assert {name: os.environ[name] for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT") if name in os.environ} == own


@pytest.mark.skipif(sys.platform != "linux", reason="other runtimes show their settings differently")
def test_torch_is_loaded_after_the_threads_are_set():
    code = "from kvfusion_rag.cli import doctor, main; doctor.run = lambda args: __import__('torch') is None; "
    variables = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_"))}
    command = [sys.executable, "-c", code + "main(['doctor'])"]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=ROOT, check=True, env=variables | {"OMP_DISPLAY_ENV": "true"}
    )
    assert "OMP_WAIT_POLICY = 'PASSIVE'" in done.stderr


def test_ctrl_c_is_quiet(capsys, generator, docs, monkeypatch):
    monkeypatch.setattr(ask, "load_generator", lambda args: signal.raise_signal(signal.SIGINT))
    assert run(capsys, "ask", "Who?", "--docs", docs) == (130, "", "")


def test_ctrl_c_during_an_import_is_quiet(capsys, generator, docs, monkeypatch):
    def load(args):
        try:
            signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt as stopped:
            raise ModuleNotFoundError("Could not import module 'PreTrainedModel'") from stopped

    monkeypatch.setattr(ask, "load_generator", load)
    assert run(capsys, "ask", "Who?", "--docs", docs) == (130, "", "")


# index


def test_index_reports_its_changes(capsys, generator, docs, model_folder):
    code, out, err = run(capsys, "index", docs, "--model", model_folder)
    assert (code, err) == (0, "")
    assert out.splitlines() == [
        f"{docs / '.kvfusion'}: 2 chunks of up to 200 tokens",
        "2 added, 0 changed, 0 removed, 0 unchanged, 1 skipped",
        "  + peru.md",
        "  + rice.txt",
        f"  ! {docs / 'data.bin'}: unknown file type '.bin'; known types: {KNOWN_TYPES}",
    ]
    (docs / "rice.txt").unlink()
    result = json.loads(run(capsys, "index", docs, "--json", "--model", model_folder)[1])
    assert (result["index"], result["chunk_tokens"], result["chunks"]) == (str(docs / ".kvfusion"), 200, 1)
    assert (result["removed"], result["unchanged"]) == (["rice.txt"], ["peru.md"])
    assert reasons([SkippedFile(**one) for one in result["skipped"]]).keys() == {"data.bin"}


def test_index_reports_a_damaged_index_and_builds_it_again(capsys, generator, docs, model_folder):
    run(capsys, "index", docs, "--model", model_folder)
    (docs / ".kvfusion" / DATABASE_FILE).write_bytes(b"garbage" * 1000)
    code, out, err = run(capsys, "ask", "Who?", "--index", docs / ".kvfusion")
    assert (code, out) == (2, "")
    assert "was damaged (file is not a database), so it is empty; index its files again." in err
    (docs / ".kvfusion" / DATABASE_FILE).write_bytes(b"garbage" * 1000)
    code, out, err = run(capsys, "index", docs, "--json", "--model", model_folder)
    assert code == 0
    assert "was damaged (file is not a database)" in err
    result = json.loads(out)
    assert (result["added"], result["damage"]) == (["peru.md", "rice.txt"], "file is not a database")


def test_long_report_is_shortened(capsys, generator, docs, model_folder):
    for n in range(30):
        (docs / f"{n:02}.txt").write_text(f"text {n}")
    out = run(capsys, "index", docs, "--chunk-tokens", 30, "--model", model_folder)[1]
    assert out.count("\n  + ") == 21
    assert "  + ... and 12 more (--json lists all)" in out


# doctor


def test_doctor_prints_every_check(capsys, generator):
    code, out, err = run(capsys, "doctor", "fake/model")
    assert (code, err) == (0, "")
    row, *lines = out.splitlines()
    assert row.startswith("small models of Llama 2 (llama, full; RoPE default): accepted, largest deviation ")
    assert lines[1:3] == ["fake/model", "  pass  full attention: 2 layers"]
    printed = json.loads(run(capsys, "doctor", "fake/model", "--json")[1])
    assert len(printed.pop("table")) == 2
    assert printed == {
        "model": "fake/model",
        "passed": True,
        "checks": [{"name": "full attention", "passed": True, "detail": "2 layers"}],
        "error": None,
        "mode": "concat",
        "mode_reason": "set for this model",
        "focus": None,
        "measured": None,
    }


@pytest.mark.parametrize("argv", [[doctor.DEFAULT_MODEL], ["--adapter", "none"], ["--gguf-file", "q8.gguf"]])
def test_doctor_checks_the_default_model_by_its_name_or_an_option(capsys, generator, argv):
    assert doctor.DEFAULT_MODEL == DEFAULT_MODEL
    assert "passed: documents can be fused exactly" in run(capsys, "doctor", *argv)[1]


def test_doctor_reports_the_cause(capsys, monkeypatch):
    def refuse(args):
        raise UnsupportedModelError("'x' has sliding-window attention,\nwhich cannot be fused.")

    monkeypatch.setattr(doctor, "load_generator", refuse)
    monkeypatch.setattr(doctor, "load_whole_config", lambda args: config("llama", model_type="other"))
    line = "kvfusion: error: 'x' has sliding-window attention, which cannot be fused.\n"
    assert run(capsys, "doctor", "x") == (1, "not measured: other (full; RoPE default)\n", line)
    code, out, err = run(capsys, "doctor", "x", "--json")
    assert (code, err) == (1, line)
    assert json.loads(out)["passed"] is False


def test_doctor_reads_only_the_configuration(capsys, tmp_path):
    """There are no weights and no tokenizer."""
    config("llama").save_pretrained(tmp_path / "llama")
    code, out, err = run(capsys, "doctor", tmp_path / "llama", "--config-only")
    assert (code, err) == (0, "")
    assert out.startswith("small models of Llama 2 (llama, full; RoPE default): accepted")
    assert "  pass  text decoder: llama, decoder only" in out and "FAIL" not in out
    MambaConfig().save_pretrained(tmp_path / "mamba")
    code, out, err = run(capsys, "doctor", tmp_path / "mamba", "--config-only")
    assert code == 1 and out.startswith("small models of Mamba (mamba, linear): refused, because ")
    assert out.splitlines()[-1].startswith("  FAIL  ")
    assert run(capsys, "doctor", tmp_path / "mamba")[0] == 1
    code, out, err = run(capsys, "doctor", tmp_path / "mamba", "--config-only", "--json")
    assert (code, json.loads(out)["passed"], len(json.loads(out)["table"])) == (1, False, 1)


def test_doctor_knows_what_the_configuration_does_not_show(capsys, tmp_path):
    GPTNeoConfig(num_layers=2, attention_types=[[["global", "local"], 1]]).save_pretrained(tmp_path)
    code, out, _ = run(capsys, "doctor", tmp_path, "--config-only")
    assert code == 1 and "FAIL" not in out
    assert out.startswith("small models of GPT-Neo (gpt_neo, full): refused, because the support gate measures")


def test_doctor_says_what_was_not_measured(capsys, tmp_path):
    config("llama", rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}).save_pretrained(
        tmp_path
    )
    out = run(capsys, "doctor", tmp_path, "--config-only")[1]
    assert out.startswith("not measured: llama (full; RoPE dynamic)\n")


# Processes


def shell(*argv: object, **options) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "kvfusion_rag.cli", *map(str, argv)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=300, check=False, **options)


def test_process_prints_only_its_answer(capsys, tmp_path, speaker_folder):
    shutil.copytree(LIGHTHOUSE, tmp_path / "docs", ignore=shutil.ignore_patterns(".kvfusion"))
    code, out, err = run(capsys, "index", tmp_path / "docs", "--json", "--model", speaker_folder)
    assert (code, err, len(json.loads(out)["added"])) == (0, "", 11)
    docs = ("--docs", tmp_path / "docs")
    asked = shell("ask", KEEPER, *docs, "--json", "--model", speaker_folder, env=os.environ | {"LC_ALL": "C"})
    assert (asked.returncode, asked.stderr) == (0, "")
    result = json.loads(asked.stdout)
    assert result["answer"] == "Thomas Grant"
    assert len(result["update"]["unchanged"]) == 11  # both commands split and embed files in the same way
    code, out, err = run(capsys, "doctor", speaker_folder)
    assert (code, err) == (0, "") and out.count("  pass  ") >= 4


def test_closed_stdout_is_not_an_error():
    read_end, write_end = os.pipe()
    os.close(read_end)
    code = "from kvfusion_rag.cli import console, doctor, main; doctor.run = lambda args: console.say('x' * 99); "
    command = [sys.executable, "-c", code + "raise SystemExit(main(['doctor']))"]
    done = subprocess.run(command, stdout=write_end, stderr=subprocess.PIPE, cwd=ROOT, timeout=60, check=False)
    os.close(write_end)
    assert (done.returncode, done.stderr) == (141, b"")


# The garbage collector


@pytest.mark.parametrize("fails", [False, True])
def test_garbage_collector_is_restored_after_a_command(monkeypatch, fails):
    seen = []

    @collection_paused()
    def load(args):
        seen.append(gc.isenabled())
        if fails:
            raise UnsupportedModelError("no such model")

    def run(args):
        load(args)
        seen.append((gc.isenabled(), gc.get_freeze_count() > 0))
        return 0

    monkeypatch.setattr(doctor, "run", run)
    assert main(["doctor", "a/model"]) == (2 if fails else 0)
    assert seen == ([False] if fails else [False, (True, True)])
    assert gc.isenabled() and gc.get_freeze_count() == 0
