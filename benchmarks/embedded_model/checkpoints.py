"""State of a run of these scripts, to go on from: weights, optimiser moments and progress in one safetensors file."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

_FILE = "state.safetensors"


def save_tensors(
    folder: Path,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    progress: Mapping[str, Any],
    extra: Mapping[str, torch.Tensor] | None = None,
) -> None:
    """Write the state under another name and then rename it, so that a run that is killed keeps the former one."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: t.contiguous() for name, t in (*_tensors(model, optimizer), *(extra or {}).items())}
    save_file(tensors, folder / f"{_FILE}.new", metadata={"progress": json.dumps(progress)})
    (folder / f"{_FILE}.new").replace(folder / _FILE)


def load_tensors(
    folder: Path,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    extra: Mapping[str, torch.Tensor] | None = None,
) -> dict[str, Any]:
    """Put a saved state back in place; returns the progress."""
    saved = load_file(folder / _FILE)
    for parameter in model.parameters():
        empty = {key: torch.zeros_like(parameter) for key in ("exp_avg", "exp_avg_sq")}
        optimizer.state[parameter] = {**empty, "step": torch.zeros((), device=parameter.device)}
    for name, tensor in (*_tensors(model, optimizer), *(extra or {}).items()):
        tensor.copy_(saved[name])
    with safe_open(folder / _FILE, "pt") as file:
        return json.loads(file.metadata()["progress"])


def _tensors(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[tuple[str, torch.Tensor]]:
    for name, parameter in model.named_parameters():
        yield f"weight/{name}", parameter.detach()
        for key, value in optimizer.state.get(parameter, {}).items():
            yield f"{key}/{name}", value
