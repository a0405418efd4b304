"""The memory tier: document KVs under a cap in bytes, the least recently used leaving first.

Knows neither models nor text. Safe from several threads; every operation is O(1) but for the entries it evicts,
and for removals, which look at all keys once.
"""

from __future__ import annotations

import threading
from collections import OrderedDict, defaultdict
from collections.abc import Callable
from dataclasses import dataclass

import torch

from ..errors import InvalidInputError
from ..model.kv import DocumentKV
from .keys import document_part

DEFAULT_MAX_BYTES = 1 << 30


@dataclass(frozen=True, slots=True)
class StoreStats:
    """Counts since the store was made; ``rejected`` are documents that found no room."""

    entries: int
    bytes: int
    max_bytes: int
    hits: int
    misses: int
    evictions: int
    rejected: int
    pinned: int = 0


class MemoryStore:
    """Byte-capped LRU of document KVs.

    Args:
        max_bytes: cap on keys and values together, in bytes.
        namespace_bytes: cap on each namespace. With it, a document that finds the store full lets those of its own
            namespace leave first, and another's only when none of its own is left.
        host: keep KVs in page-locked host memory, from where a GPU reads them by itself; by default they stay on
            the device that made them.
    """

    def __init__(
        self, max_bytes: int = DEFAULT_MAX_BYTES, *, namespace_bytes: int | None = None, host: bool = False
    ) -> None:
        for name, value in (("max_bytes", max_bytes), ("namespace_bytes", namespace_bytes)):
            allowed = value is None and name == "namespace_bytes"
            if not allowed and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
                raise InvalidInputError(
                    f"{name} is {value!r}, but it must be a whole number of bytes from 1; pass store=None to keep "
                    "nothing."
                )
        self._max_bytes, self._namespace_bytes, self._host = max_bytes, namespace_bytes, host
        # Entries by namespace in the order of their use, and all of them in the order of theirs.
        self._entries: OrderedDict[str, DocumentKV] = OrderedDict()
        self._of_namespace: defaultdict[str, OrderedDict[str, None]] = defaultdict(OrderedDict)
        self._pins: dict[str, int] = {}
        self._sizes: defaultdict[str, int] = defaultdict(int)
        self._lock = threading.Lock()
        self._bytes = self._hits = self._misses = self._evictions = self._rejected = 0

    def get(self, key: str, token_ids: tuple[int, ...], *, pin: bool = False) -> DocumentKV | None:
        """The KV under ``key`` if it was made from exactly ``token_ids``, else ``None``.

        Args:
            pin: it cannot leave until :meth:`unpin` is called as often.
        """
        with self._lock:
            found = self._entries.get(key)
            if found is None or found.token_ids != token_ids:
                self._misses += 1
                return None
            self._entries.move_to_end(key)
            self._of_namespace[_namespace(key)].move_to_end(key)
            self._hits += 1
            if pin:
                self._pins[key] = self._pins.get(key, 0) + 1
            return found

    def unpin(self, key: str) -> None:
        with self._lock:
            left = self._pins[key] - 1
            if left:
                self._pins[key] = left
            else:
                del self._pins[key]

    def put(self, key: str, document: DocumentKV) -> bool:
        """Keep ``document`` and say so; one that finds no room, for size or for pinned others, is counted instead."""
        kept = _on_host(document) if self._host else document
        with self._lock:
            if key in self._pins and key in self._entries:
                return True  # in use, and the same
            self._drop(key)
            namespace = _namespace(key)
            if not self._make_room(kept.nbytes, namespace):
                self._rejected += 1
                return False
            self._entries[key] = kept
            self._of_namespace[namespace][key] = None
            self._bytes += kept.nbytes
            self._sizes[namespace] += kept.nbytes
            return True

    def remove(self, wanted: Callable[[str], bool]) -> int:
        """Drop all entries whose key is wanted, pinned ones too (their readers keep what they hold)."""
        with self._lock:
            gone = [key for key in self._entries if wanted(key)]
            for key in gone:
                self._drop(key)
            return len(gone)

    def forget(self, *keys: str) -> int:
        """Drop the documents of ``keys`` under every model; how many entries that were."""
        documents = {document_part(key) for key in keys}
        return self.remove(lambda one: document_part(one) in documents)

    def clear(self, namespace_key: str | None = None) -> int:
        """Drop everything, or what one namespace (its key) has; how many entries that were."""
        return self.remove(lambda key: namespace_key is None or _namespace(key) == namespace_key)

    def __repr__(self) -> str:
        return f"MemoryStore({len(self)} documents, {self._bytes:,} of {self._max_bytes:,} bytes)"

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, key: str) -> bool:
        """Whether ``key`` is kept; counts as no look-up."""
        return key in self._entries

    @property
    def host(self) -> bool:
        """Whether KVs are kept in page-locked host memory."""
        return self._host

    @property
    def max_bytes(self) -> int:
        return self._max_bytes

    @property
    def namespace_bytes(self) -> int | None:
        return self._namespace_bytes

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
                len(self._pins),
            )

    def _make_room(self, size: int, namespace: str) -> bool:
        """Whether ``size`` more bytes fit under the caps, after the longest unused entries have left.

        Where namespaces have a cap, those of ``namespace`` leave first, as in a disk store.
        """
        own = self._max_bytes if self._namespace_bytes is None else min(self._namespace_bytes, self._max_bytes)
        if size > own:
            return False
        mine = self._of_namespace.get(namespace, OrderedDict[str, None]())
        for order in (mine, self._entries) if self._namespace_bytes else (self._entries,):
            skipped: set[str] = set()
            while self._bytes + size > self._max_bytes or (order is mine and self._held(namespace) + size > own):
                oldest = next(iter(order), None)
                if oldest is None or oldest in skipped:
                    break
                if oldest in self._pins:  # in use, so it counts as used now
                    order.move_to_end(oldest)
                    skipped.add(oldest)
                    continue
                self._drop(oldest)
                self._evictions += 1
        return self._bytes + size <= self._max_bytes and self._held(namespace) + size <= own

    def _held(self, namespace: str) -> int:
        return self._sizes.get(namespace, 0)

    def _drop(self, key: str) -> None:
        old = self._entries.pop(key, None)
        if old is not None:
            self._bytes -= old.nbytes
            namespace = _namespace(key)
            self._sizes[namespace] -= old.nbytes
            del self._of_namespace[namespace][key]
            if not self._of_namespace[namespace]:
                del self._of_namespace[namespace], self._sizes[namespace]


def _namespace(key: str) -> str:
    return key.partition("-")[0]


def _on_host(document: DocumentKV) -> DocumentKV:
    """A copy in page-locked memory, where there is a GPU that gains by it; on a CPU the document itself."""
    if document.keys.device.type == "cpu" and not torch.cuda.is_available():
        return document
    keys, values = (
        torch.empty(part.shape, dtype=part.dtype, pin_memory=torch.cuda.is_available()).copy_(part)
        for part in (document.keys, document.values)
    )
    return DocumentKV(keys, values, document.token_ids)
