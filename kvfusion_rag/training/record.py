"""Everything that made a decoder, as plain data beside its weights, and whether a checkpoint is of the same making.

What is compared on resuming: base weights, templates, settings, rows and processes. How long a run goes on, how
often it is evaluated and what it keeps in memory may change.
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
from .config import TrainingConfig

DEFAULTS = asdict(TrainingConfig())  # of settings that a record of an earlier version does not have

MAY_CHANGE = ("epochs", "max_steps", "eval_every", "gradient_checkpointing")


def make_record(
    engine: Engine,
    config: TrainingConfig,
    rows: Sequence[QARow],
    dev: Sequence[QARow],
    *,
    processes: int,
    files: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """The facts of a run that are known before its first step; ``files`` says where the rows come from."""
    base = engine.backbone
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
        "device": str(engine.decoder.device),
        "run": run_facts(),
    }


def require_same_run(saved: Mapping[str, Any], mine: Mapping[str, Any]) -> None:
    """Refuse to go on from a checkpoint of another run.

    Args:
        saved: the checkpoint's record.
        mine: the record of the run that is to go on from it.

    Raises:
        ModelLoadError: it belongs to another base model, or to the same one in another precision.
        InvalidInputError: its rows or settings were others.
    """
    mine = json.loads(json.dumps(mine, default=str))  # as it would be read back
    if saved.get("base_weights") != mine["base_weights"]:
        raise ModelLoadError(
            f"the checkpoint belongs to another base model: it was trained on {saved.get('base_model')!r} "
            f"({saved.get('dtype')}), and the weights of {mine['base_model']!r} ({mine['dtype']}) are others; name "
            "another output folder, or the model it was trained on."
        )
    for name, shown in (("rows", "training"), ("dev", "dev")):
        former = saved.get(name)
        if former != mine[name]:
            number = former.get("number") if isinstance(former, Mapping) else former
            raise InvalidInputError(
                f"the checkpoint was made with {number} {shown} rows, and the {mine[name]['number']} of this run are "
                "others; name another output folder, or the same rows in the same order."
            )
    for group in ("config", "settings", None):
        former, present = (saved.get(group, {}), mine[group]) if group else (saved, {"processes": mine["processes"]})
        defaults = json.loads(json.dumps(DEFAULTS)) if group == "config" else {}
        for name, value in present.items():
            saved_value = former.get(name, defaults.get(name))
            if name not in MAY_CHANGE and saved_value != value:
                raise InvalidInputError(
                    f"the checkpoint was made with {name} {saved_value!r}, but this run has {value!r}; only "
                    f"{', '.join(MAY_CHANGE)} may change on resuming: name another output folder, or the same value."
                )
