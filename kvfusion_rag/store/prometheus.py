"""The counts of a document store for Prometheus, read when a scrape asks; needs the extra ``metrics``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from ..errors import MissingDependencyError
from .documents import DocumentStore

try:
    from prometheus_client import REGISTRY, CollectorRegistry
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
except ImportError as error:
    raise MissingDependencyError('metrics need prometheus-client: pip install "kvfusion-rag[metrics]".') from error


class StoreCollector:
    """Gives ``store.metrics`` to a registry: ``register(store)`` once, and no more is to be done."""

    def __init__(self, store: DocumentStore) -> None:
        self._store = store

    def collect(self) -> Iterator[Metric]:
        found = self._store.metrics
        yield _counter("lookups", "Documents asked for.", {"": found.lookups}, None)
        yield _counter("hits", "Documents found, by tier.", found.hits, "tier")
        yield _counter("misses", "Documents not found, by reason.", found.misses, "reason")
        yield _counter("faults", "Documents that were there but of no use, by tier and reason.", found.faults, "fault")
        yield _counter("computed", "Documents prefilled.", {"": found.computed}, None)
        yield _counter("computed_tokens", "Tokens prefilled.", {"": found.computed_tokens}, None)
        yield _counter("prefill_seconds", "Seconds spent prefilling.", {"": found.prefill_seconds}, None)
        yield _counter("loaded_bytes", "Bytes loaded, by tier.", found.loaded_bytes, "tier")
        yield _counter("load_seconds", "Seconds spent loading, by tier.", found.load_seconds, "tier")
        yield _counter("stored_bytes", "Bytes written, by tier.", found.stored_bytes, "tier")
        yield _counter("store_seconds", "Seconds spent writing, by tier.", found.store_seconds, "tier")
        yield _counter("rejected", "Documents that found no room, by tier.", found.rejected, "tier")
        yield _counter("dropped", "Documents whose writing was not tried, by tier.", found.dropped, "tier")
        yield _counter("failed_writes", "Documents whose writing failed, by tier.", found.failed_writes, "tier")
        yield _counter("evictions", "Documents that made room, by tier.", found.evictions, "tier")
        for name, about, values in (
            ("used_bytes", "Bytes held, by tier.", found.used_bytes),
            ("entries", "Documents held, by tier.", found.entries),
        ):
            gauge = GaugeMetricFamily(f"kvfusion_store_{name}", about, labels=["tier"])
            for tier, value in values.items():
                gauge.add_metric([tier], value)
            yield gauge


def register(store: DocumentStore, registry: CollectorRegistry = REGISTRY) -> StoreCollector:
    """Show ``store`` in a registry, by default the process's own."""
    collector = StoreCollector(store)
    registry.register(collector)  # pyright: ignore[reportArgumentType]  # a collector by its method
    return collector


def _counter(name: str, about: str, values: Mapping[str, float], label: str | None) -> CounterMetricFamily:
    family = CounterMetricFamily(f"kvfusion_store_{name}", about, labels=[] if label is None else [label])
    for key, value in values.items():
        family.add_metric([] if label is None else [key], value)
    return family
