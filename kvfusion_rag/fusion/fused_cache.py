"""RES: joins the documents' keys and values along the token axis (paper section 3.2, appendix code).

A buffer of slots is allocated once. Documents are copied into it, or loaded from a file directly into it. Free slots
behind them take the question and the answer. A transformers ``Cache`` reads it in place.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import InitVar, dataclass, field
from typing import Any

import torch
from transformers.cache_utils import DynamicLayer

from ..model.document_cache import PositionedCache
from ..model.kv import DocumentKV, KVShape

MAX_OVERSIZE = 8  # reuse pooled memory up to this multiple of the needed size


class FusedLayer(DynamicLayer):
    """One layer's slots (B, H_kv, S, d). The first ones are used, and new tokens are written behind them in place.

    If the free slots are used up, everything is copied into larger memory. With gradients on, every update copies,
    because autograd does not allow writing in place.
    """

    def __init__(self, keys: torch.Tensor, values: torch.Tensor, used: int) -> None:
        super().__init__()  # pyright: ignore[reportUnknownMemberType]
        self.dtype, self.device, self.is_initialized = keys.dtype, keys.device, True
        self._memory = keys, values
        self._show(used)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if torch.is_grad_enabled():
            self._memory = super().update(key_states, value_states)  # pyright: ignore[reportUnknownMemberType]
            return self._show(self._memory[0].shape[2])
        used, end = self._used, self._used + key_states.shape[2]
        if end > self._memory[0].shape[2]:
            keys, values = self._memory
            self._memory = _larger(keys[:, :, :used], end), _larger(values[:, :, :used], end)
        for memory, states in zip(self._memory, (key_states, value_states), strict=True):
            memory[:, :, used:end] = states
        return self._show(end)

    @property
    def states(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of the used slots."""
        return self._show(self._used)

    def keep(self, rows: Sequence[int]) -> None:
        """Keep only these rows. The i-th must be at least i (:meth:`FusedContext.keep`)."""
        for to, row in enumerate(rows):
            if to != row:
                for memory in self._memory:
                    memory[to, :, : self._used] = memory[row, :, : self._used]
        keys, values = self._memory
        self._memory = keys[: len(rows)], values[: len(rows)]
        self._show(self._used)

    def _show(self, used: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Mark the first ``used`` slots as used and return views of them."""
        self._used = used
        self.keys, self.values = (memory[:, :, :used] for memory in self._memory)
        return self.keys, self.values


def _larger(used: torch.Tensor, slots: int) -> torch.Tensor:
    """Return memory for 1.5 times ``slots`` that begins with a copy of the used slots."""
    rows, heads, length, width = used.shape
    memory = used.new_empty(rows, heads, slots + slots // 2, width)
    memory[:, :, :length] = used
    return memory


@dataclass(slots=True)
class FusedContext:
    """The cache that a decoder reads before the question: K slots per row, and the mask (B, K) of the used ones.

    Decoding appends to the cache, so a context serves one decoding.

    Args:
        positions: (B, K) positions of the slots.
    """

    layers: list[FusedLayer]
    mask: torch.Tensor
    positions: InitVar[torch.Tensor]
    cache: PositionedCache = field(init=False)

    def __post_init__(self, positions: torch.Tensor) -> None:
        self.cache = PositionedCache(positions, self.layers)

    def keep(self, rows: Sequence[int]) -> None:
        """Keep only these rows, in this order, moving as few as possible.

        Args:
            rows: distinct rows. The i-th must be at least i, so that no row is overwritten before it has moved.
        """
        for layer in self.layers:
            layer.keep(rows)
        self.cache.keep_positions(rows)
        self.mask = self.mask[rows]


class FusedBuffer:
    """Slots for the documents of B rows, (L, B, H_kv, K, d) for keys, d_v for values, and free slots behind them.

    All rows are as long as the longest. Slots on the right that a row does not need are zero and masked.

    Args:
        lengths: document slots of each row.
        shape: shape of the model's KVs.
        room: free slots behind the documents, for questions and answers.
        pool: source of the memory, to which :meth:`release` returns it.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        shape: KVShape,
        device: torch.device,
        *,
        room: int = 0,
        pool: BufferPool | None = None,
    ) -> None:
        self._slots = max(lengths)
        grid = (shape.layers, len(lengths), shape.heads, self._slots + room)
        sizes = [torch.Size((*grid, width)) for width in (shape.key_width, shape.value_width)]
        numbers = [size.numel() for size in sizes]
        self._pool = pool or BufferPool()
        self._memory = self._pool.take(sum(numbers), shape.dtype, device)
        parts = torch.split(self._memory[: sum(numbers)], numbers)
        self._keys, self._values = (part.view(size) for part, size in zip(parts, sizes, strict=True))
        self._mask = torch.zeros(len(lengths), self._slots, dtype=torch.long, device=device)
        self._positions = torch.zeros_like(self._mask)
        for row, length in enumerate(lengths):
            self._mask[row, :length] = 1
            for part in (self._keys, self._values):
                part[:, row, :, length : self._slots] = 0

    def slots(self, row: int, start: int, token_ids: tuple[int, ...], position: int) -> DocumentKV:
        """Return the slots of a document from ``start`` on, as views to be filled.

        Args:
            position: position of the document's first token.
        """
        end = start + len(token_ids)
        self._positions[row, start:end] = torch.arange(position, position + len(token_ids), device=self._mask.device)
        return DocumentKV(self._keys[:, row, :, start:end], self._values[:, row, :, start:end], token_ids)

    def context(self) -> FusedContext:
        """Return the filled slots as a cache over views of this buffer."""
        layers = zip(self._keys, self._values, strict=True)
        fused = [FusedLayer(keys, values, self._slots) for keys, values in layers]
        return FusedContext(fused, self._mask, self._positions)

    def release(self) -> None:
        """Return the memory to the pool; views of this buffer must not be used afterwards."""
        self._pool.put(self._memory)


class BufferPool:
    """Memory of the last fused context, reused for the next one because fresh pages are slow to allocate.

    Keeps one block, on CPUs only: torch pools accelerator memory itself. A deque needs no lock, which could
    deadlock after a fork or in the garbage collector.
    """

    def __init__(self) -> None:
        self._kept: deque[torch.Tensor] = deque(maxlen=1)

    def take(self, numbers: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """Return uninitialised memory (N,) for at least ``numbers`` numbers."""
        with suppress(IndexError):
            memory = self._kept.pop()
            if numbers <= len(memory) <= MAX_OVERSIZE * numbers and memory.dtype == dtype:
                return memory
        with torch.inference_mode(False):  # inference tensors could not be used outside a caller's inference mode
            return torch.empty(numbers, dtype=dtype, device=device)

    def put(self, memory: torch.Tensor) -> None:
        """Keep memory that is no longer in use."""
        if memory.device.type == "cpu":
            self._kept.append(memory)

    def clear(self) -> int:
        """Free the kept memory and return the number of bytes freed."""
        with suppress(IndexError):
            return self._kept.pop().nbytes
        return 0


def fuse(
    rows: Sequence[Sequence[DocumentKV]], device: torch.device, prefixes: Sequence[DocumentKV | None] | None = None
) -> FusedContext:
    """Join the document KVs of each row in the given order, at the positions behind the row's prefix.

    Args:
        rows: B sequences of document KVs, each (L, H_kv, T_i, d).
        device: device of the document KVs.
        prefixes: KV in front of each row, or None. Default: no prefix.
    """
    heads = prefixes or [None] * len(rows)
    joined = [[*([] if head is None else [head]), *row] for head, row in zip(heads, rows, strict=True)]
    first = next((kv for row in joined for kv in row), None)
    shape = KVShape(0, 0, 0, 0, torch.float32) if first is None else KVShape.of(first)
    buffer = FusedBuffer([sum(kv.num_tokens for kv in row) for row in joined], shape, device)
    for number, (head, row) in enumerate(zip(heads, joined, strict=True)):
        start = 0
        for kv in row:
            position = 0 if head is None or kv is head else head.num_tokens
            kv.copy_into(buffer.slots(number, start, kv.token_ids, position))
            start += kv.num_tokens
    return buffer.context()
