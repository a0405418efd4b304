"""Where a training run keeps its state: weights in their libraries' formats, everything else in safetensors and JSON.

A checkpoint is written under another name and then renamed, so a run that is killed leaves the former one whole.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from ..errors import ModelLoadError
from ..model.backbone import Backbone
from ..text.settings import FILE_NAME, RECORD_NAME, ModelSettings

_STATE = "optimizer.safetensors"


def save_decoder(folder: Path, decoder: Backbone, settings: ModelSettings, record: Mapping[str, Any]) -> None:
    """Write Dt (an adapter in peft's format, or a whole model), its ``kvfusion.json`` and the record of its making."""
    fresh = folder.with_name(folder.name + ".new")
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True)
    decoder.save(fresh)
    (fresh / FILE_NAME).write_text(json.dumps(settings.to_dict(), indent=2) + "\n", encoding="utf-8")
    (fresh / RECORD_NAME).write_text(json.dumps(record, indent=2, default=str) + "\n", encoding="utf-8")
    _replace(fresh, folder)


def save_state(
    folder: Path, weights: Mapping[str, torch.Tensor], optimizer: torch.optim.Optimizer, record: Any
) -> None:
    """Write all that a run needs to go on: trained weights, optimiser moments, and ``record``."""
    fresh = folder.with_name(folder.name + ".new")
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True)
    tensors = {f"weight/{name}": value.detach().contiguous() for name, value in weights.items()}
    for name, parameter in weights.items():
        for key, value in optimizer.state.get(parameter, {}).items():  # type: ignore[call-overload]
            tensors[f"{key}/{name}"] = value.detach().contiguous()
    save_file(tensors, fresh / _STATE)
    (fresh / RECORD_NAME).write_text(json.dumps(record, indent=2, default=str) + "\n", encoding="utf-8")
    _replace(fresh, folder)


def load_record(folder: Path) -> dict[str, Any]:
    """The record of a saved state.

    Raises:
        ModelLoadError: it is not readable.
    """
    try:
        record = json.loads((folder / RECORD_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelLoadError(f"cannot read the checkpoint {folder.name!r}: {error}") from error
    if not isinstance(record, dict):
        raise ModelLoadError(f"the checkpoint {folder.name!r} has no object in its {RECORD_NAME}; it is damaged.")
    return record


def load_state(folder: Path, weights: Mapping[str, torch.Tensor], optimizer: torch.optim.Optimizer) -> None:
    """Put a saved state back into ``weights`` and ``optimizer``.

    Raises:
        ModelLoadError: the state is not readable, or belongs to other weights.
    """
    try:
        tensors = load_file(folder / _STATE)
    except Exception as error:  # safetensors of unknown origin raises anything
        raise ModelLoadError(f"cannot read the checkpoint {folder.name!r}: {error}") from error
    saved = {name.removeprefix("weight/"): t.shape for name, t in tensors.items() if name.startswith("weight/")}
    if saved != {name: value.shape for name, value in weights.items()}:
        raise ModelLoadError(
            f"the checkpoint {folder.name!r} holds other weights than this run trains; it belongs to another base "
            "model or another adapter."
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
    """Bring back a folder whose replacement was interrupted between its two renames."""
    if folder.exists():
        return
    for suffix in (".new", ".old"):  # a record is written last, so what has one is whole
        kept = folder.with_name(folder.name + suffix)
        if (kept / RECORD_NAME).is_file():
            os.replace(kept, folder)
            return


def _replace(fresh: Path, folder: Path) -> None:
    """Put ``fresh`` in the place of ``folder``."""
    old = folder.with_name(folder.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        os.replace(folder, old)
    os.replace(fresh, folder)
    shutil.rmtree(old, ignore_errors=True)
