"""Counts of a store as plain data, and the events that they are made from."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import Any, Literal

from ..model.forks import fork_safe_lock

logger = logging.getLogger(__name__)

Tier = Literal["memory", "disk", "remote"]


class Miss(StrEnum):
    """Reason why a tier could not return a document."""

    ABSENT = "absent"
    TRUNCATED = "truncated"  # the file has the wrong size
    HEADER = "header"  # the file is for another document, model or format
    CHECKSUM = "checksum"
    TOKENS = "tokens"
    NUMBERS = "numbers"  # infinite or NaN
    UNREADABLE = "unreadable"  # the system reported an error
    LATE = "late"  # the remote store took too long
    ENVIRONMENT = "environment"  # computed in an environment whose KVs differ from this one's by more than rounding
    PAUSED = "paused"  # the remote store is not used for a while after an error


@dataclass(frozen=True, slots=True)
class StoreEvent:
    """One event of a store. It never contains text, token ids or namespaces.

    Attributes:
        kind: "hit", "miss", "computed", "stored" or "forgotten".
        tier: the tier concerned. A miss without a tier means that no tier had the document.
        reason: a value of :class:`Miss`, for misses.
        documents: number of documents.
        tokens, bytes, seconds: totals of these documents, 0 if unknown.
    """

    kind: Literal["hit", "miss", "computed", "stored", "forgotten"]
    tier: Tier | None = None
    reason: str | None = None
    documents: int = 1
    tokens: int = 0
    bytes: int = 0
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class StoreMetrics:
    """Counts since this process opened the store. Mappings are by tier unless stated otherwise.

    Attributes:
        lookups: documents requested, counted once even if several tiers were asked.
        hits: documents found.
        misses: documents that no tier had, by the reason of the last tier asked.
        faults: documents that were present but unusable, by ``tier/reason``.
        computed, computed_tokens, prefill_seconds: documents prefilled after a miss.
        loaded_bytes, load_seconds: cost of the hits.
        stored_bytes, store_seconds: cost of the writes. Remote writes run in the background.
        used_bytes, entries: current contents.
        evictions: documents removed to make room.
        rejected: documents that did not fit: larger than a cap, or too many while another process held the index.
        failed_writes: writes that failed, for example on a full disk.
        dropped: writes that were not tried: shortly after a failed write, or because the remote queue was full.
    """

    lookups: int = 0
    hits: Mapping[str, int] = field(default_factory=dict[str, int])
    misses: Mapping[str, int] = field(default_factory=dict[str, int])
    faults: Mapping[str, int] = field(default_factory=dict[str, int])
    computed: int = 0
    computed_tokens: int = 0
    prefill_seconds: float = 0.0
    loaded_bytes: Mapping[str, int] = field(default_factory=dict[str, int])
    load_seconds: Mapping[str, float] = field(default_factory=dict[str, float])
    stored_bytes: Mapping[str, int] = field(default_factory=dict[str, int])
    store_seconds: Mapping[str, float] = field(default_factory=dict[str, float])
    used_bytes: Mapping[str, int] = field(default_factory=dict[str, int])
    entries: Mapping[str, int] = field(default_factory=dict[str, int])
    evictions: Mapping[str, int] = field(default_factory=dict[str, int])
    rejected: Mapping[str, int] = field(default_factory=dict[str, int])
    failed_writes: Mapping[str, int] = field(default_factory=dict[str, int])
    dropped: Mapping[str, int] = field(default_factory=dict[str, int])

    @property
    def hit_rate(self) -> float:
        """Share of lookups that some tier answered, 0 before the first lookup."""
        return sum(self.hits.values()) / self.lookups if self.lookups else 0.0

    def to_dict(self) -> dict[str, Any]:
        """Return all counts and the hit rate as plain data."""
        return {**asdict(self), "hit_rate": self.hit_rate}


@dataclass(frozen=True, slots=True)
class UploadReport:
    """What has become of uploads to a remote store since the last report. It is true if all documents are stored.

    Attributes:
        unfinished: documents whose upload has not ended.
        lost: the reason for each document that was not uploaded, by store key. At most 10,000 are named.
    """

    unfinished: int = 0
    lost: Mapping[str, str] = field(default_factory=dict[str, str])

    def __bool__(self) -> bool:
        return not self.unfinished and not self.lost


class Counters:
    """Adds up events and passes each one to a callback."""

    def __init__(self, on_event: Callable[[StoreEvent], None] | None) -> None:
        self._on_event = on_event
        self._lock = fork_safe_lock()
        # Both are keyed by the names of StoreMetrics' fields.
        self._totals: defaultdict[str, Any] = defaultdict(int)
        self._labelled: defaultdict[str, defaultdict[str, Any]] = defaultdict(lambda: defaultdict(int))

    def note_all(self, events: Iterable[StoreEvent]) -> None:
        for event in events:
            self.note(event)

    def note(self, event: StoreEvent) -> None:
        """Count ``event`` and call the callback, which is not called again once it has failed."""
        with self._lock:
            self._add(event)
        if self._on_event is not None:
            try:
                self._on_event(event)
            except Exception:  # an error of the caller's code must not reach an answer
                self._on_event = None
                logger.exception("the store's on_event failed and will not be called again")

    def snapshot(self, current: Mapping[str, Mapping[str, int]]) -> StoreMetrics:
        """Return the counts together with ``current``, the counts that the tiers keep themselves."""
        with self._lock:
            labelled = {name: dict(values) for name, values in self._labelled.items()}
            counts: dict[str, Any] = {**self._totals, **labelled, **current}
            return StoreMetrics(**counts)

    def _add(self, event: StoreEvent) -> None:
        totals, labelled, tier = self._totals, self._labelled, event.tier
        if event.kind == "hit" and tier is not None:
            totals["lookups"] += event.documents
            labelled["hits"][tier] += event.documents
            labelled["loaded_bytes"][tier] += event.bytes
            labelled["load_seconds"][tier] += event.seconds
        elif event.kind == "miss":
            reason = str(event.reason)  # a plain string, so that reports do not show the enum's name
            if tier is None:
                totals["lookups"] += event.documents
                labelled["misses"][reason] += event.documents
            else:
                labelled["faults"][f"{tier}/{reason}"] += event.documents
        elif event.kind == "computed":
            totals["computed"] += event.documents
            totals["computed_tokens"] += event.tokens
            totals["prefill_seconds"] += event.seconds
        elif event.kind == "stored" and tier is not None:
            labelled["stored_bytes"][tier] += event.bytes
            labelled["store_seconds"][tier] += event.seconds
