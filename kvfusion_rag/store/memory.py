"""The memory tier: document KVs under byte caps, with eviction of the least recently used.

It does not know about models or text. It is thread-safe. Apart from evictions, and removals that look at all keys
of a namespace once, every operation takes constant time.
"""

from __future__ import annotations

from collections import OrderedDict, defaultdict

import torch

from ..model.forks import fork_safe_lock
from ..model.kv import DocumentKV
from ..option_names import check_option_names
from .keys import document_part, namespace_part
from .size_limits import Caps

DEFAULT_MAX_BYTES = 1 << 30


class MemoryStore:
    """Document KVs in memory, with least-recently-used eviction.

    Args:
        max_bytes: cap on keys and values together, in bytes.
        namespace_bytes: cap on each namespace. With it, a full store evicts documents of the writer's own namespace
            first, and those of others only if none is left.
        host: keep KVs in page-locked host memory, which a GPU reads directly. By default they stay on the device
            that computed them.

    Raises:
        InvalidInputError: a cap is not a whole number from 1.
    """

    @check_option_names()
    def __init__(
        self, max_bytes: int = DEFAULT_MAX_BYTES, *, namespace_bytes: int | None = None, host: bool = False
    ) -> None:
        self.caps = Caps(max_bytes, namespace_bytes)
        self.host = host
        # Both are ordered by last use.
        self._entries: OrderedDict[str, DocumentKV] = OrderedDict()
        self._by_namespace: defaultdict[str, OrderedDict[str, None]] = defaultdict(OrderedDict)
        self._sizes: defaultdict[str, int] = defaultdict(int)  # bytes by namespace
        self._lock = fork_safe_lock()
        self.used_bytes = self.evictions = self.rejected = 0

    def __repr__(self) -> str:
        return f"MemoryStore({len(self)} documents, {self.used_bytes:,} of {self.caps.max_bytes:,} bytes)"

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, key: str) -> bool:
        """Return whether ``key`` is stored. This does not count as a lookup."""
        return key in self._entries

    def get(self, key: str, token_ids: tuple[int, ...]) -> DocumentKV | None:
        """Return the KV of ``key`` if it was computed from exactly ``token_ids``, otherwise None."""
        with self._lock:
            document = self._entries.get(key)
            if document is None or document.token_ids != token_ids:
                return None
            self._entries.move_to_end(key)
            self._by_namespace[namespace_part(key)].move_to_end(key)
            return document

    def put(self, key: str, document: DocumentKV) -> bool:
        """Store ``document`` and return True, or count it as rejected and return False if it is larger than a cap."""
        stored = _on_host(document) if self.host else document
        namespace = namespace_part(key)
        with self._lock:
            self._drop(key)
            if stored.nbytes > self.caps.largest:
                self.rejected += 1
                return False
            self._make_room(stored.nbytes, namespace)
            self._entries[key] = stored
            self._by_namespace[namespace][key] = None
            self.used_bytes += stored.nbytes
            self._sizes[namespace] += stored.nbytes
            return True

    def forget(self, *keys: str) -> int:
        """Remove the documents of ``keys`` under every model. Return the number of removed entries."""
        documents = {document_part(key) for key in keys}
        namespaces = {namespace_part(document) for document in documents}
        with self._lock:
            own = [key for namespace in namespaces for key in self._by_namespace.get(namespace, ())]
            return self._drop_all([key for key in own if document_part(key) in documents])

    def clear(self, namespace_key: str | None = None) -> int:
        """Remove all entries, or those of one namespace (its key). Return the number of removed entries."""
        with self._lock:
            keys = self._entries if namespace_key is None else self._by_namespace.get(namespace_key, ())
            return self._drop_all(list(keys))

    def _make_room(self, size: int, namespace: str) -> None:
        """Evict the least recently used entries until ``size`` bytes fit under the caps, as in a disk store."""
        caps = self.caps
        if caps.namespace_bytes:
            own = self._by_namespace[namespace]
            while own and (self.used_bytes + size > caps.max_bytes or self._sizes[namespace] + size > caps.largest):
                self._evict(next(iter(own)))
        while self.used_bytes + size > caps.max_bytes:
            self._evict(next(iter(self._entries)))

    def _evict(self, key: str) -> None:
        self._drop(key)
        self.evictions += 1

    def _drop_all(self, keys: list[str]) -> int:
        for key in keys:
            self._drop(key)
        return len(keys)

    def _drop(self, key: str) -> None:
        old = self._entries.pop(key, None)
        if old is not None:
            namespace = namespace_part(key)
            self.used_bytes -= old.nbytes
            self._sizes[namespace] -= old.nbytes
            del self._by_namespace[namespace][key]
            if not self._by_namespace[namespace]:
                del self._by_namespace[namespace], self._sizes[namespace]


def _on_host(document: DocumentKV) -> DocumentKV:
    """Return a copy in page-locked memory if there is a GPU, otherwise a document on the CPU unchanged."""
    if document.keys.device.type == "cpu" and not torch.cuda.is_available():
        return document
    keys, values = (
        torch.empty(part.shape, dtype=part.dtype, pin_memory=torch.cuda.is_available()).copy_(part)
        for part in (document.keys, document.values)
    )
    return DocumentKV(keys, values, document.token_ids)
