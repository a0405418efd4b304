"""Positions up to which a model's rotary embedding (RoPE) is fixed.

Two kinds of RoPE change all rotations when the input gets long. Stored keys were rotated before, so fusion is exact
only for positions below that limit.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from transformers import PretrainedConfig

from ..text.json_text import is_mapping

CHANGES = {"longrope": "switches its rotations", "dynamic": "stretches its rotations"}  # at the limit


@dataclass(frozen=True, slots=True)
class PositionLimit:
    """The positions that a model may use.

    Attributes:
        positions: their number, or None if there is no limit.
        configured: the model's own limit, which is larger if RoPE changes before it.
        reason: why ``positions`` is smaller than ``configured``, or an empty string.
    """

    positions: int | None
    configured: int | None = None
    reason: str = ""

    @classmethod
    def of(cls, config: PretrainedConfig) -> PositionLimit:
        """Return the limit of a text configuration."""
        configured = getattr(config, "max_position_embeddings", None)
        limits = [limit for limit in map(_fixed_up_to, rope_settings(config)) if limit is not None]
        if configured is None or not limits or min(limits)[0] >= configured:
            return cls(configured, configured)
        positions, kind = min(limits)
        return cls(positions, configured, f"its {kind!r} RoPE {CHANGES[kind]} there")

    def __str__(self) -> str:
        if not self.reason:
            return str(self.positions)
        return f"{self.positions} (of {self.configured}; {self.reason})"


def rope_settings(config: PretrainedConfig) -> list[Mapping[str, Any]]:
    """Return the RoPE parameters: one mapping, or one per kind of layer."""
    rope = getattr(config, "rope_parameters", None)
    if not rope:
        return []
    nested = [value for value in rope.values() if is_mapping(value)]
    return nested or [rope]


def _fixed_up_to(rope: Mapping[str, Any]) -> tuple[int, str] | None:
    """Return the number of positions with fixed rotations and the kind of RoPE, or None if all are fixed.

    Dynamic NTK stretches beyond ``max_position_embeddings``, which is the context window anyway.
    """
    kind, limit = rope.get("rope_type"), rope.get("original_max_position_embeddings")
    return (int(limit), str(kind)) if kind == "longrope" and limit is not None else None
