"""The document store: tiers one behind the other, each document computed once however many ask for it.

It decides where a document's KV comes from (memory, disk, remote, or a new prefill), brings it to where it is
wanted, and passes it on to the faster tiers. Whatever goes wrong in a tier is a counted miss. Knows neither models
nor text: what is missing is computed by a function of the caller's.
"""

from __future__ import annotations

import os
import threading
import time
import weakref
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import NamedTuple, NoReturn, TypeVar

import torch

from ..errors import InvalidInputError, OverloadError, StoreError
from ..model.hardware import device_name
from ..model.kv import DocumentKV, KVShape
from ..schema import Origin
from .disk import DiskStore
from .files import Miss
from .flights import Flight, Flights
from .format import compress, encode, expand, is_finite
from .keys import document_part, require_namespace_key
from .memory import MemoryStore
from .metrics import Counters, StoreEvent, StoreMetrics, Tier
from .policy import Loading, LoadPolicy
from .remote import RemoteStore

THREADS = min(4, os.cpu_count() or 1)  # that read files: each keeps a processor busy with reading and checking
PREFETCHES = 256  # calls that may wait


@dataclass(frozen=True, slots=True)
class KVRequest:
    """A document that is asked for.

    Attributes:
        into: the tensors that its keys and values are to be put into (slots of a fused buffer), where given.
        stored: whether it is looked for and kept; without, it is computed each time.
    """

    token_ids: tuple[int, ...]
    into: DocumentKV | None = None
    stored: bool = True


class FetchedKVs(NamedTuple):
    """What :meth:`DocumentStore.fetch` found, by key.

    Attributes:
        kvs: the KVs, those that were to be put somewhere included; empty where they were not to be kept.
        origins: where each came from.
        misses: why no tier had those that were looked for and computed.
    """

    kvs: dict[str, DocumentKV]
    origins: dict[str, Origin]
    misses: dict[str, Miss]


T = TypeVar("T")
R = TypeVar("R")
Take = Callable[[str, DocumentKV, Origin], None]
Compute = Callable[[Sequence[str]], Iterable[tuple[str, DocumentKV]]]


@dataclass(frozen=True, slots=True)
class _Call:
    """One call's documents: of what model, who takes them, and what is to be told in the end.

    Attributes:
        model: its name with its device's, which figures are measured for.
        removals: calls of ``forget`` and ``clear`` before it.
        events: told once nobody waits for this call any more, since a callback may ask for the same documents.
    """

    shape: KVShape
    device: torch.device
    model: str
    take: Take
    removals: int
    events: list[StoreEvent] = field(default_factory=list)


class DocumentStore:
    """Document KVs in memory, on disk and in a remote folder, each tier optional.

    Args:
        memory, disk, remote: the tiers; a remote one needs a disk in front of it.
        load: "auto" reads a file where that is faster than computing the document again (measured for each model
            and kind of device, as it goes); "always" and "never" decide otherwise.
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
        if remote is not None and (disk is None or disk.codec != remote.codec):
            found = "there is none" if disk is None else f"its codec is {disk.codec!r}"
            raise InvalidInputError(
                f"a remote store needs a disk store in front with the same codec, {remote.codec!r}, but {found}."
            )
        self.memory, self.disk, self.remote = memory, disk, remote
        figures = None if disk is None or disk.read_only else disk.path / "calibration.json"
        self._policy = LoadPolicy(load, figures)
        self._counters = Counters(on_event)
        self._removals = 0  # calls of forget and clear so far
        self._begin()
        in_child = weakref.WeakMethod(self._begin)
        os.register_at_fork(after_in_child=lambda: (begin := in_child()) and begin())

    def _begin(self) -> None:
        """Nothing is under way: so in a new store, and in a forked process, which has none of its parent's threads."""
        self._flights = Flights()
        self._waiting = threading.BoundedSemaphore(PREFETCHES)
        self._lock = threading.Lock()  # of the pools
        self._pools: dict[str, ThreadPoolExecutor] = {}

    def __repr__(self) -> str:
        tiers = [tier for tier in (self.memory, self.disk, self.remote) if tier is not None]
        return f"DocumentStore({', '.join(map(repr, tiers))})"

    def __reduce__(self) -> NoReturn:
        raise TypeError("a document store has files and threads of this process; open it anew in the other one.")

    def __contains__(self, key: str) -> bool:
        """Whether a local tier has ``key``; counts as no look-up."""
        return self.tier_of(key) is not None

    def tier_of(self, key: str) -> Tier | None:
        """The fastest local tier that has ``key``; counts as no look-up."""
        if self.memory is not None and key in self.memory:
            return "memory"
        return "disk" if self.disk is not None and key in self.disk else None

    def fetch(
        self, wanted: Mapping[str, KVRequest], shape: KVShape, device: torch.device, model: str, compute: Compute,
        *, keep: bool = True,
    ) -> FetchedKVs:  # fmt: skip
        """All wanted documents, from the fastest tier that has them, or computed and then stored.

        Documents that another thread is bringing already are waited for.

        Args:
            shape, device: of the model's KVs.
            model: its name, for the choice between loading and computing.
            compute: prefills documents by key, one after another as they are ready.
            keep: return the KVs; without, they go to the tiers alone, so that memory is bounded by their caps.

        """
        found: dict[str, DocumentKV] = {}
        origins: dict[str, Origin] = {}
        misses: dict[str, Miss] = {}

        def take(key: str, document: DocumentKV, origin: Origin) -> None:
            origins[key] = origin
            into = wanted[key].into
            if into is not None and into is not document:
                document.copy_into(into)
                document = into
            if keep:
                found[key] = document if document.keys.device == device else document.to(device)

        call = _Call(shape, device, _on_device(model, device), take, self._removals)
        self._compute([key for key, one in wanted.items() if not one.stored], compute, take)
        try:
            left = self._from_memory({key: one for key, one in wanted.items() if one.stored}, call)
            while left:
                mine, others = self._flights.claim(left)
                try:
                    # Another thread may have landed a document between the look and the claim.
                    again = self._from_memory({key: left[key] for key in mine}, call)
                    absent = self._from_files(again, call)
                    misses |= absent
                    call.events.extend(StoreEvent("miss", reason=miss) for miss in absent.values())
                    self._compute_and_store(list(absent), compute, call)
                finally:
                    self._flights.abandon(mine)
                left = self._from_others(others, left, call)
        finally:
            self._counters.note_all(call.events)
        return FetchedKVs(found, origins, {key: miss for key, miss in misses.items() if origins[key] == "computed"})

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
        if self.memory is None or self.disk is None:
            return 0
        call = _Call(shape, device, _on_device(model, device), lambda *_: None, self._removals)
        todo = {
            key: KVRequest(ids)
            for key, ids in wanted.items()
            if key not in self.memory and (self.remote is not None or key in self.disk)
        }
        mine, others = self._flights.claim(todo)
        try:
            self._from_files({key: todo[key] for key in mine}, call)
        finally:
            self._flights.abandon(mine)
            self._counters.note_all(call.events)
        for flight in others.values():
            flight.result()
        return sum(key in self.memory for key in wanted)

    def forget(self, keys: Iterable[str]) -> int:
        """Remove documents, under every model, from every tier; how many copies that were.

        What this store is bringing or computing at the moment is not kept either. Other processes keep what they
        hold in their own memory, and may store again what they are computing.
        """
        return self._remove(list({document_part(key): key for key in keys}.values()))

    def clear(self, namespace_key: str | None = None) -> int:
        """Remove all documents of a namespace (its key), or of all, from every tier; how many copies that were.

        Raises:
            InvalidInputError: ``namespace_key`` is not what :func:`namespace_key` makes.
            StoreError: a tier cannot remove its own; the others have.
        """
        if namespace_key is not None:
            require_namespace_key(namespace_key)
        return self._remove(None, namespace_key)

    def _remove(self, keys: Sequence[str] | None, namespace_key: str | None = None) -> int:
        """From the slowest tier to the fastest, so that no reader brings a document back from behind."""
        self._removals += 1  # from here on nothing that was begun before is kept
        removed, failed = 0, None
        for tier in (self.remote, self.disk, self.memory):
            if tier is None:
                continue
            try:
                removed += tier.clear(namespace_key) if keys is None else tier.forget(*keys)
            except StoreError as error:  # the other tiers let go of theirs all the same
                failed = failed or error
        self._counters.note(StoreEvent("forgotten", documents=removed))
        if failed is not None:
            raise failed
        return removed

    def release_memory(self, device: torch.device) -> int:
        """Drop what the memory tier keeps on ``device``; how many bytes that were. Slower tiers keep theirs."""
        if self.memory is None or (self.memory.host and device.type != "cpu"):
            return 0
        held = self.memory.stats.bytes
        self.memory.clear()
        return held

    def require_room(self, shape: KVShape, tokens: int) -> None:
        """Raise InvalidInputError where a tier could not hold one document of ``tokens``."""
        caps: list[tuple[str, int, int | None]] = []
        if self.memory is not None:
            size = shape.nbytes(tokens)
            caps += [("max_bytes of the memory", size, self.memory.max_bytes)]
            caps += [("namespace_bytes of the memory", size, self.memory.namespace_bytes)]
        if self.disk is not None:
            size = self.disk.file_bytes(shape, tokens)
            caps += [("max_bytes of the disk", size, self.disk.caps.total)]
            caps += [("namespace_bytes of the disk", size, self.disk.caps.namespace)]
        for name, size, cap in caps:
            if cap is not None and cap < size:
                raise InvalidInputError(
                    f"{name} store is {cap:,}, but one document of {tokens} tokens alone takes {size:,} bytes."
                )

    @property
    def is_empty(self) -> bool:
        """Whether there is no tier, so that nothing is kept."""
        return self.memory is None and self.disk is None

    @property
    def metrics(self) -> StoreMetrics:
        """Counts since the store was opened."""
        now: defaultdict[str, dict[str, int]] = defaultdict(dict)
        if self.memory is not None:
            stats = self.memory.stats
            now["used_bytes"]["memory"], now["entries"]["memory"] = stats.bytes, stats.entries
            now["evictions"]["memory"], now["rejected"]["memory"] = stats.evictions, stats.rejected
        if self.disk is not None:
            totals = self.disk.totals()
            now["used_bytes"]["disk"] = sum(size for size, _ in totals.values())
            now["entries"]["disk"] = sum(count for _, count in totals.values())
            now["rejected"]["disk"] = self.disk.rejected
        for tier, store in (("disk", self.disk), ("remote", self.remote)):
            if store is not None:
                now["evictions"][tier] = store.evictions
                now["failed_writes"][tier], now["dropped"][tier] = store.failed_writes, store.dropped
        return self._counters.snapshot(**now)

    def flush(self) -> bool:
        """Wait for what is still being written to the remote tier, for a minute at most; whether all of it has ended.

        What could not be written is in the metrics.
        """
        return self.remote is None or self.remote.flush()

    def close(self) -> None:
        """Finish writing, for a minute at most, and let go of files and threads."""
        if self.remote is not None:
            self.remote.close()
        with self._lock:
            pools, self._pools = self._pools, {}
        for pool in pools.values():
            pool.shutdown()
        if self.disk is not None:
            self.disk.close()

    # The tiers, from the fastest on

    def _from_memory(self, wanted: Mapping[str, KVRequest], call: _Call) -> dict[str, KVRequest]:
        if self.memory is None:
            return dict(wanted)
        missing: dict[str, KVRequest] = {}
        for key, one in wanted.items():
            document = self.memory.get(key, one.token_ids, pin=True)
            if document is None:
                missing[key] = one
                continue
            try:
                call.take(key, document, "memory")
            finally:
                self.memory.unpin(key)
            call.events.append(StoreEvent("hit", "memory", tokens=len(one.token_ids), bytes=document.nbytes))
        return missing

    def _from_files(self, wanted: Mapping[str, KVRequest], call: _Call) -> dict[str, Miss]:
        """Take what disk and remote have, in parallel; why they have not the others, in order."""
        if self.disk is None or not wanted:
            return dict.fromkeys(wanted, Miss.ABSENT)
        if not self._policy.should_load(call.model):
            return dict.fromkeys(wanted, Miss.SLOWER)
        disk, shape, missing = self.disk, call.shape, {}
        direct = call.device.type == "cpu"

        def read(item: tuple[str, KVRequest]) -> tuple[str, DocumentKV, Miss | None, Tier, float]:
            key, one = item
            document = one.into if direct and one.into is not None else shape.empty(one.token_ids)
            began = time.perf_counter()
            miss, tier = disk.get(key, shape, document), "disk"
            if miss is not None and self.remote is not None:
                _note_fault(call, "disk", miss)
                miss, tier = self._from_remote(self.remote, disk, key, shape, document), "remote"
            return key, document, miss, tier, time.perf_counter() - began

        began, loaded = time.perf_counter(), Counter[str]()
        for key, document, miss, tier, seconds in self._each(read, list(wanted.items())):
            if miss is not None:
                _note_fault(call, tier, miss)
                missing[key] = miss
                continue
            call.events.append(
                StoreEvent("hit", tier, tokens=document.num_tokens, bytes=document.nbytes, seconds=seconds)
            )
            loaded[tier] += document.num_tokens
            owned = document is not wanted[key].into
            kept = self._keep_in_memory(key, document, call, owned=owned)
            call.take(key, document if kept is None or not owned else kept, tier)
            if kept is not None:  # the caller's own slots may hold something else by the time others look at them
                self._flights.land(key, kept)
        if loaded["disk"] == loaded.total():  # files are read side by side, so only the whole time says what one costs
            self._policy.note_load(call.model, loaded["disk"], time.perf_counter() - began)
        return {key: missing[key] for key in wanted if key in missing}

    def _from_others(
        self, flights: Mapping[str, Flight], wanted: Mapping[str, KVRequest], call: _Call
    ) -> dict[str, KVRequest]:
        """Wait for what other threads are bringing; what they did not bring is still wanted."""
        left: dict[str, KVRequest] = {}
        for key, flight in flights.items():
            document = flight.result()
            if document is None:
                left[key] = wanted[key]
                continue
            call.take(key, document, "memory")
            call.events.append(StoreEvent("hit", "memory", tokens=len(wanted[key].token_ids)))
        return left

    def _from_remote(
        self, remote: RemoteStore, disk: DiskStore, key: str, shape: KVShape, document: DocumentKV
    ) -> Miss | None:
        """Bring a file to the local disk, and read it there, where it is checked."""
        began = time.monotonic()
        fetching = remote.start(key)
        if fetching is None:
            return Miss.PAUSED
        file = remote.finish(fetching, began)
        if isinstance(file, Miss):
            return file
        miss = disk.adopt(key, file, shape, document)
        if miss is not None and miss is not Miss.UNREADABLE:
            remote.note_broken(key)
        return miss

    def _compute(self, keys: Sequence[str], compute: Compute, take: Take) -> None:
        """Documents that are computed each time."""
        for key, made in compute(keys) if keys else ():
            take(key, made, "computed")

    def _compute_and_store(self, keys: Sequence[str], compute: Compute, call: _Call) -> None:
        if not keys:
            return
        began, tokens, spent = time.perf_counter(), 0, 0.0
        for key, made in compute(keys):
            if self.disk is not None and call.device.type != "cpu":  # or the clock sees kernels launched, not run
                torch.accelerator.synchronize(call.device)
            spent += time.perf_counter() - began
            document = self._as_stored(made)
            tokens += document.num_tokens
            call.take(key, document, "computed")
            self._keep(key, document, call)
            self._flights.land(key, document)
            began = time.perf_counter()
        self._policy.note_prefill(call.model, tokens, spent)
        call.events.append(StoreEvent("computed", documents=len(keys), tokens=tokens, seconds=spent))

    def _as_stored(self, document: DocumentKV) -> DocumentKV:
        """What a reader of the stored document would get, so that answers do not depend on what is stored."""
        if self.disk is None or self.disk.codec == "raw":
            return document
        values = document.values.cpu()  # an accelerator divides otherwise in the last bit than the reader of the file
        expand(*compress(values), into := torch.empty_like(values))
        return DocumentKV(document.keys, into.to(document.values.device), document.token_ids)

    def _keep(self, key: str, document: DocumentKV, call: _Call) -> None:
        if self.memory is not None and self.memory.put(key, document):
            call.events.append(StoreEvent("stored", "memory", bytes=document.nbytes))
        began = time.perf_counter()
        if self.disk is not None and key not in self.disk and self.disk.put(key, document):
            seconds = time.perf_counter() - began
            size = self.disk.file_bytes(KVShape.of(document), document.num_tokens)
            call.events.append(StoreEvent("stored", "disk", bytes=size, seconds=seconds))
        if self.remote is not None and is_finite(document.keys, document.values):
            if self.remote.takes_uploads:
                buffers = encode(key, document, self.remote.codec)
                self.remote.upload(key, buffers, lambda size: self._uploaded(key, size, call.removals))
            else:
                self.remote.note_dropped()
        self._unless_removed(key, call.removals, self.disk, self.memory)

    def _uploaded(self, key: str, size: int, removals: int) -> None:
        self._counters.note(StoreEvent("stored", "remote", bytes=size))
        self._unless_removed(key, removals, self.remote)

    def _keep_in_memory(self, key: str, document: DocumentKV, call: _Call, *, owned: bool) -> DocumentKV | None:
        """Put a document that was read into memory; a copy that others may have, where there is one."""
        if self.memory is None:
            return document if owned else None
        kept = document if owned else DocumentKV(document.keys.clone(), document.values.clone(), document.token_ids)
        if not self.memory.host and kept.keys.device != call.device:
            kept = kept.to(call.device)
        self.memory.put(key, kept)
        self._unless_removed(key, call.removals, self.memory)
        return kept

    def _unless_removed(self, key: str, removals: int, *tiers: MemoryStore | DiskStore | RemoteStore | None) -> None:
        """Take back what was just stored, if documents were removed since it was asked for: it may be one of them.

        A removal that begins later finds it in its place.
        """
        if self._removals != removals:
            for tier in tiers:
                if tier is not None:
                    tier.forget(key)

    def _each(self, function: Callable[[T], R], items: Sequence[T]) -> Iterator[R]:
        """``function`` of each item, several at once where there are several."""
        if len(items) == 1:
            return iter([function(items[0])])
        return self._threads("read").map(function, items)

    def _threads(self, use: str) -> ThreadPoolExecutor:
        """Threads for one use, made when first needed."""
        with self._lock:
            if use not in self._pools:
                self._pools[use] = ThreadPoolExecutor(THREADS, thread_name_prefix=f"kvfusion-{use}")
            return self._pools[use]


def _note_fault(call: _Call, tier: Tier, miss: Miss) -> None:
    if miss not in (Miss.ABSENT, Miss.PAUSED):
        call.events.append(StoreEvent("miss", tier, reason=miss))


def _on_device(model: str, device: torch.device) -> str:
    """What figures are measured for."""
    return f"{model} on {device_name(device)}"
