"""Saves and restores the state of a training run: weights in their libraries' formats, the rest in safetensors and
JSON.

A checkpoint is written under another name and then renamed, so that killing a run does not damage the previous one.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from ..errors import ModelLoadError
from ..model.backbone import Backbone
from ..text.json_text import parse_json
from ..text.settings import FILE_NAME, RECORD_NAME, ModelSettings

_STATE = "optimizer.safetensors"


def save_decoder(folder: Path, decoder: Backbone, settings: ModelSettings, record: Mapping[str, Any]) -> None:
    """Write Dt (an adapter in peft's format, or a whole model), its ``kvfusion.json`` and its training record."""
    with _replacing(folder, record) as new:
        decoder.save(new)
        (new / FILE_NAME).write_text(json.dumps(settings.to_dict(), indent=2) + "\n", encoding="utf-8")


def save_state(
    folder: Path, weights: Mapping[str, torch.Tensor], optimizer: torch.optim.Optimizer, record: Any
) -> None:
    """Write all that a run needs to resume: trained weights, optimiser moments, and ``record``."""
    tensors = {f"weight/{name}": value.detach().contiguous() for name, value in weights.items()}
    for name, parameter in weights.items():
        for key, value in optimizer.state.get(parameter, {}).items():  # type: ignore[call-overload]
            tensors[f"{key}/{name}"] = value.detach().contiguous()
    with _replacing(folder, record) as new:
        save_file(tensors, new / _STATE)


def load_record(folder: Path) -> dict[str, Any]:
    """Return the record of a saved state.

    Raises:
        ModelLoadError: the record cannot be read.
    """
    try:
        record = parse_json((folder / RECORD_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelLoadError(f"cannot read the checkpoint {folder.name!r}: {error}") from error
    if not isinstance(record, dict):
        raise ModelLoadError(f"the checkpoint {folder.name!r} is damaged: its {RECORD_NAME} is not an object.")
    return record


def load_state(folder: Path, weights: Mapping[str, torch.Tensor], optimizer: torch.optim.Optimizer) -> None:
    """Restore a saved state into ``weights`` and ``optimizer``.

    Raises:
        ModelLoadError: the state cannot be read, or belongs to other weights.
    """
    try:
        tensors = load_file(folder / _STATE)
    except Exception as error:  # safetensors can raise anything for a damaged file
        raise ModelLoadError(f"cannot read the checkpoint {folder.name!r}: {error}") from error
    saved = {name.removeprefix("weight/"): t.shape for name, t in tensors.items() if name.startswith("weight/")}
    if saved != {name: value.shape for name, value in weights.items()}:
        raise ModelLoadError(
            f"the checkpoint {folder.name!r} contains other weights than this run trains; it belongs to another base "
            "model or adapter."
        )
    with torch.no_grad():
        for name, parameter in weights.items():
            parameter.copy_(tensors[f"weight/{name}"])
            moments = {
                k: tensors[f"{k}/{name}"] for k in ("step", "exp_avg", "exp_avg_sq") if f"{k}/{name}" in tensors
            }
            optimizer.state[parameter] = {  # type: ignore[index]
                key: value if key == "step" else value.to(parameter.device) for key, value in moments.items()
            }


def recover(folder: Path) -> None:
    """Restore a folder whose replacement was interrupted between its two renames."""
    if folder.exists():
        return
    for suffix in (".new", ".old"):  # the record is written last, so a folder with one is complete
        copy = folder.with_name(folder.name + suffix)
        if (copy / RECORD_NAME).is_file():
            os.replace(copy, folder)
            return


@contextmanager
def _replacing(folder: Path, record: Any) -> Generator[Path, None, None]:
    """Yield a new folder to write into, then add ``record`` and replace ``folder`` with it."""
    new, old = (folder.with_name(folder.name + suffix) for suffix in (".new", ".old"))
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    yield new
    (new / RECORD_NAME).write_text(json.dumps(record, indent=2, default=str) + "\n", encoding="utf-8")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        os.replace(folder, old)
    os.replace(new, folder)
    shutil.rmtree(old, ignore_errors=True)
