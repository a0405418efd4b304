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
    some = next(kv for row in rows for kv in row)
    keys = _join([[kv.keys for kv in row] for row in rows], slots, some.keys)
    values = _join([[kv.values for kv in row] for row in rows], slots, some.values)
    cache = DynamicCache(config=config)
    for layer, (layer_keys, layer_values) in enumerate(zip(keys, values, strict=True)):
        cache.update(layer_keys, layer_values, layer)
    return FusedContext(cache, mask)


def _join(rows: Sequence[Sequence[torch.Tensor]], slots: int, like: torch.Tensor) -> torch.Tensor:
    """Rows of (L, H_kv, T_i, d) tensors -> (L, B, H_kv, slots, d), zeros where a row is shorter."""
    layers, heads, _, dim = like.shape
    joined = like.new_zeros(layers, len(rows), heads, slots, dim)
    for row, tensors in enumerate(rows):
        start = 0
        for tensor in tensors:
            joined[:, row, :, start : start + tensor.shape[2]] = tensor
            start += tensor.shape[2]
    return joined
