"""The tiers of a document store in order of speed: where documents are looked up, stored and removed.

An error in a tier becomes a miss with its reason. A removal also covers documents that are being fetched: a
document requested before it is not kept.
"""

from __future__ import annotations

import time
import weakref
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import NamedTuple

import torch

from ..errors import InvalidInputError, StoreError
from ..model.kv import DocumentKV, KVShape
from ..schema import Origin
from .disk import DiskStore
from .format import NO_ENVIRONMENT, Accepts, compress, encode, expand
from .keys import document_part, namespace_part
from .memory import MemoryStore
from .metrics import Counters, Miss, StoreEvent, Tier
from .remote import RemoteStore


@dataclass(frozen=True, slots=True)
class KVRequest:
    """A requested document.

    Attributes:
        token_ids: its T token ids.
        into: tensors to write keys and values to (slots of a fused cache), or None.
        stored: look the document up and store it. If False, it is computed at every fetch.
    """

    token_ids: tuple[int, ...]
    into: DocumentKV | None = None
    stored: bool = True


class FetchedKVs(NamedTuple):
    """Result of :meth:`DocumentStore.fetch`, by store key.

    Attributes:
        kvs: document KVs, including those written to ``into``. Empty if they were not to be returned.
        origins: where each document came from.
        misses: why no tier had a document that was computed.
    """

    kvs: dict[str, DocumentKV]
    origins: dict[str, Origin]
    misses: dict[str, Miss]


class Watch:
    """The documents of one fetch, and which of them were removed from the tiers since it began."""

    def __init__(self, keys: Collection[str]) -> None:
        self._keys = tuple(keys)
        self.removed: set[str] = set()

    def note_removal(self, documents: Collection[str] | None, namespace_key: str | None) -> None:
        """Note the removal of some documents (their ``document_part``), of a namespace, or of everything."""
        for key in self._keys:
            if document_part(key) in documents if documents is not None else _belongs(key, namespace_key):
                self.removed.add(key)


def _belongs(key: str, namespace_key: str | None) -> bool:
    return namespace_key is None or namespace_part(key) == namespace_key


class Computing(NamedTuple):
    """How the documents of one fetch are computed, and which computed elsewhere may take their place.

    Attributes:
        environment: digest of this environment, stored beside each document.
        accepts: whether a document that the environment with some digest computed may be used (default: any).
    """

    environment: str = NO_ENVIRONMENT
    accepts: Accepts | None = None


class Fetch:
    """The documents of one call of :meth:`DocumentStore.fetch`, and its view of the tiers.

    Attributes:
        requests: requested documents by store key.
        shape, device: shape and device of the model's KVs.
        kvs, origins, misses: see :class:`FetchedKVs`.
        watch: which of the documents are removed while the fetch runs.
        computing: how they are computed.
        keep: whether the KVs are returned. If not, the caller fills the store, and waits while its uploads do.
        events: passed to callbacks once no thread waits for the call, because a callback may fetch the same documents.
    """

    def __init__(
        self, requests: Mapping[str, KVRequest], shape: KVShape, device: torch.device, watch: Watch,
        computing: Computing, keep: bool,
    ) -> None:  # fmt: skip
        self.requests, self.shape, self.device = requests, shape, device
        self.watch, self.computing, self.keep = watch, computing, keep
        self.kvs: dict[str, DocumentKV] = {}
        self.origins: dict[str, Origin] = {}
        self.misses: dict[str, Miss] = {}
        self.events: list[StoreEvent] = []

    def take(self, key: str, document: DocumentKV, origin: Origin) -> None:
        """Accept a document, and write it to the tensors that the request names."""
        self.origins[key] = origin
        into = self.requests[key].into
        if into is not None and into is not document:
            document.copy_into(into)
            document = into
        if self.keep:
            self.kvs[key] = document if document.keys.device == self.device else document.to(self.device)


class Tiers:
    """Memory, disk and remote tier, each optional."""

    def __init__(
        self, memory: MemoryStore | None, disk: DiskStore | None, remote: RemoteStore | None, counters: Counters
    ) -> None:
        if remote is not None and (disk is None or disk.codec != remote.codec):
            problem = "there is none" if disk is None else f"its codec is {disk.codec!r}"
            raise InvalidInputError(
                f"a remote store needs a disk store in front with the same codec, {remote.codec!r}, but {problem}."
            )
        self.memory, self.disk, self.remote = memory, disk, remote
        self._counters = counters
        # Only set operations that Python does in one step, so it needs no lock that a forked process would inherit.
        self._watches: set[weakref.ref[Watch]] = set()

    def watch(self, keys: Collection[str]) -> Watch:
        """Return an object that notes the removal of any of ``keys`` as long as it exists."""
        watch = Watch(keys)
        self._watches.add(weakref.ref(watch, self._watches.discard))
        return watch

    def get_from_memory(self, key: str, fetch: Fetch) -> DocumentKV | None:
        """Return the document from memory, or None if it is not there."""
        document = None if self.memory is None else self.memory.get(key, fetch.requests[key].token_ids)
        if document is not None:
            fetch.events.append(StoreEvent("hit", "memory", tokens=document.num_tokens, bytes=document.nbytes))
        return document

    def get_from_files(self, key: str, document: DocumentKV, fetch: Fetch) -> Tier | Miss:
        """Read the document from disk or the remote tier into CPU tensors. Return its tier, or the miss reason."""
        if self.disk is None:
            return Miss.ABSENT
        began = time.perf_counter()
        tier, miss = "disk", self.disk.get(key, fetch.shape, document, fetch.computing.accepts)
        if miss is not None and self.remote is not None:
            _note_fault(fetch, "disk", miss)
            tier, miss = "remote", self._get_from_remote(self.remote, self.disk, key, document, fetch)
        if miss is not None:
            _note_fault(fetch, tier, miss)
            return miss
        seconds = time.perf_counter() - began
        fetch.events.append(
            StoreEvent("hit", tier, tokens=document.num_tokens, bytes=document.nbytes, seconds=seconds)
        )
        return tier

    def put_in_memory(self, key: str, document: DocumentKV, fetch: Fetch) -> DocumentKV:
        """Store a document that was read from a file in memory. Return it on the device where memory keeps it."""
        if self.memory is not None:
            if not self.memory.host and document.keys.device != fetch.device:
                document = document.to(fetch.device)
            self.memory.put(key, document)
            self._undo_if_removed(key, fetch.watch, self.memory)
        return document

    def put(self, key: str, document: DocumentKV, fetch: Fetch) -> None:
        """Store a computed document in every tier."""
        if self.memory is not None and self.memory.put(key, document):
            fetch.events.append(StoreEvent("stored", "memory", bytes=document.nbytes))
        began, environment = time.perf_counter(), fetch.computing.environment
        if self.disk is not None and key not in self.disk and self.disk.put(key, document, environment):
            seconds, size = time.perf_counter() - began, self.disk.file_bytes(fetch.shape, document.num_tokens)
            fetch.events.append(StoreEvent("stored", "disk", bytes=size, seconds=seconds))
        if self.remote is not None:
            watch = fetch.watch  # an upload that is waiting must not hold the KVs of the whole fetch
            self.remote.put(key, document, lambda size: self._note_uploaded(key, size, watch),
                            environment=environment, patient=not fetch.keep)  # fmt: skip
        self._undo_if_removed(key, fetch.watch, self.disk, self.memory)

    def upload_again(self, key: str, token_ids: tuple[int, ...], environment: str) -> None:
        """Upload a document that a local tier has, unless the remote tier has it. Wait while the queue is full."""
        if self.remote is not None:
            self.remote.put_again(key, lambda: self._file_of(key, token_ids, environment))

    def as_stored(self, document: DocumentKV) -> DocumentKV:
        """Return what a reader of the stored document would get, so that answers do not depend on the store."""
        if self.disk is None or self.disk.codec == "raw":
            return document
        values = document.values.cpu()  # because a GPU's division can differ from the CPU's in the last bit
        expand(*compress(values), into := torch.empty_like(values))
        return DocumentKV(document.keys, into.to(document.values.device), document.token_ids)

    def remove(self, keys: Sequence[str] | None, namespace_key: str | None = None) -> int:
        """Remove documents, a namespace or everything from all tiers. Return the number of removed copies.

        The slowest tier comes first, so that no reader can copy a document from it to a faster one.

        Raises:
            StoreError: a tier cannot remove its documents. The other tiers have removed theirs.
        """
        documents = None if keys is None else {document_part(key) for key in keys}
        for reference in list(self._watches):  # fetches that began earlier do not keep these documents
            if (watch := reference()) is not None:
                watch.note_removal(documents, namespace_key)
        removed, failure = 0, None
        for tier in (self.remote, self.disk, self.memory):
            if tier is None:
                continue
            try:
                removed += tier.clear(namespace_key) if keys is None else tier.forget(*keys)
            except StoreError as error:
                failure = failure or error
        self._counters.note(StoreEvent("forgotten", documents=removed))
        if failure is not None:
            raise failure
        return removed

    def require_room(self, shape: KVShape, tokens: int) -> None:
        """Raise InvalidInputError if no document of ``shape`` with ``tokens`` tokens can be kept."""
        if self.disk is not None and self.disk.codec != "raw" and not shape.dtype.is_floating_point:
            raise InvalidInputError(
                f"codec is {self.disk.codec!r}, but it must be 'raw', because the model's cache is quantised already."
            )
        tiers: list[tuple[str, int, MemoryStore | DiskStore]] = []
        if self.memory is not None:
            tiers.append(("memory", shape.nbytes(tokens), self.memory))
        if self.disk is not None:
            tiers.append(("disk", self.disk.file_bytes(shape, tokens), self.disk))
        for tier, size, store in tiers:
            for name, cap in asdict(store.caps).items():
                if cap is not None and cap < size:
                    raise InvalidInputError(
                        f"{name} of the {tier} store is {cap:,}, but one document with {tokens} tokens takes "
                        f"{size:,} bytes."
                    )

    def counts(self) -> dict[str, dict[str, int]]:
        """Return the counts that the tiers keep themselves: field of StoreMetrics, tier, count."""
        counts: defaultdict[str, dict[str, int]] = defaultdict(dict)
        if self.memory is not None:
            counts["used_bytes"]["memory"], counts["entries"]["memory"] = self.memory.used_bytes, len(self.memory)
        if self.disk is not None:
            totals = self.disk.totals()
            counts["used_bytes"]["disk"] = sum(size for size, _ in totals.values())
            counts["entries"]["disk"] = sum(entries for _, entries in totals.values())
        for tier, store in (("memory", self.memory), ("disk", self.disk), ("remote", self.remote)):
            for name in ("evictions", "rejected", "failed_writes", "dropped"):
                if hasattr(store, name):
                    counts[name][tier] = getattr(store, name)
        return counts

    def _get_from_remote(
        self, remote: RemoteStore, disk: DiskStore, key: str, document: DocumentKV, fetch: Fetch
    ) -> Miss | None:
        """Copy a file to the local disk and read it there, where it is checked."""
        file = remote.get(key, disk.file_bytes(fetch.shape, document.num_tokens))
        if isinstance(file, Miss):
            return file
        miss = disk.adopt(key, file, fetch.shape, document, fetch.computing.accepts)
        self._undo_if_removed(key, fetch.watch, disk)
        if miss not in (None, Miss.UNREADABLE, Miss.ENVIRONMENT):
            remote.note_damaged(key)
        return miss

    def _file_of(self, key: str, token_ids: tuple[int, ...], environment: str) -> bytes | None:
        """Return the document's file from disk, or made from memory, or None if neither has the document."""
        data = None if self.disk is None else self.disk.read(key)
        if data is None and self.memory is not None and self.disk is not None:
            document = self.memory.get(key, token_ids)
            if document is not None:
                data = b"".join(encode(key, document, self.disk.codec, environment))
        return data

    def _note_uploaded(self, key: str, size: int, watch: Watch) -> None:
        self._counters.note(StoreEvent("stored", "remote", bytes=size))
        self._undo_if_removed(key, watch, self.remote)

    def _undo_if_removed(self, key: str, watch: Watch, *tiers: MemoryStore | DiskStore | RemoteStore | None) -> None:
        """Remove a document that was just stored if its removal began after its request.

        A removal that begins later finds the document and removes it.
        """
        for tier in tiers if key in watch.removed else ():
            if tier is not None:
                with suppress(StoreError):  # a tier that cannot be changed has stored nothing either
                    tier.forget(key)


def _note_fault(fetch: Fetch, tier: Tier, miss: Miss) -> None:
    if miss not in (Miss.ABSENT, Miss.PAUSED):
        fetch.events.append(StoreEvent("miss", tier, reason=miss))
