"""The document store: documents come from the fastest tier that has them, or are computed once and stored.

It does not know about models or text. The caller passes a function that computes missing documents.
"""

from __future__ import annotations

import hashlib
import os
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NoReturn

import torch

from ..errors import InvalidInputError, OverloadError
from ..home import home
from ..model.forks import ForkGuard
from ..model.kv import DocumentKV, KVShape
from .disk import DiskStore
from .format import Codec
from .keys import document_part, require_namespace_key
from .memory import MemoryStore
from .metrics import Counters, Miss, StoreEvent, StoreMetrics, Tier
from .remote import RemoteStore
from .single_flight import Pending, SingleFlight
from .tiers import Fetch, FetchedKVs, KVRequest, Tiers

READERS = min(4, os.cpu_count() or 1)  # threads, each of which keeps a processor busy with reading and checking
MAX_PREFETCHES = 256  # unfinished calls

Compute = Callable[[Sequence[str]], Iterable[tuple[str, DocumentKV]]]


class DocumentStore:
    """Document KVs in memory, on disk and in a remote folder, each tier optional.

    It is safe to use from several threads and processes. It cannot be pickled, so open it in each process.

    Args:
        memory, disk, remote: the tiers. A remote tier needs a disk tier in front of it.
        on_event: called with each :class:`StoreEvent`, from any thread.

    Raises:
        InvalidInputError: a remote tier has no disk tier with the same codec in front of it.
    """

    def __init__(
        self,
        memory: MemoryStore | None = None,
        disk: DiskStore | None = None,
        remote: RemoteStore | None = None,
        *,
        on_event: Callable[[StoreEvent], None] | None = None,
    ) -> None:
        self.memory, self.disk, self.remote = memory, disk, remote
        self._counters = Counters(on_event)
        self._tiers = Tiers(memory, disk, remote, self._counters)
        self._reset()
        self._fork_guard = ForkGuard()
        in_child = weakref.WeakMethod(self._reset)
        os.register_at_fork(after_in_child=lambda: (reset := in_child()) and reset())

    def _reset(self) -> None:
        """Start without threads, both in a new store and in a forked process, which lacks its parent's."""
        self._single_flight = SingleFlight()
        self._prefetches = threading.BoundedSemaphore(MAX_PREFETCHES)
        self._pools: dict[str, ThreadPoolExecutor] = {}
        self._pools_lock = threading.Lock()

    def __repr__(self) -> str:
        tiers = [tier for tier in (self.memory, self.disk, self.remote) if tier is not None]
        return f"DocumentStore({', '.join(map(repr, tiers))})"

    def __reduce__(self) -> NoReturn:
        raise TypeError("a document store has files and threads of this process; open it again in the other process.")

    def __contains__(self, key: str) -> bool:
        """Return whether a local tier has ``key``. This does not count as a lookup."""
        return self.tier_of(key) is not None

    def tier_of(self, key: str) -> Tier | None:
        """Return the fastest local tier that has ``key``, or None. This does not count as a lookup."""
        if self.memory is not None and key in self.memory:
            return "memory"
        return "disk" if self.disk is not None and key in self.disk else None

    def fetch(
        self, requests: Mapping[str, KVRequest], shape: KVShape, device: torch.device, compute: Compute,
        *, keep: bool = True,
    ) -> FetchedKVs:  # fmt: skip
        """Return all requested documents, from the fastest tier that has them, or computed and then stored.

        Wait for documents that another thread is fetching already.

        Args:
            requests: documents by store key.
            shape: shape of the model's KVs.
            device: device of the model's KVs.
            compute: prefills the documents of some keys, and yields each as soon as it is ready.
            keep: return the KVs. If False they only go to the tiers, so that memory is bounded by their caps.

        Raises:
            ForkedProcessError: this process was forked from one that used the store, and would hang.
        """
        self._fork_guard.require_threads()
        fetch = Fetch(requests, shape, device, self._tiers.watch(requests), keep)
        unstored = [key for key, request in requests.items() if not request.stored]
        for key, document in compute(unstored) if unstored else ():
            fetch.take(key, document, "computed")
        try:
            left = self._from_memory([key for key, request in requests.items() if request.stored], fetch)
            while left:
                claimed, pending = self._single_flight.claim(left)
                try:
                    # Another thread may have stored a document between the lookup and the claim.
                    absent = self._from_files(self._from_memory(claimed, fetch), fetch)
                    fetch.misses |= absent
                    fetch.events.extend(StoreEvent("miss", reason=miss) for miss in absent.values())
                    self._compute(list(absent), compute, fetch)
                finally:
                    self._single_flight.release(claimed)
                left = self._from_other_threads(pending, fetch)
        finally:
            self._counters.note_all(fetch.events)
        computed = {key: miss for key, miss in fetch.misses.items() if fetch.origins[key] == "computed"}
        return FetchedKVs(fetch.kvs, fetch.origins, computed)

    def prefetch(self, documents: Mapping[str, tuple[int, ...]], shape: KVShape, device: torch.device) -> Future[int]:
        """Begin to load documents from slower tiers into memory. The future returns how many are there in the end.

        Args:
            documents: token ids by store key.
            shape: shape of the model's KVs.
            device: device of the model's KVs.

        Raises:
            OverloadError: too many calls are unfinished.
            ForkedProcessError: this process was forked from one that used the store, and would hang.
        """
        self._fork_guard.require_threads()
        if not self._prefetches.acquire(blocking=False):
            raise OverloadError(f"{MAX_PREFETCHES} calls of prefetch are unfinished, which is the limit; retry later.")
        loading = self._pool("prefetch").submit(self._prefetch, documents, shape, device)
        loading.add_done_callback(lambda _: self._prefetches.release())
        return loading

    def forget(self, keys: Iterable[str]) -> int:
        """Remove documents, under every model, from every tier. Return the number of removed copies.

        Documents that this store is currently fetching are not kept either. Other processes keep what they have
        in memory, and may store again what they are computing.
        """
        return self._tiers.remove(list({document_part(key): key for key in keys}.values()))

    def clear(self, namespace_key: str | None = None) -> int:
        """Remove all documents of a namespace (its key), or all, from every tier. Return the number of removed copies.

        Raises:
            InvalidInputError: ``namespace_key`` is not a result of :func:`namespace_key`.
            StoreError: a tier cannot remove its documents. The other tiers have removed theirs.
        """
        if namespace_key is not None:
            require_namespace_key(namespace_key)
        return self._tiers.remove(None, namespace_key)

    def release_memory(self, device: torch.device) -> int:
        """Empty the memory tier if it holds memory of ``device``. Return the number of released bytes.

        Slower tiers keep their documents.
        """
        if self.memory is None or (self.memory.host and device.type != "cpu"):
            return 0
        held = self.memory.used_bytes
        self.memory.clear()
        return held

    def require_room(self, shape: KVShape, tokens: int) -> None:
        """Raise InvalidInputError if a tier's cap is smaller than one document with ``tokens`` tokens."""
        self._tiers.require_room(shape, tokens)

    @property
    def is_empty(self) -> bool:
        """Whether the store has no tier and therefore keeps nothing."""
        return self.memory is None and self.disk is None

    @property
    def metrics(self) -> StoreMetrics:
        """Counts since the store was opened."""
        return self._counters.snapshot(self._tiers.counts())

    def flush(self) -> bool:
        """Wait at most a minute for unfinished uploads to the remote tier. Return whether all have ended.

        Failed uploads are counted in the metrics.
        """
        return self.remote is None or self.remote.flush()

    def close(self) -> None:
        """Finish uploads within a minute, and release files and threads."""
        if self.remote is not None:
            self.remote.close()
        with self._pools_lock:
            pools, self._pools = self._pools, {}
        for pool in pools.values():
            pool.shutdown()
        if self.disk is not None:
            self.disk.close()

    def _prefetch(self, documents: Mapping[str, tuple[int, ...]], shape: KVShape, device: torch.device) -> int:
        memory, disk = self.memory, self.disk
        if memory is None or disk is None:
            return 0
        requests = {
            key: KVRequest(ids)
            for key, ids in documents.items()
            if key not in memory and (self.remote is not None or key in disk)
        }
        fetch = Fetch(requests, shape, device, self._tiers.watch(requests), keep=False)
        claimed, pending = self._single_flight.claim(requests)
        try:
            self._from_files(claimed, fetch)
        finally:
            self._single_flight.release(claimed)
            self._counters.note_all(fetch.events)
        for other in pending.values():
            other.result()
        return sum(key in memory for key in documents)

    def _from_memory(self, keys: Iterable[str], fetch: Fetch) -> list[str]:
        """Take the documents that are in memory. Return the keys of the others."""
        left: list[str] = []
        for key in keys:
            document = self._tiers.get_from_memory(key, fetch)
            if document is None:
                left.append(key)
            else:
                fetch.take(key, document, "memory")
        return left

    def _from_files(self, keys: Sequence[str], fetch: Fetch) -> dict[str, Miss]:
        """Take the documents that disk and remote have, in parallel. Return the reasons for the misses, in order."""

        def read(key: str) -> tuple[DocumentKV, Tier | Miss]:
            request = fetch.requests[key]
            into = request.into if fetch.device.type == "cpu" else None
            document = fetch.shape.empty(request.token_ids) if into is None else into
            return document, self._tiers.get_from_files(key, document, fetch)

        misses: dict[str, Miss] = {}
        results = map(read, keys) if len(keys) < 2 else self._pool("read").map(read, keys)
        for key, (document, result) in zip(keys, results, strict=True):
            if isinstance(result, Miss):
                misses[key] = result
                continue
            if document is not fetch.requests[key].into:
                document = self._tiers.put_in_memory(key, document, fetch)
                self._single_flight.resolve(key, document)
            elif self.memory is not None:
                # The caller may overwrite its slots later, so memory and other threads get a copy.
                copy = DocumentKV(document.keys.clone(), document.values.clone(), document.token_ids)
                self._single_flight.resolve(key, self._tiers.put_in_memory(key, copy, fetch))
            fetch.take(key, document, result)
        return misses

    def _from_other_threads(self, pending: Mapping[str, Pending], fetch: Fetch) -> list[str]:
        """Wait for the documents that other threads are fetching. Return the keys that they released."""
        left: list[str] = []
        for key, other in pending.items():
            document = other.result()
            if document is None:
                left.append(key)
                continue
            fetch.take(key, document, "memory")
            fetch.events.append(StoreEvent("hit", "memory", tokens=document.num_tokens))
        return left

    def _compute(self, keys: Sequence[str], compute: Compute, fetch: Fetch) -> None:
        """Compute documents, store them, and pass them to waiting threads."""
        if not keys:
            return
        began, tokens, seconds = time.perf_counter(), 0, 0.0
        for key, computed in compute(keys):
            if self.disk is not None and fetch.device.type != "cpu":
                torch.accelerator.synchronize(fetch.device)  # otherwise only kernel launches would be timed
            seconds += time.perf_counter() - began
            document = self._tiers.as_stored(computed)
            tokens += document.num_tokens
            fetch.take(key, document, "computed")
            self._tiers.put(key, document, fetch)
            self._single_flight.resolve(key, document)
            began = time.perf_counter()
        fetch.events.append(StoreEvent("computed", documents=len(keys), tokens=tokens, seconds=seconds))

    def _pool(self, use: str) -> ThreadPoolExecutor:
        """Return the threads for one use. Prefetches wait for reads, so they must not share threads."""
        with self._pools_lock:
            if use not in self._pools:
                self._pools[use] = ThreadPoolExecutor(READERS, thread_name_prefix=f"kvfusion-{use}")
            return self._pools[use]


Place = DocumentStore | MemoryStore | DiskStore | str | os.PathLike[str] | None


def as_store(place: Place) -> DocumentStore:
    """Return a document store for ``place``: "memory" (1 GiB), a folder, a URL, a tier, a store, or None for no store.

    Raises:
        InvalidInputError: ``place`` is none of these.
        StoreError: it cannot be opened.
    """
    match place:
        case DocumentStore():
            return place
        case None:
            return DocumentStore()
        case "memory" | MemoryStore():
            return DocumentStore(MemoryStore() if place == "memory" else place)
        case DiskStore():
            return DocumentStore(MemoryStore(), place)
        case str() | os.PathLike():
            return open_store(place)
    raise InvalidInputError(
        f"store is {place!r}, but it must be 'memory', a folder, a URL, a MemoryStore, DiskStore or DocumentStore, or "
        "None."
    )


def open_store(
    place: str | os.PathLike[str],
    *,
    memory: MemoryStore | None = None,
    local: str | os.PathLike[str] | None = None,
    remote: Mapping[str, Any] | None = None,
    read_only: bool = False,
    codec: Codec = "raw",
    **options: Any,
) -> DocumentStore:
    """Open the store in a folder or behind a URL, with a memory tier in front.

    Args:
        place: a folder, or an fsspec URL (``s3://bucket/folder``), which gets a local disk tier in front.
        memory: the memory tier (default: 1 GiB).
        local: folder of the local disk tier of a URL (default: a folder of its own in ``KVFUSION_HOME``).
        remote: options of :class:`RemoteStore` for a URL: max_bytes, wait, and what fsspec takes (credentials). They
            override ``read_only`` and ``codec``.
        read_only: never write to the folder or the URL. The local disk tier of a URL is still written.
        codec: codec of all files.
        options: passed to :class:`DiskStore`.

    Raises:
        InvalidInputError: an option is not allowed.
        StoreError: a tier cannot be opened.
    """
    memory = MemoryStore() if memory is None else memory
    text = os.fspath(place)
    if "://" not in text:
        if remote is not None:
            raise InvalidInputError(
                f"remote is given, but {text!r} is a folder; use it only with a URL such as s3://bucket/folder."
            )
        return DocumentStore(memory, DiskStore(text, codec=codec, read_only=read_only, **options))
    tier = RemoteStore(text, **{"codec": codec, "read_only": read_only, **(remote or {})})
    return DocumentStore(memory, DiskStore(local or _cache_folder(text), codec=codec, **options), tier)


def _cache_folder(url: str) -> Path:
    return home() / "store" / hashlib.sha256(url.encode()).hexdigest()[:16]
