"""Keys and values of one document, and the shape that all documents of one model share.

Shape letters: L layers, H_kv key/value heads, T document tokens, d width of a key, d_v width of a value. Both widths
are the head dimension, except in latent attention, where "keys" are latents and "values" are the rotary part of keys.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True, eq=False)
class DocumentKV:
    """Keys (already rotated) (L, H_kv, T, d) and values (L, H_kv, T, d_v) of one document.

    A store compares the T ``token_ids`` after a hit.
    """

    keys: torch.Tensor
    values: torch.Tensor
    token_ids: tuple[int, ...]

    @property
    def num_tokens(self) -> int:
        return self.keys.shape[2]

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values together."""
        return self.keys.nbytes + self.values.nbytes

    def copy_into(self, other: DocumentKV) -> None:
        """Overwrite keys and values of ``other``, which may be on another device."""
        other.keys.copy_(self.keys, non_blocking=True)
        other.values.copy_(self.values, non_blocking=True)

    def to(self, device: torch.device) -> DocumentKV:
        """Return a copy on ``device``."""
        return DocumentKV(self.keys.to(device), self.values.to(device), self.token_ids)


@dataclass(frozen=True, slots=True)
class KVShape:
    """Shape that all document KVs of one model share: L layers, H_kv heads, widths d and d_v, and the dtype."""

    layers: int
    heads: int
    key_width: int
    value_width: int
    dtype: torch.dtype

    @classmethod
    def of(cls, document: DocumentKV) -> KVShape:
        layers, heads, _, width = document.keys.shape
        return cls(layers, heads, width, document.values.shape[3], document.keys.dtype)

    def key_bytes(self, tokens: int) -> int:
        """Return the bytes of the keys of a document with this number of tokens."""
        return self.layers * self.heads * tokens * self.key_width * self.dtype.itemsize

    def value_bytes(self, tokens: int) -> int:
        """Return the bytes of the values of a document with this number of tokens."""
        return self.layers * self.heads * tokens * self.value_width * self.dtype.itemsize

    def nbytes(self, tokens: int) -> int:
        """Return the bytes of keys and values together."""
        return self.key_bytes(tokens) + self.value_bytes(tokens)

    def empty(self, token_ids: tuple[int, ...]) -> DocumentKV:
        """Return an uninitialized document KV on the CPU."""
        grid = (self.layers, self.heads, len(token_ids))
        keys, values = (torch.empty(*grid, width, dtype=self.dtype) for width in (self.key_width, self.value_width))
        return DocumentKV(keys, values, token_ids)
