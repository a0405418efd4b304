"""The document store: documents come from the fastest tier that has them, or are computed once and stored.

It does not know about models or text. The caller passes a function that computes missing documents.
"""

from __future__ import annotations

import logging
import os
import threading
import time
import weakref
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NoReturn

import torch

from ..errors import OverloadError, StoreError
from ..model.forks import ForkGuard
from ..model.kv import DocumentKV, KVShape
from ..option_names import check_option_names
from .disk import DiskStore
from .keys import document_part, require_namespace_key
from .memory import MemoryStore
from .metrics import Counters, Miss, StoreEvent, StoreMetrics, Tier, UploadReport
from .remote import RemoteStore
from .single_flight import Pending, SingleFlight
from .tiers import Computing, Fetch, FetchedKVs, KVRequest, Tiers

READERS = min(4, os.cpu_count() or 1)  # threads, each of which keeps a processor busy with reading and checking
MAX_PREFETCHES = 256  # unfinished calls
UPLOAD_PAUSES = (0.0, 1.0, 4.0)  # seconds before each attempt to store documents durably

logger = logging.getLogger(__name__)

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

    @check_option_names()
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
        *, keep: bool = True, computing: Computing | None = None,
    ) -> FetchedKVs:  # fmt: skip
        """Return all requested documents, from the fastest tier that has them, or computed and then stored.

        Wait for documents that another thread is fetching already.

        Args:
            requests: documents by store key.
            shape: shape of the model's KVs.
            device: device of the model's KVs.
            compute: prefills the documents of some keys, and yields each as soon as it is ready.
            keep: return the KVs. If False they only go to the tiers, so that memory is bounded by their caps, and the
                call waits while the queue of uploads is full.
            computing: where the documents are computed, and which computed elsewhere are accepted (default: all).

        Raises:
            ForkedProcessError: this process was forked from one that used the store, and would hang.
        """
        self._fork_guard.require_threads()
        fetch = Fetch(requests, shape, device, self._tiers.watch(requests), computing or Computing(), keep)
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

    def prefetch(
        self, documents: Mapping[str, tuple[int, ...]], shape: KVShape, device: torch.device,
        computing: Computing | None = None,
    ) -> Future[int]:  # fmt: skip
        """Begin to load documents from slower tiers into memory. The future returns how many are there in the end.

        Args:
            documents: token ids by store key.
            shape: shape of the model's KVs.
            device: device of the model's KVs.
            computing: which documents computed elsewhere are accepted (default: all).

        Raises:
            OverloadError: too many calls are unfinished.
            ForkedProcessError: this process was forked from one that used the store, and would hang.
        """
        self._fork_guard.require_threads()
        if not self._prefetches.acquire(blocking=False):
            raise OverloadError(f"{MAX_PREFETCHES} calls of prefetch are unfinished, which is the limit; retry later.")
        loading = self._pool("prefetch").submit(self._prefetch, documents, shape, device, computing or Computing())
        loading.add_done_callback(lambda _: self._prefetches.release())
        return loading

    def read(self, key: str, token_ids: tuple[int, ...], shape: KVShape) -> DocumentKV | None:
        """Return a document from disk or the remote tier, whichever environment computed it, or None."""
        document = shape.empty(token_ids)
        fetch = Fetch(
            {key: KVRequest(token_ids)}, shape, torch.device("cpu"), self._tiers.watch([key]), Computing(), keep=False
        )
        return None if isinstance(self._tiers.get_from_files(key, document, fetch), Miss) else document

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
        """Raise InvalidInputError if no document of ``shape`` with ``tokens`` tokens can be kept."""
        self._tiers.require_room(shape, tokens)

    @property
    def is_empty(self) -> bool:
        """Whether the store has no tier and therefore keeps nothing."""
        return self.memory is None and self.disk is None

    @property
    def metrics(self) -> StoreMetrics:
        """Counts since the store was opened."""
        return self._counters.snapshot(self._tiers.counts())

    def flush(self) -> UploadReport:
        """Wait at most a minute for unfinished uploads to the remote tier. Return what has become of the uploads since
        the last report; it is true if all documents are stored."""
        return UploadReport() if self.remote is None else self.remote.flush()

    @property
    def slowest_tier(self) -> DiskStore | RemoteStore | None:
        """The tier that keeps documents for other processes, or None if there is only memory. A disk in front of a
        remote tier is a cache."""
        return self.disk if self.remote is None else self.remote

    def missing(self, keys: Collection[str]) -> list[str]:
        """Return those of ``keys`` whose documents are not in the slowest tier now. Faster tiers do not count.

        Raises:
            StoreError: the remote tier fails or does not answer.
        """
        if self.remote is not None:
            return self.remote.missing(keys)
        return [key for key in keys if self.disk is None or key not in self.disk]

    def refill(self, documents: Mapping[str, tuple[int, ...]], environment: str) -> None:
        """Upload documents that a local tier has and the remote tier has lost. Skip them if it cannot be used.

        Args:
            documents: token ids by store key.
            environment: digest of the environment that computed those which are only in memory.
        """
        if self.remote is None or not self.remote.takes_uploads or not documents:
            return
        try:
            missing = self.remote.missing(documents)
        except StoreError as error:
            logger.warning("documents that the remote store may have lost are not uploaded again: %s", error)
            return
        for key in missing:
            self._tiers.upload_again(key, documents[key], environment)

    def settle(self, documents: Mapping[str, tuple[int, ...]], environment: str) -> dict[str, str]:
        """Wait until the slowest tier has all documents, and try failed uploads again. Return why it lacks some.

        Arguments are those of :meth:`refill`.

        Returns:
            The reason for each document that could not be stored, by store key.

        Raises:
            StoreError: the remote tier fails or does not answer.
        """
        reasons: dict[str, str] = {}
        for pause in UPLOAD_PAUSES:
            time.sleep(pause)
            for key in reasons:
                self._tiers.upload_again(key, documents[key], environment)
            lost: Mapping[str, str] = {} if self.remote is None else self.remote.drain().lost
            reasons = {key: lost.get(key, "a cap is too small, or a write failed") for key in self.missing(documents)}
            if not reasons or self.remote is None:
                break
        return reasons

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

    def _prefetch(
        self, documents: Mapping[str, tuple[int, ...]], shape: KVShape, device: torch.device, computing: Computing
    ) -> int:
        memory, disk = self.memory, self.disk
        if memory is None or disk is None:
            return 0
        requests = {
            key: KVRequest(ids)
            for key, ids in documents.items()
            if key not in memory and (self.remote is not None or key in disk)
        }
        fetch = Fetch(requests, shape, device, self._tiers.watch(requests), computing, keep=False)
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
