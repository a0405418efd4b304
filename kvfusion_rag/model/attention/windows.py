"""Attention windows, measured in positions instead of cache slots.

A model with a sliding window of w tokens was trained to see its own position and the w - 1 before it. transformers
counts cache slots instead, but in a fused cache documents share positions, so slots would drop whole documents. The
masks made here compare positions.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from transformers import PretrainedConfig

from ..positions import additive, causal_mask

FULL, SLIDING, CHUNKED = "full_attention", "sliding_attention", "chunked_attention"  # transformers' names


@dataclass(frozen=True, slots=True)
class Windows:
    """The windows of a model's layers.

    Attributes:
        sizes: window or chunk of each kind of layer, in positions. Layers of kind ``FULL`` have None.
        by_kind: whether the model takes one mask per kind of layer. Otherwise all layers have the same kind.
    """

    sizes: Mapping[str, int | None]
    by_kind: bool

    @classmethod
    def of(cls, config: PretrainedConfig) -> Windows | None:
        """Return the windows of a text configuration, or None if every layer sees all positions."""
        window, chunk = (getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size"))
        size_of = {FULL: None, SLIDING: window, CHUNKED: chunk}
        layers = getattr(config, "layer_types", None)
        # Without kinds of layers, transformers gives all layers a window if there is one.
        kinds: set[str] = (
            set(layers) if layers else {SLIDING} if window is not None else {CHUNKED} if chunk is not None else set()
        )
        sizes = {kind: size_of[kind] for kind in sorted(kinds) if kind in size_of}
        return cls(sizes, by_kind=bool(layers)) if any(sizes.values()) else None

    def masks(
        self, mask: torch.Tensor, queries: torch.Tensor, keys: torch.Tensor, dtype: torch.dtype | None
    ) -> torch.Tensor | dict[str, torch.Tensor]:
        """Return the mask for the model: one tensor (B, 1, Q, S), or one for each kind of layer.

        Args:
            mask: (B, S), 1 for real slots, or (B, 1, Q, S) bool.
            queries: (B, Q) positions of the queries.
            keys: (B, S) positions of the slots, the queries' own last.
            dtype: type of additive masks, or None for bool masks.
        """
        visible = causal_mask(mask, queries.shape[1])
        made = {kind: visible & self._near(kind, queries, keys) for kind in self.sizes}
        if dtype is not None:
            made = {kind: additive(one, dtype) for kind, one in made.items()}
        return made if self.by_kind else next(iter(made.values()))

    def _near(self, kind: str, queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        """Return which slots lie within the window of each query, broadcastable to (B, 1, Q, S)."""
        size, query, key = self.sizes[kind], queries[:, None, :, None], keys[:, None, None, :]
        if size is None:
            return torch.ones(1, 1, 1, 1, dtype=torch.bool, device=keys.device)
        return query - key < size if kind == SLIDING else query // size == key // size
