"""Keys and values of one document, and the shape that those of one model share.

Shape letters follow the project's glossary: L layers, H_kv key/value heads, T document tokens, d head dimension.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True, eq=False)
class DocumentKV:
    """Keys (already rotated) and values of one document, each of shape (L, H_kv, T, d).

    ``token_ids`` are the T ids that made them; a store compares them after a hit.
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
        """Write keys and values over those of ``other``, on whatever device."""
        other.keys.copy_(self.keys, non_blocking=True)
        other.values.copy_(self.values, non_blocking=True)

    def to(self, device: torch.device) -> DocumentKV:
        """A copy on ``device``."""
        return DocumentKV(self.keys.to(device), self.values.to(device), self.token_ids)


@dataclass(frozen=True, slots=True)
class KVShape:
    """What the KVs of all documents of one model have in common: L layers, H_kv heads of d numbers, and the dtype."""

    layers: int
    heads: int
    width: int
    dtype: torch.dtype

    @classmethod
    def of(cls, document: DocumentKV) -> KVShape:
        layers, heads, _, width = document.keys.shape
        return cls(layers, heads, width, document.keys.dtype)

    def nbytes(self, tokens: int) -> int:
        """Bytes of the keys and values of a document of ``tokens`` tokens."""
        return 2 * self.layers * self.heads * tokens * self.width * self.dtype.itemsize

    def empty(self, token_ids: tuple[int, ...]) -> DocumentKV:
        """A document KV on the CPU that is still to be filled."""
        size = (self.layers, self.heads, len(token_ids), self.width)
        return DocumentKV(torch.empty(size, dtype=self.dtype), torch.empty(size, dtype=self.dtype), token_ids)
