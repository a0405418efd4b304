"""Exposes the counts of a document store to Prometheus, read at each scrape. Needs the extra ``metrics``."""

from __future__ import annotations

from collections.abc import Iterator

from ..errors import MissingDependencyError
from .documents import DocumentStore

try:
    from prometheus_client import REGISTRY, CollectorRegistry
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
except ImportError as error:
    raise MissingDependencyError.of_extra("the metrics page", "prometheus-client", "metrics") from error

# Field of StoreMetrics: help text, and the label of its values (None for a single value).
COUNTERS: dict[str, tuple[str, str | None]] = {
    "lookups": ("Documents requested.", None),
    "hits": ("Documents found, by tier.", "tier"),
    "misses": ("Documents not found, by reason.", "reason"),
    "faults": ("Documents present but unusable, by tier and reason.", "fault"),
    "computed": ("Documents prefilled.", None),
    "computed_tokens": ("Tokens prefilled.", None),
    "prefill_seconds": ("Seconds spent on prefill.", None),
    "loaded_bytes": ("Bytes loaded, by tier.", "tier"),
    "load_seconds": ("Seconds spent loading, by tier.", "tier"),
    "stored_bytes": ("Bytes written, by tier.", "tier"),
    "store_seconds": ("Seconds spent writing, by tier.", "tier"),
    "rejected": ("Documents that did not fit, by tier.", "tier"),
    "dropped": ("Writes that were not tried, by tier.", "tier"),
    "failed_writes": ("Writes that failed, by tier.", "tier"),
    "evictions": ("Documents evicted, by tier.", "tier"),
}
GAUGES = {"used_bytes": "Bytes held, by tier.", "entries": "Documents held, by tier."}


class StoreCollector:
    """Reports ``store.metrics`` to a Prometheus registry."""

    def __init__(self, store: DocumentStore) -> None:
        self._store = store

    def collect(self) -> Iterator[Metric]:
        metrics = self._store.metrics
        for name, (about, label) in COUNTERS.items():
            counter = CounterMetricFamily(f"kvfusion_store_{name}", about, labels=[] if label is None else [label])
            value = getattr(metrics, name)
            for key, one in ({"": value} if label is None else value).items():
                counter.add_metric([] if label is None else [key], one)
            yield counter
        for name, about in GAUGES.items():
            gauge = GaugeMetricFamily(f"kvfusion_store_{name}", about, labels=["tier"])
            for tier, value in getattr(metrics, name).items():
                gauge.add_metric([tier], value)
            yield gauge


def register(store: DocumentStore, registry: CollectorRegistry = REGISTRY) -> StoreCollector:
    """Add the counts of ``store`` to a registry (default: the global one)."""
    collector = StoreCollector(store)
    registry.register(collector)  # pyright: ignore[reportArgumentType]  # any object with collect() will do
    return collector
