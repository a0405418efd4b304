"""Random command lines: whatever a user types, the process ends with an exit code, never with a traceback."""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

import pytest
import tiny

from kvfusion_rag.cli import COMMANDS, main

HOSTILE = [
    "", " ", "~nosuchuser/x", "a" * 300, "loop", "loop/x", "docs", "docs/a.txt", "empty", "binary", "nested.json",
    "rows.jsonl", str(10**30), "-1", "0", "1", "nan", "inf", "1e400", "cuda", "cuda:99", "mps", "float64", "\udcff",
    "/dev/full/x", "/proc/x", "http://x", "s3://", "file:///", "memory://", "a,b", "auto", "none", "x=1", "{}", "[]",
    "*", "/", "..", "fusion", "slot:99", "top:0", "model",
]  # fmt: skip
GOOD = {
    "model": "model",
    "docs": "docs",
    "rows": "rows.jsonl",
    "question": "who?",
    "paths": "docs",
    "questions": "rows.jsonl",
}
LONG_RUNS = {"bench", "--measure", "--watch"}  # they take minutes or do not end, which is no fault


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    tiny.save_speaker(tmp_path / "model", "the old mill")
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "a.txt").write_text("The river runs past an old mill.\n\nTwo grey doves sleep.")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "empty").write_text("")
    (tmp_path / "binary").write_bytes(bytes(range(256)))
    (tmp_path / "nested.json").write_text("[" * 100_000)
    passages = [{"text": "an old mill", "gold": True}, {"text": "two grey doves"}]
    row = {"id": "1", "question": "q?", "answers": ["mill"], "passages": passages}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    return tmp_path


def command_line(rng: random.Random) -> list[str]:
    """Return a command with the arguments that it needs and a few others, each good or hostile."""
    name = rng.choice([command for command in COMMANDS if command not in LONG_RUNS])
    parser = argparse.ArgumentParser()
    COMMANDS[name].add_arguments(parser)
    argv, actions = [name], parser._actions
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            argv.append(rng.choice(list(action.choices)))
            actions = action.choices[argv[-1]]._actions
    for action in actions:
        wanted = action.required or action.dest in ("model", "docs") or rng.random() < 0.12
        if action.dest == "help" or not wanted or LONG_RUNS.intersection(action.option_strings):
            continue
        argv += rng.sample(action.option_strings, min(1, len(action.option_strings)))
        if action.nargs != 0:
            usual = [str(choice) for choice in action.choices or ()] or [GOOD.get(action.dest, rng.choice(HOSTILE))]
            argv.append(rng.choice(usual if rng.random() < 0.8 else HOSTILE))
    return argv


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(8))
def test_no_command_line_ends_in_a_traceback(folder, monkeypatch, capsys, seed):
    monkeypatch.setattr("uvicorn.Server.run", lambda *args, **kwargs: None)
    rng = random.Random(seed)
    for _ in range(20):
        argv = command_line(rng)
        assert main(argv) in (0, 1, 2), argv
        assert "Traceback" not in capsys.readouterr().err, argv
