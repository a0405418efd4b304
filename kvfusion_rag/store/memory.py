"""The memory tier: document KVs under a cap in bytes, the least recently used leaving first.

Knows neither models nor text. Safe from several threads; every operation is O(1) but for the entries it evicts.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from dataclasses import dataclass

from ..errors import InvalidInputError
from ..schema import DocumentKV

DEFAULT_MAX_BYTES = 1 << 30


@dataclass(frozen=True, slots=True)
class StoreStats:
    """Counts since the store was made; ``rejected`` are documents larger than the whole store."""

    entries: int
    bytes: int
    max_bytes: int
    hits: int
    misses: int
    evictions: int
    rejected: int


class MemoryStore:
    """Byte-capped LRU of document KVs.

    Args:
        max_bytes: cap on keys and values together, in bytes.
    """

    def __init__(self, max_bytes: int = DEFAULT_MAX_BYTES) -> None:
        if not isinstance(max_bytes, int) or max_bytes < 1:
            raise InvalidInputError(
                f"max_bytes is {max_bytes!r}, but it must be a whole number of bytes from 1; pass store=None to keep "
                "nothing."
            )
        self._max_bytes = max_bytes
        self._entries: OrderedDict[str, DocumentKV] = OrderedDict()
        self._lock = threading.Lock()
        self._bytes = self._hits = self._misses = self._evictions = self._rejected = 0

    def get(self, key: str, token_ids: tuple[int, ...]) -> DocumentKV | None:
        """The KV under ``key`` if it was made from exactly ``token_ids``, else ``None``."""
        with self._lock:
            found = self._entries.get(key)
            if found is None or found.token_ids != token_ids:
                self._misses += 1
                return None
            self._entries.move_to_end(key)
            self._hits += 1
            return found

    def put(self, key: str, document: DocumentKV) -> None:
        """Keep ``document``; one that is larger than the whole store is not kept, and counted."""
        with self._lock:
            if document.nbytes > self._max_bytes:
                self._rejected += 1
                return
            self._drop(key)
            self._entries[key] = document
            self._bytes += document.nbytes
            while self._bytes > self._max_bytes:
                self._drop(next(iter(self._entries)))
                self._evictions += 1

    def clear(self) -> None:
        """Drop everything."""
        with self._lock:
            self._entries.clear()
            self._bytes = 0

    def __repr__(self) -> str:
        return f"MemoryStore({len(self)} documents, {self._bytes:,} of {self._max_bytes:,} bytes)"

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, key: str) -> bool:
        """Whether ``key`` is kept; counts as no look-up."""
        return key in self._entries

    @property
    def stats(self) -> StoreStats:
        with self._lock:
            return StoreStats(
                len(self._entries),
                self._bytes,
                self._max_bytes,
                self._hits,
                self._misses,
                self._evictions,
                self._rejected,
            )

    def _drop(self, key: str) -> None:
        old = self._entries.pop(key, None)
        if old is not None:
            self._bytes -= old.nbytes
