"""Sums the attention that each slot receives in a forward pass, over all layers and heads."""

from __future__ import annotations

from collections.abc import Sequence

import torch


class AttentionSum:
    """Attention that the first ``slots`` slots of one row receive from all queries."""

    def __init__(self, slots: int, device: torch.device) -> None:
        self._mass = torch.zeros(slots, dtype=torch.float32, device=device)
        self._softmaxes = 0

    def add(self, weights: torch.Tensor) -> None:
        """Add the weights (1, H, Q, S) of one layer."""
        self._mass += weights[0, :, :, : len(self._mass)].sum(dim=(0, 1))
        self._softmaxes += weights.shape[1] * weights.shape[2]

    def shares(self, spans: Sequence[Sequence[tuple[int, int]]]) -> list[float]:
        """Return the mean weight, over layers, heads and queries, of each list of (start, end) spans of slots."""
        mass = self._mass.double() / self._softmaxes
        return [float(sum(mass[start:end].sum() for start, end in group)) for group in spans]
