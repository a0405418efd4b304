"""The options that every command has: how much is reported, threads, and flags that can be switched off."""

from __future__ import annotations

import logging
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from commands import run

from kvfusion_rag.cli import COMMANDS, doctor
from kvfusion_rag.cli.parser import build_parser, parse

ROOT = Path(__file__).parent.parent.parent
logger = logging.getLogger("kvfusion_rag.somewhere")


def arguments(*argv: str):
    return parse(build_parser(COMMANDS), list(argv))


@pytest.fixture
def chatty(monkeypatch) -> None:
    """Let ``doctor`` log one message of each level."""

    def log(args):
        for level in ("debug", "info", "warning", "error"):
            getattr(logger, level)("a %s", level)
        return 0

    monkeypatch.setattr(doctor, "run", log)


@pytest.mark.parametrize(
    ("options", "levels"),
    [
        (["-q"], ["error"]),
        ([], ["warning", "error"]),
        (["-v"], ["info", "warning", "error"]),
        (["-vv"], ["debug", "info", "warning", "error"]),
        (["-v", "--verbose", "-v"], ["debug", "info", "warning", "error"]),
        (["--quiet", "-v"], ["warning", "error"]),
    ],
)
def test_verbosity_decides_what_is_on_stderr(capsys, chatty, options, levels):
    code, out, err = run(capsys, "doctor", *options)
    assert (code, out) == (0, "")
    assert [line.split()[-1] for line in err.splitlines()] == levels
    assert logging.getLogger("kvfusion_rag").level == logging.NOTSET


@pytest.mark.parametrize("argv", [["store", "-v", "stats", "kv"], ["store", "stats", "kv", "-v"]])
def test_common_options_may_stand_before_and_behind_an_action(argv):
    assert arguments(*argv).verbosity == 1


def test_steps_of_a_command_are_reported(capsys, model_folder, docs):
    _, _, err = run(capsys, "ask", "Who?", "--docs", docs, "--model", model_folder, "-v", "--mode", "fusion")
    assert "INFO: loaded tiny-llama in" in err and "INFO: indexed 2 files: 2 chunks" in err and "DEBUG" not in err
    _, _, err = run(capsys, "ask", "Who?", "--docs", docs, "--model", model_folder, "-vv", "--mode", "fusion")
    assert "DEBUG: KVs of documents: {'computed': 2}" in err


def test_threads_are_those_of_torch_while_the_command_runs(capsys, monkeypatch):
    before, seen = torch.get_num_threads(), []
    monkeypatch.setattr(doctor, "run", lambda args: seen.append(torch.get_num_threads()))
    run(capsys, "doctor", "--threads", before + 2)
    assert (seen, torch.get_num_threads()) == ([before + 2], before)


def test_threads_replace_the_variables_of_the_environment():
    code = (
        "from kvfusion_rag.cli import doctor, main\n"
        "doctor.run = lambda args: print(__import__('torch').get_num_threads())\n"
        "main(['doctor', '--threads', '2'])"
    )
    variables = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=variables)
    assert out.stdout.strip() == "2"


@pytest.mark.parametrize("number", ["0", "-1", "1.5", "many", "5000"])
def test_impossible_number_of_threads_is_an_error(capsys, number):
    code, _, err = run(capsys, "doctor", f"--threads={number}")
    assert code == 2 and "is not a whole number from 1 to 4,096" in err


def test_flags_can_be_switched_off_again():
    assert arguments("serve", "--metrics").metrics and not arguments("serve", "--metrics", "--no-metrics").metrics
    assert arguments("chat", "--no-history").no_history and not arguments("chat", "--history").no_history


def test_required_options_are_still_required(capsys):
    code, _, err = run(capsys, "adapt", "--docs", ROOT)
    assert code == 2 and "the following arguments are required: --output (see kvfusion adapt --help)" in err
