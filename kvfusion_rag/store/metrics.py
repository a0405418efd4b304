"""What a store counts, as plain data, and as Prometheus metrics for those who want them."""

from __future__ import annotations

import logging
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

logger = logging.getLogger(__name__)

Tier = Literal["memory", "disk", "remote"]


@dataclass(frozen=True, slots=True)
class StoreEvent:
    """One thing that happened; never holds text, ids or namespaces.

    Attributes:
        kind: "hit", "miss" (``reason`` says why, of which ``tier``), "computed", "stored", "forgotten".
        tokens, bytes, seconds: of the documents concerned, as far as they are known.
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
    """Counts since the store was opened by this process.

    Attributes:
        lookups: documents asked for, each once however many tiers were asked.
        hits: by tier.
        misses: by reason; of those that no tier had, the reason of the last tier asked.
        faults: by ``tier/reason``: what was there but could not be used.
        computed, computed_tokens, prefill_seconds: documents that were prefilled because they were not found.
        loaded_bytes, load_seconds: by tier.
        stored_bytes, store_seconds: by tier, of what was not there already; a remote tier is written to in the
            background.
        used_bytes, entries: by tier, now.
        evictions: documents that made room, by tier.
        rejected: documents that found no room, by tier: larger than a cap, behind others in use, or with the index of
            the disk held by another process.
        failed_writes: by tier, as on a full disk.
        dropped: documents whose writing was not tried, by tier: for a while after a write that failed, or with too
            many waiting for the remote tier already.
    """

    lookups: int = 0
    hits: Mapping[str, int] = field(default_factory=dict)
    misses: Mapping[str, int] = field(default_factory=dict)
    faults: Mapping[str, int] = field(default_factory=dict)
    computed: int = 0
    computed_tokens: int = 0
    prefill_seconds: float = 0.0
    loaded_bytes: Mapping[str, int] = field(default_factory=dict)
    load_seconds: Mapping[str, float] = field(default_factory=dict)
    stored_bytes: Mapping[str, int] = field(default_factory=dict)
    store_seconds: Mapping[str, float] = field(default_factory=dict)
    used_bytes: Mapping[str, int] = field(default_factory=dict)
    entries: Mapping[str, int] = field(default_factory=dict)
    evictions: Mapping[str, int] = field(default_factory=dict)
    rejected: Mapping[str, int] = field(default_factory=dict)
    failed_writes: Mapping[str, int] = field(default_factory=dict)
    dropped: Mapping[str, int] = field(default_factory=dict)

    @property
    def hit_rate(self) -> float:
        """Share of the documents asked for that some tier had; 0 before the first."""
        return sum(self.hits.values()) / self.lookups if self.lookups else 0.0

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "hit_rate": self.hit_rate}


class Counters:
    """Counts events, and hands each on to a callback."""

    def __init__(self, on_event: Callable[[StoreEvent], None] | None) -> None:
        self._on_event = on_event
        self._lock = threading.Lock()
        self._lookups = self._computed = self._computed_tokens = 0
        self._prefill_seconds = 0.0
        self._hits, self._misses, self._faults = Counter[str](), Counter[str](), Counter[str]()
        self._loaded, self._stored = Counter[str](), Counter[str]()
        self._load_seconds: dict[str, float] = {}
        self._store_seconds: dict[str, float] = {}

    def note_all(self, events: Iterable[StoreEvent]) -> None:
        for event in events:
            self.note(event)

    def note(self, event: StoreEvent) -> None:
        with self._lock:
            if event.kind == "hit" and event.tier is not None:
                self._lookups += event.documents
                self._hits[event.tier] += event.documents
                self._loaded[event.tier] += event.bytes
                self._load_seconds[event.tier] = self._load_seconds.get(event.tier, 0.0) + event.seconds
            elif event.kind == "miss":
                reason = str(event.reason or "absent")  # an enum's name would show in every report
                if event.tier is not None and reason != "absent":
                    self._faults[f"{event.tier}/{reason}"] += event.documents
                if event.tier is None:
                    self._lookups += event.documents
                    self._misses[reason] += event.documents
            elif event.kind == "computed":
                self._computed += event.documents
                self._computed_tokens += event.tokens
                self._prefill_seconds += event.seconds
            elif event.kind == "stored" and event.tier is not None:
                self._stored[event.tier] += event.bytes
                self._store_seconds[event.tier] = self._store_seconds.get(event.tier, 0.0) + event.seconds
        if self._on_event is not None:
            try:
                self._on_event(event)
            except Exception:  # the caller's code must not take an answer down
                self._on_event = None
                logger.exception("the store's on_event failed and is not called again")

    def snapshot(self, **now: Mapping[str, int]) -> StoreMetrics:
        """The counts, with those that the tiers keep themselves, by tier, as they are now."""
        with self._lock:
            return StoreMetrics(
                self._lookups,
                dict(self._hits),
                dict(self._misses),
                dict(self._faults),
                self._computed,
                self._computed_tokens,
                self._prefill_seconds,
                dict(self._loaded),
                dict(self._load_seconds),
                dict(self._stored),
                dict(self._store_seconds),
                **now,
            )
