"""RES: the documents' keys and values joined along the token axis (paper section 3.2, appendix code).

Rows of slots, allocated once, that documents are put into (or loaded straight into, from a file), with room behind
them for what is read and written next; and one transformers ``Cache`` over them with its mask. Knows nothing of text,
models or stores. Document KVs are copied, never kept or changed, so a store may hand out its own.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from ..model.kv import DocumentKV, KVShape

MOST_SPARE = 8  # times the memory that is needed, up to which a kept piece serves


class FusedLayer(DynamicLayer):
    """One layer's slots (B, H_kv, S, d), of which the first are used; new ones go into the room behind, in place.

    Where the room is used up, everything moves to a larger place; so it does where a gradient has to flow, which
    nothing that is written over can carry.
    """

    def __init__(self, keys: torch.Tensor, values: torch.Tensor, used: int) -> None:
        super().__init__()
        self.dtype, self.device, self.is_initialized = keys.dtype, keys.device, True
        self._place = keys, values
        self.show(used)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if torch.is_grad_enabled():
            self._place = super().update(key_states, value_states)
            return self.show(self._place[0].shape[2])
        used, end = self._used, self._used + key_states.shape[2]
        if end > self._place[0].shape[2]:
            keys, values = self._place
            self._place = _larger(keys[:, :, :used], end), _larger(values[:, :, :used], end)
        for place, states in zip(self._place, (key_states, value_states), strict=True):
            place[:, :, used:end] = states
        return self.show(end)

    def keep(self, rows: Sequence[int]) -> None:
        """Drop all rows but these; none may stand further behind than it stood (``FusedContext.keep``)."""
        for to, row in enumerate(rows):
            if to != row:
                for place in self._place:
                    place[to, :, : self._used] = place[row, :, : self._used]
        keys, values = self._place
        self._place = keys[: len(rows)], values[: len(rows)]
        self.show(self._used)

    @property
    def used(self) -> int:
        return self._used

    @property
    def slots(self) -> int:
        return self._place[0].shape[2]

    def show(self, used: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Count the first ``used`` slots as used."""
        self._used = used
        self.keys, self.values = (place[:, :, :used] for place in self._place)
        return self.keys, self.values


def _larger(used: torch.Tensor, slots: int) -> torch.Tensor:
    """A place for ``slots`` and half as many more, that begins with what is used already."""
    rows, heads, length, width = used.shape
    place = used.new_empty(rows, heads, slots + slots // 2, width)
    place[:, :, :length] = used
    return place


@dataclass(slots=True)
class FusedContext:
    """What a decoder reads before the question: cache of K slots per row, and mask (B, K) of the used ones.

    Decoding appends to the cache, so one context serves one decoding.
    """

    layers: list[FusedLayer]
    mask: torch.Tensor
    cache: DynamicCache = field(init=False)

    def __post_init__(self) -> None:
        self.cache = DynamicCache()
        self.cache.layers.extend(self.layers)

    @property
    def used(self) -> int:
        """Slots of a row that have been written, pads among them."""
        return self.layers[0].used

    @property
    def slots(self) -> int:
        """Slots that a row has memory for."""
        return self.layers[0].slots

    @property
    def room(self) -> int:
        """Slots that can be written before everything has to move."""
        return self.slots - self.used

    def keep(self, rows: Sequence[int]) -> None:
        """Drop all rows but these, in this order, by moving as few as possible.

        Args:
            rows: distinct; the i-th is i or above, so that no row is written over before it has moved.
        """
        for layer in self.layers:
            layer.keep(rows)
        self.mask = self.mask[rows]


class FusedBuffer:
    """Slots for the documents of B rows, (L, B, H_kv, K, d) for keys and for values, and room behind them.

    Rows are as long as the longest; what is left on the right is zero and masked. A row without documents is all pad.

    Args:
        lengths: slots of each row.
        shape: of the model's KVs.
        room: slots behind the documents, for questions and answers.
        pool: where memory is taken from, and given back to by :meth:`release`.
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
        size = (shape.layers, len(lengths), shape.heads, self._slots + room, shape.width)
        self._pool = pool or BufferPool()
        self._memory = self._pool.take(2 * torch.Size(size).numel(), shape.dtype, device)
        self._keys, self._values = self._memory[: 2 * torch.Size(size).numel()].view(2, *size)
        self._mask = torch.zeros(len(lengths), self._slots, dtype=torch.long, device=device)
        for row, length in enumerate(lengths):
            self._mask[row, :length] = 1
            for part in (self._keys, self._values):
                part[:, row, :, length : self._slots] = 0

    def slots(self, row: int, start: int, token_ids: tuple[int, ...]) -> DocumentKV:
        """The slots of a document from ``start`` on, to be filled; views of this buffer."""
        end = start + len(token_ids)
        return DocumentKV(self._keys[:, row, :, start:end], self._values[:, row, :, start:end], token_ids)

    def context(self) -> FusedContext:
        """The filled slots as a cache; views of this buffer."""
        layers = zip(self._keys, self._values, strict=True)
        return FusedContext([FusedLayer(keys, values, self._slots) for keys, values in layers], self._mask)

    def release(self) -> None:
        """Give the memory back for the next buffer; nothing made of this one may be used any more."""
        self._pool.give(self._memory)


class BufferPool:
    """Memory of the last fused context, kept for the next one: the system takes long to hand out fresh pages.

    One piece at most, and none that is much larger than was needed last. On accelerators nothing is kept, since torch
    keeps there what it frees itself. A deque takes and gives in one step, so there is no lock that a fork or the
    garbage collector could meet.
    """

    def __init__(self) -> None:
        self._kept: deque[torch.Tensor] = deque(maxlen=1)

    def take(self, numbers: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """Memory for ``numbers`` numbers or more, (N,), with anything in it."""
        with suppress(IndexError):
            memory = self._kept.pop()
            if numbers <= len(memory) <= MOST_SPARE * numbers and memory.dtype == dtype:
                return memory
        with torch.inference_mode(False):  # what is made under a caller's inference mode could never leave it
            return torch.empty(numbers, dtype=dtype, device=device)

    def give(self, memory: torch.Tensor) -> None:
        """Take memory back that nothing uses any more."""
        if memory.device.type == "cpu":
            self._kept.append(memory)

    def clear(self) -> int:
        """Let go of what is kept; how many bytes that were."""
        with suppress(IndexError):
            return self._kept.pop().nbytes
        return 0


def fuse(rows: Sequence[Sequence[DocumentKV]], device: torch.device) -> FusedContext:
    """Join the document KVs of each row (one row a question), in the order given.

    Args:
        rows: B sequences of document KVs, each (L, H_kv, T_i, d); a shared prefix goes first, like a document.
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
    return buffer.context()
