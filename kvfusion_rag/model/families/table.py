"""Reads the compatibility table, and finds the rows of a configuration.

``make families`` measures the table. A row is about one structure of a model type: the kinds of its layers and its
position encoding. A configuration of a known type with another structure has no row.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig

from ..rope import rope_settings

FILE = Path(__file__).parent / "families.json"


@dataclass(frozen=True, slots=True)
class FamilyRow:
    """One row of the compatibility table.

    Attributes:
        family: name that people use.
        model_type: the type in ``config.json``.
        example: a model of this structure on the hub.
        structure: kinds of layers and position encoding (:func:`structure_of`).
        accepted: whether the support gate accepts it.
        reason: why it is refused.
        deviations: relative error of logits in float32, or largest difference of bits, for each law. None if the law
            does not apply, because the model's attention cannot be replaced.
        note: what to know about it.
    """

    family: str
    model_type: str
    example: str
    structure: str
    accepted: bool
    reason: str | None
    deviations: Mapping[str, float | None]
    note: str

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def verdict(self) -> str:
        """Return one sentence about what was measured."""
        if not self.accepted:
            return f"refused, because {self.reason}"
        largest = max(value for value in self.deviations.values() if value is not None)
        return f"accepted, largest deviation {largest:.0e} in {len(self.deviations)} laws"


@cache
def table() -> tuple[FamilyRow, ...]:
    """Return all rows."""
    return tuple(FamilyRow(**row) for row in json.loads(FILE.read_text(encoding="utf-8")))


def rows_of(config: PretrainedConfig) -> tuple[FamilyRow, ...]:
    """Return the rows of models with the type and structure of ``config``."""
    structure = structure_of(config)
    return tuple(row for row in table() if (row.model_type, row.structure) == (config.model_type, structure))


def structure_of(config: PretrainedConfig) -> str:
    """Return the kinds of layers and the position encoding of a configuration, such as "full, sliding; RoPE yarn"."""
    ropes = sorted({str(rope.get("rope_type", "default")) for rope in rope_settings(config)})
    parts = {
        ", ".join(_layer_kinds(config)): True,
        "encoder-decoder": config.is_encoder_decoder,
        "encoder": config.model_type == "bert" and not config.is_decoder,
        "latent": getattr(config, "kv_lora_rank", None),
        "shared by layers": getattr(config, "num_kv_shared_layers", None),
        "ALiBi": getattr(config, "alibi", False),
        f"RoPE {', '.join(ropes)}": ropes,
    }
    return "; ".join(part for part, applies in parts.items() if applies)


def _layer_kinds(config: PretrainedConfig) -> list[str]:
    if kinds := getattr(config, "layer_types", None):
        return sorted({str(kind).removesuffix("_attention") for kind in kinds})
    window, longest = (getattr(config, name, None) for name in ("sliding_window", "max_position_embeddings"))
    if not hasattr(config, "num_attention_heads"):
        return ["recurrent"]
    return ["full" if not window or (longest is not None and window >= longest) else "sliding"]
