"""How much attention each slot gets in a pass: the weights of all layers and heads, added up.

Attention that hands out no weights (as "sdpa" does not) is exchanged for an explicit one (``attention.py``), which
``backbone.py`` switches on for single passes. Knows slots, and no documents.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch


class Watch:
    """Adds up the attention that the first ``slots`` slots of one row get from all queries that it sees."""

    def __init__(self, slots: int, device: torch.device) -> None:
        self._mass = torch.zeros(slots, dtype=torch.float32, device=device)
        self._softmaxes = 0

    def add(self, weights: torch.Tensor) -> None:
        """Weights (1, H, Q, S) of one layer."""
        self._mass += weights[0, :, :, : len(self._mass)].sum(dim=(0, 1))
        self._softmaxes += weights.shape[1] * weights.shape[2]

    def shares(self, spans: Sequence[Sequence[tuple[int, int]]]) -> list[float]:
        """Mean over layers, heads and queries of the weight on the slots of each list of (start, end) spans."""
        mass = self._mass.double() / self._softmaxes
        return [float(sum(mass[start:end].sum() for start, end in own)) for own in spans]
