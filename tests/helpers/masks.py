"""Attention masks with windows, made slot by slot, to compare with the package's own."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import PretrainedConfig

from kvfusion_rag.model.positions import additive, block_mask


def block_masks(
    config: PretrainedConfig,
    prefix: int,
    documents: Sequence[int],
    question: int,
    positions: torch.Tensor,
    dtype: torch.dtype | None = None,
) -> torch.Tensor | dict[str, torch.Tensor]:
    """Return the block mask of fusion as the model takes it: one (1, 1, S, S), or one per kind of layer.

    Args:
        prefix, documents, question: lengths.
        positions: (S,) position of each slot.
        dtype: type of additive masks, or None for bool masks.
    """
    full, at = block_mask(prefix, documents, question), positions.tolist()
    sliding, window = full.clone(), getattr(config, "sliding_window", None)
    for query in range(len(at)):
        for key in range(len(at)):
            sliding[query, key] &= window is None or at[query] - at[key] < window
    made = {"full_attention": full[None, None], "sliding_attention": sliding[None, None]}
    if dtype is not None:
        made = {kind: additive(mask, dtype) for kind, mask in made.items()}
    return made if getattr(config, "layer_types", None) else made["sliding_attention"]
