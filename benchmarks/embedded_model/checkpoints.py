"""State of a run of these scripts, to go on from: weights, optimiser moments, progress, and what made them.

A checkpoint is a numbered folder inside the run's ``checkpoint/``: one safetensors file in parts that are small enough
to travel (``cat`` joins them), and ``state.json``.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save

from kvfusion_rag import InvalidInputError
from kvfusion_rag.evaluation.report import file_digest, run_facts

PART_BYTES = 15_000_000
_STATE = "state.json"


def making_of(args: argparse.Namespace, may_change: Collection[str]) -> dict[str, Any]:
    """What a checkpoint depends on, as plain data: all arguments but ``may_change``, files by name and content."""
    return {name: described(value) for name, value in vars(args).items() if name not in may_change}


def described(value: Any) -> Any:
    """A value as plain data: files by name and content, folders as their files."""
    if isinstance(value, list):
        return [described(one) for one in value]
    if not isinstance(value, Path):
        return value
    if value.is_dir():
        return [described(path) for path in sorted(value.iterdir()) if path.is_file()]
    return f"{value.name} {file_digest(value)[:16]}"


def save_tensors(
    folder: Path,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    progress: Mapping[str, Any],
    made_by: Mapping[str, Any],
    extra: Mapping[str, torch.Tensor] | None = None,
) -> None:
    """Write the state beside the former one, which goes only when the new one is whole and has its name."""
    former = _numbered(folder)
    new = folder / "new"
    shutil.rmtree(new, ignore_errors=True)  # of a run that was killed
    new.mkdir(parents=True)
    content = save({name: t.contiguous() for name, t in (*_tensors(model, optimizer), *(extra or {}).items())})
    for number, start in enumerate(range(0, len(content), PART_BYTES)):
        (new / f"state.safetensors.{number:03}").write_bytes(content[start : start + PART_BYTES])
    facts = {"progress": progress, "made_by": made_by, "run": run_facts()}
    (new / _STATE).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    new.rename(folder / f"{int(former[-1].name) + 1 if former else 1:06}")
    for old in former:
        shutil.rmtree(old)


def load_tensors(
    folder: Path,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    made_by: Mapping[str, Any],
    extra: Mapping[str, torch.Tensor] | None = None,
) -> dict[str, Any]:
    """Put the latest state back in place; returns the progress.

    Raises:
        InvalidInputError: there is none, or another run than this one, ``made_by``, has made it.
    """
    if not (states := _numbered(folder)):
        raise InvalidInputError(
            f"{str(folder)!r} holds no whole checkpoint, as after a kill while the first was written; remove it to "
            "start anew."
        )
    facts = json.loads((states[-1] / _STATE).read_text(encoding="utf-8"))
    _require_same_run(folder, facts["made_by"], json.loads(json.dumps(made_by)))
    saved = load(b"".join(part.read_bytes() for part in sorted(states[-1].glob("state.safetensors.*"))))
    for parameter in model.parameters():
        empty = {key: torch.zeros_like(parameter) for key in ("exp_avg", "exp_avg_sq")}
        optimizer.state[parameter] = {**empty, "step": torch.zeros((), device=parameter.device)}
    for name, tensor in (*_tensors(model, optimizer), *(extra or {}).items()):
        tensor.copy_(saved[name])
    return facts["progress"]


def _require_same_run(folder: Path, former: Mapping[str, Any], present: Mapping[str, Any]) -> None:
    for name in sorted(former.keys() | present.keys()):
        if former.get(name) != present.get(name):
            raise InvalidInputError(
                f"the checkpoint in {folder.parent.name!r} was made with {name} {former.get(name)!r:.100}, but this "
                f"run has {present.get(name)!r:.100}; name another output folder, or the same value to go on."
            )


def _numbered(folder: Path) -> list[Path]:
    """Whole states, the latest last."""
    return sorted(folder.glob("[0-9]*"))


def _tensors(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[tuple[str, torch.Tensor]]:
    for name, parameter in model.named_parameters():
        yield f"weight/{name}", parameter.detach()
        for key, value in optimizer.state.get(parameter, {}).items():
            yield f"{key}/{name}", value
