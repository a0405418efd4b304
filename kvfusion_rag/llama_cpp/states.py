"""The state of a sequence as llama.cpp saves and restores it, and as a document's KV.

The bytes are: a magic number and the sequence; the number of streams and cells; position and sequences of each cell;
then for keys and for values of each layer the type, the bytes of a cell's row, and the rows (``llama_kv_cache::
state_write`` of llama.cpp, flash attention on, so that values are not transposed). A row is kept as it is: one head as
wide as all heads together. Rows of a quantised cache are kept as bytes.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from ..errors import UnsupportedModelError
from ..model.kv import DocumentKV, KVShape

MAGIC = 0xAF143CD8
_CELL = np.dtype([("position", "<i4"), ("sequences", "<u4"), ("sequence", "<i4")])
_HEAD, _PARTS, _ROWS = struct.Struct("<IiII"), struct.Struct("<II"), struct.Struct("<iQ")


@dataclass(frozen=True, slots=True)
class Layout:
    """What is the same in all states of a context.

    Attributes:
        layers: number of layers.
        key_type, value_type: ggml's numbers of the types in the cache.
        key_bytes, value_bytes: bytes of one cell's row in a layer.
        dtype: torch dtype that rows are kept in: their own, or uint8 for quantised rows.
    """

    layers: int
    key_type: int
    value_type: int
    key_bytes: int
    value_bytes: int
    dtype: torch.dtype

    @property
    def shape(self) -> KVShape:
        width = self.dtype.itemsize
        return KVShape(self.layers, 1, self.key_bytes // width, self.value_bytes // width, self.dtype)

    @classmethod
    def of(cls, state: memoryview, dtype: torch.dtype, name: str) -> Layout:
        """Read the layout of a state.

        Raises:
            UnsupportedModelError: the layers' rows differ, or the state has another structure.
        """
        rows, at = [], _skip_cells(state, name)
        transposed, layers = _PARTS.unpack_from(state, at)
        cells = cells_of(state)
        at += _PARTS.size
        for _ in range(2 * layers):
            rows.append(_ROWS.unpack_from(state, at))
            at += _ROWS.size + rows[-1][1] * cells
        keys, values = set(rows[:layers]), set(rows[layers:])
        if transposed or at != len(state) or len(keys) != 1 or len(values) != 1:
            raise UnsupportedModelError(
                f"{name!r} cannot be fused by llama.cpp, because its layers keep keys and values of different sizes; "
                "engine='torch' may accept it."
            )
        (key_type, key_bytes), (value_type, value_bytes) = keys.pop(), values.pop()
        return cls(layers, key_type, value_type, key_bytes, value_bytes, dtype)

    def unpack(self, state: memoryview, token_ids: tuple[int, ...], *, skip: int) -> DocumentKV:
        """Return copies of the rows of a state, without its first ``skip`` cells."""
        cells = skip + len(token_ids)
        kv = self.shape.empty(token_ids)
        at = _HEAD.size + cells * _CELL.itemsize + _PARTS.size
        for part, width in ((kv.keys, self.key_bytes), (kv.values, self.value_bytes)):
            rows = part.view(torch.uint8).numpy().reshape(self.layers, len(token_ids), width)
            for layer in range(self.layers):
                at += _ROWS.size
                found = np.frombuffer(state, np.uint8, cells * width, at).reshape(cells, width)
                rows[layer] = found[skip:]
                at += cells * width
        return kv

    def pack(
        self, keys: Iterable[torch.Tensor], values: Iterable[torch.Tensor], positions: Sequence[int]
    ) -> np.ndarray:
        """Return the state of a sequence as bytes (N,), uint8.

        Args:
            keys, values: rows (T, d) of each layer.
            positions: (T,) position of every cell.
        """
        cells = len(positions)
        meta = np.zeros(cells, _CELL)
        meta["position"], meta["sequences"] = positions, 1
        sizes = [self.layers * (_ROWS.size + cells * width) for width in (self.key_bytes, self.value_bytes)]
        at = _HEAD.size + meta.nbytes + _PARTS.size
        state = np.empty(at + sum(sizes), np.uint8)
        _HEAD.pack_into(state.data, 0, MAGIC, 0, 1, cells)
        state[_HEAD.size : at - _PARTS.size] = meta.view(np.uint8)
        _PARTS.pack_into(state.data, at - _PARTS.size, 0, self.layers)
        kinds = ((self.key_type, self.key_bytes, keys), (self.value_type, self.value_bytes, values))
        for kind, width, tensors in kinds:
            for rows in tensors:
                _ROWS.pack_into(state.data, at, kind, width)
                at += _ROWS.size
                state[at : at + cells * width].reshape(cells, width)[:] = rows.view(torch.uint8).numpy()
                at += cells * width
        return state


def cells_of(state: memoryview) -> int:
    """Return the number of cells in a state."""
    return _HEAD.unpack_from(state)[3]


def _skip_cells(state: memoryview, name: str) -> int:
    """Return where the cells of a state end."""
    magic, _, streams, cells = _HEAD.unpack_from(state)
    if magic != MAGIC or streams != 1 or not cells:
        raise UnsupportedModelError(f"the installed llama.cpp saves the state of {name!r} in an unknown format.")
    return _HEAD.size + cells * _CELL.itemsize
