"""RES: the documents' keys and values joined along the token axis (paper section 3.2, appendix code).

Turns per-document tensors into one transformers ``Cache`` and the mask over its slots. Knows nothing of
text, models or stores. Document KVs are copied, never kept or changed, so a store may hand out its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import DynamicCache, PretrainedConfig

from .schema import DocumentKV


@dataclass(slots=True)
class FusedContext:
    """What a decoder reads before the question: cache of K slots per row, and mask (B, K) of the used ones.

    Decoding appends to the cache, so one context serves one decoding.
    """

    cache: DynamicCache
    mask: torch.Tensor


def fuse(rows: Sequence[Sequence[DocumentKV]], config: PretrainedConfig, device: torch.device) -> FusedContext:
    """Join the document KVs of each row (one row a question), in the order given.

    Rows are padded on the right to the longest; padded slots are masked. A row without documents is all pad.

    Args:
        rows: B sequences of document KVs, each (L, H_kv, T_i, d); a shared prefix goes first, like a document.
        config: text configuration of the model that will read the cache.
        device: where an all-empty mask is made; document KVs are already there.
    """
    lengths = [sum(kv.num_tokens for kv in row) for row in rows]
    slots = max(lengths)
    mask = torch.zeros(len(rows), slots, dtype=torch.long, device=device)
    for row, length in enumerate(lengths):
        mask[row, :length] = 1
    if slots == 0:
        return FusedContext(DynamicCache(config=config), mask)
    cache = DynamicCache(config=config)
    layers = next(kv for row in rows for kv in row).keys.shape[0]
    for layer in range(layers):  # one at a time, since the cache makes a copy
        keys = _join([[kv.keys[layer] for kv in row] for row in rows], slots)
        values = _join([[kv.values[layer] for kv in row] for row in rows], slots)
        cache.update(keys, values, layer)
    return FusedContext(cache, mask)


def _join(rows: Sequence[Sequence[torch.Tensor]], slots: int) -> torch.Tensor:
    """Rows of (H_kv, T_i, d) tensors -> (B, H_kv, slots, d), zeros where a row is shorter."""
    like = next(tensor for row in rows for tensor in row)
    joined = like.new_zeros(len(rows), like.shape[0], slots, like.shape[2])
    for row, tensors in enumerate(rows):
        start = 0
        for tensor in tensors:
            joined[row, :, start : start + tensor.shape[1]] = tensor
            start += tensor.shape[1]
    return joined
