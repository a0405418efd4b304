"""The document store: tiers one behind the other, each document computed once however many ask for it.

It decides where a document's KV comes from (memory, disk, remote, or a new prefill), brings it to where it is
wanted, and passes it on to the faster tiers. Whatever goes wrong in a tier is a counted miss. Knows neither models
nor text: what is missing is computed by a function of the caller's.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import NoReturn, TypeVar

import torch

from ..errors import InvalidInputError, OverloadError
from ..schema import DocumentKV, KVShape, Origin
from .disk import DiskStore
from .files import Miss
from .format import compress, encode, expand
from .keys import document_part
from .memory import MemoryStore
from .metrics import Counters, StoreEvent, StoreMetrics, Tier
from .policy import Loading, LoadPolicy
from .remote import RemoteStore

THREADS = 4  # that read files
PREFETCHES = 256  # calls that may wait


@dataclass(frozen=True, slots=True)
class Wanted:
    """A document that is asked for.

    ``into``, where given, are the tensors that its keys and values are to be put into (slots of a fused buffer).
    """

    token_ids: tuple[int, ...]
    into: DocumentKV | None = None


T = TypeVar("T")
R = TypeVar("R")
Compute = Callable[[Sequence[str]], Iterable[tuple[str, DocumentKV]]]


class DocumentStore:
    """Document KVs in memory, on disk and in a remote folder, each tier optional.

    Args:
        memory, disk, remote: the tiers; a remote one needs a disk in front of it.
        load: "auto" reads a file where that is faster than computing the document again (measured once for each
            model and device); "always" and "never" decide otherwise.
        on_event: called with each :class:`StoreEvent`, from any thread.

    Safe from several threads and processes. It cannot be pickled: open it in each process.
    """

    def __init__(
        self,
        memory: MemoryStore | None = None,
        disk: DiskStore | None = None,
        remote: RemoteStore | None = None,
        *,
        load: Loading = "auto",
        on_event: Callable[[StoreEvent], None] | None = None,
    ) -> None:
        self.memory, self.disk, self.remote = memory, disk, remote
        self._policy = LoadPolicy(load, None if disk is None else disk.path / "calibration.json")
        self._counters = Counters(on_event)
        self._flights: dict[str, Future[DocumentKV]] = {}
        self._lock = threading.Lock()
        self._waiting = threading.BoundedSemaphore(PREFETCHES)
        self._pools: dict[tuple[int, str], ThreadPoolExecutor] = {}

    def __repr__(self) -> str:
        tiers = [tier for tier in (self.memory, self.disk, self.remote) if tier is not None]
        return f"DocumentStore({', '.join(map(repr, tiers))})"

    def __reduce__(self) -> NoReturn:
        raise TypeError("a document store has files and threads of this process; open it anew in the other one.")

    def __contains__(self, key: str) -> bool:
        """Whether a local tier has ``key``; counts as no look-up."""
        return any(key in tier for tier in (self.memory, self.disk) if tier is not None)

    def fetch(
        self, wanted: Mapping[str, Wanted], shape: KVShape, device: torch.device, model: str, compute: Compute,
        *, keep: bool = True,
    ) -> tuple[dict[str, DocumentKV], dict[str, Origin]]:  # fmt: skip
        """All wanted documents, from the fastest tier that has them, or computed and then stored.

        Documents that another thread is bringing already are waited for.

        Args:
            shape, device: of the model's KVs.
            model: name of model and device, for the choice between loading and computing.
            compute: prefills documents by key, one after another as they are ready.
            keep: return the KVs; without, they go to the tiers alone, so that memory is bounded by their caps.

        Returns:
            The KVs, ``into`` itself where it was given, and where each came from.
        """
        found: dict[str, DocumentKV] = {}
        origins: dict[str, Origin] = {}

        def take(key: str, document: DocumentKV, origin: Origin) -> None:
            origins[key] = origin
            into = wanted[key].into
            if into is not None and into is not document:
                document.copy_into(into)
                document = into
            if keep:
                found[key] = document if document.keys.device == device else document.to(device)

        mine, others = self._claim(self._from_memory(wanted, take))
        try:
            # Another thread may have landed a document between the look and the claim.
            left = self._from_memory({key: wanted[key] for key in mine}, take)
            absent = self._from_files(left, shape, device, model, take)
            self._compute(absent, wanted, compute, model, take)
        finally:
            self._abandon(mine)
        for key, flight in others.items():
            try:
                take(key, flight.result(), "memory")
                self._counters.note(StoreEvent("hit", "memory", tokens=len(wanted[key].token_ids)))
            except Exception:  # the other thread failed with its own error; this one tries for itself
                self._compute([key], wanted, compute, model, take)
        return found, origins

    def prefetch(
        self, wanted: Mapping[str, tuple[int, ...]], shape: KVShape, device: torch.device, model: str
    ) -> Future[int]:
        """Begin to bring documents that slower tiers have into memory; the future has how many are there.

        Raises:
            OverloadError: too many calls wait already.
        """
        if not self._waiting.acquire(blocking=False):
            raise OverloadError(f"{PREFETCHES} calls of prefetch wait already, which is the most; ask again later.")
        loading = self._threads("prefetch").submit(self._prefetch, wanted, shape, device, model)
        loading.add_done_callback(lambda _: self._waiting.release())
        return loading

    def _prefetch(
        self, wanted: Mapping[str, tuple[int, ...]], shape: KVShape, device: torch.device, model: str
    ) -> int:
        if self.memory is None:
            return 0
        todo = {key: Wanted(ids) for key, ids in wanted.items() if key not in self.memory}
        mine, others = self._claim(todo)
        try:
            self._from_files({key: todo[key] for key in mine}, shape, device, model, lambda *_: None)
        finally:
            self._abandon(mine)
        for flight in others.values():
            flight.exception()
        return sum(key in self.memory for key in wanted)

    def forget(self, keys: Iterable[str]) -> int:
        """Remove documents, under every model, from every tier; how many copies that were."""
        removed = 0
        for key in keys:
            prefix = document_part(key)
            if self.memory is not None:
                removed += self.memory.remove(lambda one, prefix=prefix: one.startswith(prefix))
            removed += sum(tier.forget(key) for tier in (self.disk, self.remote) if tier is not None)
        self._counters.note(StoreEvent("forgotten", documents=removed))
        return removed

    def clear(self, namespace_key: str | None = None) -> int:
        """Remove all documents of a namespace (its key), or of all, from every tier; how many copies that were."""
        removed = 0
        if self.memory is not None:
            removed += self.memory.remove(lambda key: namespace_key is None or key.startswith(namespace_key))
        removed += sum(tier.clear(namespace_key) for tier in (self.disk, self.remote) if tier is not None)
        self._counters.note(StoreEvent("forgotten", documents=removed))
        return removed

    def release_memory(self) -> int:
        """Drop what the memory tier keeps; how many bytes that were. Slower tiers keep theirs."""
        if self.memory is None:
            return 0
        held = self.memory.stats.bytes
        self.memory.clear()
        return held

    def require_room(self, document_bytes: int, what: str) -> None:
        """Raise InvalidInputError where a tier could not hold one document of ``document_bytes``."""
        caps: dict[str, int] = {}
        if self.memory is not None:
            caps["memory"] = self.memory.max_bytes
        if self.disk is not None:
            caps["disk"] = self.disk.caps.total
        for tier, cap in caps.items():
            if cap < document_bytes:
                raise InvalidInputError(
                    f"max_bytes of the {tier} store is {cap:,}, but {what} alone takes {document_bytes:,} bytes."
                )

    @property
    def is_empty(self) -> bool:
        """Whether there is no tier, so that nothing is kept."""
        return self.memory is None and self.disk is None

    @property
    def metrics(self) -> StoreMetrics:
        """Counts since the store was opened."""
        used: dict[str, int] = {}
        entries: dict[str, int] = {}
        evictions: dict[str, int] = {}
        if self.memory is not None:
            stats = self.memory.stats
            used["memory"], entries["memory"], evictions["memory"] = stats.bytes, stats.entries, stats.evictions
        if self.disk is not None:
            totals = self.disk.totals()
            used["disk"] = sum(size for size, _ in totals.values())
            entries["disk"] = sum(count for _, count in totals.values())
            evictions["disk"] = self.disk.evictions
        return self._counters.snapshot(used_bytes=used, entries=entries, evictions=evictions)

    def flush(self) -> None:
        """Wait for what is still being written to the remote tier."""
        if self.remote is not None:
            self.remote.flush()

    def close(self) -> None:
        """Finish writing and let go of files."""
        self.flush()
        if self.disk is not None:
            self.disk.close()

    # The tiers, from the fastest on

    def _from_memory(
        self, wanted: Mapping[str, Wanted], take: Callable[[str, DocumentKV, Origin], None]
    ) -> dict[str, Wanted]:
        if self.memory is None:
            return dict(wanted)
        missing: dict[str, Wanted] = {}
        for key, one in wanted.items():
            document = self.memory.get(key, one.token_ids, pin=True)
            if document is None:
                missing[key] = one
                continue
            try:
                take(key, document, "memory")
            finally:
                self.memory.unpin(key)
            self._counters.note(StoreEvent("hit", "memory", tokens=len(one.token_ids), bytes=document.nbytes))
        return missing

    def _from_files(
        self, wanted: Mapping[str, Wanted], shape: KVShape, device: torch.device, model: str,
        take: Callable[[str, DocumentKV, Origin], None],
    ) -> list[str]:  # fmt: skip
        """Take what disk and remote have, in parallel; the keys that they have not, in order."""
        if self.disk is None or not wanted:
            for _ in wanted:
                self._counters.note(StoreEvent("miss", reason=Miss.ABSENT))
            return list(wanted)
        if not self._policy.should_load(model):
            for _ in wanted:
                self._counters.note(StoreEvent("miss", reason=Miss.SLOWER))
            return list(wanted)
        disk, missing = self.disk, []
        direct = device.type == "cpu"

        def read(item: tuple[str, Wanted]) -> tuple[str, DocumentKV, Miss | None, Origin, float]:
            key, one = item
            document = one.into if direct and one.into is not None else shape.empty(one.token_ids)
            began = time.perf_counter()
            miss, origin = disk.get(key, shape, document), "disk"
            if miss is not None and self.remote is not None:
                self._note_fault("disk", miss)
                miss, origin = self._from_remote(self.remote, disk, key, shape, document), "remote"
            return key, document, miss, origin, time.perf_counter() - began

        for key, document, miss, origin, seconds in self._each(read, list(wanted.items())):
            if miss is not None:
                self._note_fault("disk" if origin == "disk" else "remote", miss)
                self._counters.note(StoreEvent("miss", reason=miss))
                missing.append(key)
                continue
            tier: Tier = "disk" if origin == "disk" else "remote"
            event = StoreEvent("hit", tier, tokens=document.num_tokens, bytes=document.nbytes, seconds=seconds)
            self._counters.note(event)
            if tier == "disk":
                self._policy.note_load(model, document.num_tokens, seconds)
            self._keep_in_memory(key, document, owned=document is not wanted[key].into, device=device)
            take(key, document, origin)
            self._land(key, document)
        order = {key: place for place, key in enumerate(wanted)}
        return sorted(missing, key=order.__getitem__)

    def _from_remote(
        self, remote: RemoteStore, disk: DiskStore, key: str, shape: KVShape, document: DocumentKV
    ) -> Miss | None:
        """Bring a file to the local disk, and read it there, where it is checked."""
        began = time.monotonic()
        fetching = remote.start(key)
        if fetching is None:
            return Miss.ABSENT
        file = remote.finish(fetching, began)
        if isinstance(file, Miss):
            return file
        return disk.adopt(key, file, shape, document)

    def _compute(
        self, keys: Sequence[str], wanted: Mapping[str, Wanted], compute: Compute, model: str,
        take: Callable[[str, DocumentKV, Origin], None],
    ) -> None:  # fmt: skip
        if not keys:
            return
        began, tokens = time.perf_counter(), 0
        spent = 0.0
        for key, made in compute(keys):
            spent += time.perf_counter() - began
            document = self._as_stored(made)
            tokens += document.num_tokens
            take(key, document, "computed")
            self._keep(key, document)
            self._land(key, document)
            began = time.perf_counter()
        self._policy.note_prefill(model, tokens, spent)
        self._counters.note(StoreEvent("computed", documents=len(keys), tokens=tokens, seconds=spent))

    def _as_stored(self, document: DocumentKV) -> DocumentKV:
        """What a reader of the stored document would get, so that answers do not depend on what is stored."""
        if self.disk is None or self.disk.codec == "raw":
            return document
        small, scales = compress(document.values)
        values = torch.empty_like(document.values)
        expand(small, scales, values)
        return DocumentKV(document.keys, values, document.token_ids)

    def _keep(self, key: str, document: DocumentKV) -> None:
        if self.memory is not None and self.memory.put(key, document):
            self._counters.note(StoreEvent("stored", "memory", bytes=document.nbytes))
        began = time.perf_counter()
        if self.disk is not None and self.disk.put(key, document):
            seconds = time.perf_counter() - began
            self._counters.note(StoreEvent("stored", "disk", bytes=document.nbytes, seconds=seconds))
        if self.remote is not None:
            buffers = encode(key, document, self.remote.codec)
            self.remote.upload(
                key, buffers, lambda size: self._counters.note(StoreEvent("stored", "remote", bytes=size))
            )

    def _keep_in_memory(self, key: str, document: DocumentKV, *, owned: bool, device: torch.device) -> None:
        if self.memory is None:
            return
        kept = document if owned else DocumentKV(document.keys.clone(), document.values.clone(), document.token_ids)
        self.memory.put(key, kept if kept.keys.device == device else kept.to(device))

    # One prefill a document, however many threads ask

    def _claim(self, wanted: Mapping[str, Wanted]) -> tuple[list[str], dict[str, Future[DocumentKV]]]:
        """The keys that this thread is to bring, and those that another one is bringing."""
        mine: list[str] = []
        others: dict[str, Future[DocumentKV]] = {}
        with self._lock:
            for key in wanted:
                flight = self._flights.get(key)
                if flight is None:
                    self._flights[key] = Future()
                    mine.append(key)
                else:
                    others[key] = flight
        return mine, others

    def _land(self, key: str, document: DocumentKV) -> None:
        with self._lock:
            flight = self._flights.pop(key, None)
        if flight is not None:
            flight.set_result(document)

    def _abandon(self, keys: Sequence[str]) -> None:
        """Let others try for themselves what this thread has not brought."""
        with self._lock:
            left = [flight for key in keys if (flight := self._flights.pop(key, None)) is not None]
        for flight in left:
            flight.set_exception(RuntimeError("not brought"))

    def _note_fault(self, tier: Tier, miss: Miss) -> None:
        if miss is not Miss.ABSENT:
            self._counters.note(StoreEvent("miss", tier, reason=miss))

    def _each(self, function: Callable[[T], R], items: Sequence[T]) -> Iterator[R]:
        """``function`` of each item, several at once where there are several."""
        if len(items) == 1:
            return iter([function(items[0])])
        return self._threads("read").map(function, items)

    def _threads(self, use: str) -> ThreadPoolExecutor:
        """Threads for one use, made when first needed; a forked process has none of its parent's."""
        place = (os.getpid(), use)
        with self._lock:
            if place not in self._pools:
                self._pools[place] = ThreadPoolExecutor(THREADS, thread_name_prefix=f"kvfusion-{use}")
            return self._pools[place]
