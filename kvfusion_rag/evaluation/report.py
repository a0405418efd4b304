"""The report of a run as plain data: systems, rows, settings and all figures.

``run_facts`` records hardware, versions, commit, command line and date, so that a figure can be traced and repeated.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from .. import __version__
from ..data.rows import QARow
from .orders import Plan
from .predictions import Predictions
from .summary import Summary, score
from .systems import Named

_LIBRARIES = ("torch", "transformers", "tokenizers", "peft", "numpy")
_ROOT = Path(__file__).resolve().parents[2]


def make_report(
    summary: Summary, plan: Plan, systems: Sequence[Named], rows: Sequence[QARow], settings: dict[str, Any]
) -> dict[str, Any]:
    """Return all data of a run except the answers. ``settings`` are the caller's (seed, batch size, file, ...)."""
    return {
        "rows": len(rows),
        "documents": plan.documents,
        "conditions": [condition.name for condition in plan.conditions],
        "notes": list(plan.notes),
        "settings": settings,
        "systems": [{"name": system.name, **system.identity()} for system in systems],
        "run": run_facts(),
        **summary.to_dict(),
    }


def prediction_lines(rows: Sequence[QARow], predictions: Predictions) -> Iterator[str]:
    """Yield a JSON line per answer: row, system, condition, documents in order, texts, token ids and metrics."""
    for (system, condition), found in predictions.items():
        for row, prediction in zip(rows, found, strict=True):
            line: dict[str, Any] = {"id": row.id, "system": system, "condition": condition.name}
            line |= {"question": row.question, "answers": list(row.answers), "fits": prediction is not None}
            if prediction is not None:
                line |= {
                    "documents": list(prediction.documents),
                    "text": prediction.text,
                    "cited_text": prediction.cited_text,
                    "token_ids": list(prediction.token_ids),
                    **score(prediction, row, condition),
                }
            yield json.dumps(line) + "\n"  # ASCII, since rows may contain lone surrogates


def run_facts() -> dict[str, Any]:
    """Return date, command line (only the names of absolute paths), commit of a checkout, versions and hardware."""
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": shlex.join([Path(sys.argv[0]).name, *map(_without_folders, sys.argv[1:])]),
        "commit": _commit(),
        "versions": {"kvfusion-rag": __version__, "python": platform.python_version(), **_versions()},
        "hardware": {
            "processor": _processor(),
            "instructions": torch.backends.cpu.get_cpu_capability(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
            "system": platform.system(),
        },
    }


def file_digest(path: Path) -> str:
    """Return the SHA-256 of a file's bytes, in hex."""
    with path.open("rb") as data:
        return hashlib.file_digest(data, "sha256").hexdigest()


def _without_folders(argument: str) -> str:
    """Return an argument with an absolute path reduced to its name, since folders are private."""
    option, equals, value = argument.rpartition("=") if argument.startswith("--") else ("", "", argument)
    return f"{option}{equals}{Path(value).name}" if os.path.isabs(value) else argument


def _versions() -> dict[str, str]:
    versions = {}
    for name in _LIBRARIES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return versions


def _processor() -> str:
    facts = Path("/proc/cpuinfo")
    lines = facts.read_text(encoding="utf-8").splitlines() if facts.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return next(iter(names), "") or platform.processor() or platform.machine()


def _commit() -> str | None:
    """Return the commit of the checkout, with ``-dirty`` if files differ, or None if the package is installed."""
    git = shutil.which("git")
    if git is None or not (_ROOT / ".git").exists():
        return None
    command = [git, "-C", str(_ROOT), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    return result.stdout.strip() or None
