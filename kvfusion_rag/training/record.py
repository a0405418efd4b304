"""The record of how a decoder was trained, saved beside its weights, and the check that a checkpoint can be resumed.

Base weights, templates, settings, rows and processes must be the same on resuming. The length of the run, the
frequency of evaluations, gradient checkpointing and shards may change.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from ..data.rows import QARow, rows_digest
from ..engine.engine import Engine
from ..errors import InvalidInputError, ModelLoadError
from ..evaluation.report import run_facts
from ..fusion.torch_model import TorchModel
from .config import TrainingConfig

DEFAULTS = asdict(TrainingConfig())  # values of settings that are missing in a record of an earlier version

MAY_CHANGE = ("epochs", "max_steps", "eval_every", "gradient_checkpointing", "shard_weights")


def make_record(
    engine: Engine[TorchModel],
    config: TrainingConfig,
    rows: Sequence[QARow],
    dev: Sequence[QARow],
    *,
    processes: int,
    files: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """Return the facts of a run that are known before its first step. ``files`` names the source of the rows."""
    base = engine.model.backbone
    return {
        "base_model": base.model_id,
        "base_revision": base.revision,
        "base_weights": base.weights_digest,
        "dtype": str(base.dtype).removeprefix("torch."),
        "settings": engine.settings.to_dict(),
        "config": asdict(config),
        "rows": {"number": len(rows), "sha256": rows_digest(rows)},
        "dev": {"number": len(dev), "sha256": rows_digest(dev)},
        "files": dict(files or {}),
        "processes": processes,
        "device": str(engine.model.decoder.device),
        "run": run_facts(),
    }


def require_same_run(saved: Mapping[str, Any], current: Mapping[str, Any]) -> None:
    """Reject the checkpoint of another run.

    Args:
        saved: record of the checkpoint.
        current: record of the run that would resume from it.

    Raises:
        ModelLoadError: the checkpoint belongs to another base model, or to the same one in another precision.
        InvalidInputError: the checkpoint has other rows or settings.
    """
    current = json.loads(json.dumps(current, default=str))  # as after a round trip through JSON
    if saved.get("base_weights") != current["base_weights"]:
        raise ModelLoadError(
            f"the checkpoint belongs to another base model: it was trained on {saved.get('base_model')!r} "
            f"({saved.get('dtype')}), but the weights of {current['base_model']!r} ({current['dtype']}) differ; name "
            "another output folder, or the model it was trained on."
        )
    for name, shown in (("rows", "training"), ("dev", "dev")):
        if saved.get(name) != current[name]:
            raise InvalidInputError(
                f"the checkpoint was made with {saved.get(name, {}).get('number')} {shown} rows, but the "
                f"{current[name]['number']} of this run differ; name another output folder, or the same rows in the "
                "same order."
            )
    for group in ("config", "settings", None):
        before, now = (saved.get(group, {}), current[group]) if group else (saved, {"processes": current["processes"]})
        defaults = json.loads(json.dumps(DEFAULTS)) if group == "config" else {}
        for name, value in now.items():
            saved_value = before.get(name, defaults.get(name))
            if name not in MAY_CHANGE and saved_value != value:
                raise InvalidInputError(
                    f"the checkpoint was made with {name} {saved_value!r}, but this run has {value!r}; only "
                    f"{', '.join(MAY_CHANGE)} may change on resuming: name another output folder, or the same value."
                )
