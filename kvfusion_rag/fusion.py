"""RES: the documents' keys and values joined along the token axis (paper section 3.2, appendix code).

Rows of slots, allocated once, that documents are put into (or loaded straight into, from a file), and then one
transformers ``Cache`` over them with its mask. Knows nothing of text, models or stores. Document KVs are copied, never
kept or changed, so a store may hand out its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import DynamicCache, PretrainedConfig

from .schema import DocumentKV, KVShape


@dataclass(slots=True)
class FusedContext:
    """What a decoder reads before the question: cache of K slots per row, and mask (B, K) of the used ones.

    Decoding appends to the cache, so one context serves one decoding.
    """

    cache: DynamicCache
    mask: torch.Tensor


class FusedBuffer:
    """Slots for the documents of B rows, (L, B, H_kv, K, d) for keys and for values.

    Rows are as long as the longest; what is left on the right is zero and masked. A row without documents is all pad.

    Args:
        lengths: slots of each row.
        shape: of the model's KVs.
    """

    def __init__(self, lengths: Sequence[int], shape: KVShape, device: torch.device) -> None:
        slots = max(lengths)
        size = (shape.layers, len(lengths), shape.heads, slots, shape.width)
        self._keys, self._values = (torch.empty(size, dtype=shape.dtype, device=device) for _ in range(2))
        self._mask = torch.zeros(len(lengths), slots, dtype=torch.long, device=device)
        for row, length in enumerate(lengths):
            self._mask[row, :length] = 1
            self._keys[:, row, :, length:] = 0
            self._values[:, row, :, length:] = 0

    def slots(self, row: int, start: int, token_ids: tuple[int, ...]) -> DocumentKV:
        """The slots of a document from ``start`` on, to be filled; views of this buffer."""
        end = start + len(token_ids)
        return DocumentKV(self._keys[:, row, :, start:end], self._values[:, row, :, start:end], token_ids)

    def context(self, config: PretrainedConfig) -> FusedContext:
        """The filled slots as a cache for a model of ``config`` (its text configuration)."""
        cache = DynamicCache(config=config)
        if self._mask.shape[1]:
            for layer in range(self._keys.shape[0]):  # one at a time, since the cache makes a copy
                cache.update(self._keys[layer], self._values[layer], layer)
        return FusedContext(cache, self._mask)


def fuse(rows: Sequence[Sequence[DocumentKV]], config: PretrainedConfig, device: torch.device) -> FusedContext:
    """Join the document KVs of each row (one row a question), in the order given.

    Args:
        rows: B sequences of document KVs, each (L, H_kv, T_i, d); a shared prefix goes first, like a document.
        config: text configuration of the model that will read the cache.
        device: where the document KVs are.
    """
    first = next((kv for row in rows for kv in row), None)
    shape = KVShape(0, 0, 0, torch.float32) if first is None else KVShape.of(first)
    buffer = FusedBuffer([sum(kv.num_tokens for kv in row) for row in rows], shape, device)
    for number, row in enumerate(rows):
        start = 0
        for kv in row:
            kv.copy_into(buffer.slots(number, start, kv.token_ids))
            start += kv.num_tokens
    return buffer.context(config)
