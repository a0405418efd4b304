"""Metrics of the ingress and of all replicas on one page. Those of a replica have its id as the label ``replica``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TypeAlias

from ...errors import MissingDependencyError
from ...store import DocumentStore

try:
    from prometheus_client import CollectorRegistry, generate_latest
    from prometheus_client.core import GaugeMetricFamily, Metric
except ImportError as error:
    raise MissingDependencyError.of_extra("the metrics page", "prometheus-client", "metrics") from error

from ...store.prometheus import StoreCollector

Sample: TypeAlias = tuple[str, dict[str, str], float]
Family: TypeAlias = tuple[str, str, str, list[Sample]]  # name, help text, type, samples


def replica_families(under_way: int, store: DocumentStore | None) -> list[Family]:
    """Return the requests in progress and the counts of a store as plain data."""
    requests = GaugeMetricFamily("kvfusion_replica_requests_under_way", "Requests in progress.", value=under_way)
    stored = () if store is None else StoreCollector(store).collect()
    return [
        (one.name, one.documentation, one.type, [(s.name, s.labels, s.value) for s in one.samples])
        for one in (requests, *stored)
    ]


def page_of(requests: CollectorRegistry, replicas: Mapping[str, Sequence[Family]]) -> bytes:
    """Return the page for Prometheus: the requests of the ingress, and the families of each replica by its id."""
    registry = CollectorRegistry()
    registry.register(_Merged(replicas))  # pyright: ignore[reportArgumentType]  # any object with collect() will do
    return generate_latest(requests) + generate_latest(registry)


class _Merged:
    """One family for all replicas, because a page may have each name only once."""

    def __init__(self, replicas: Mapping[str, Sequence[Family]]) -> None:
        self._replicas = replicas

    def collect(self) -> Iterator[Metric]:
        merged: dict[str, Metric] = {}
        for replica, families in self._replicas.items():
            for name, about, kind, samples in families:
                metric = merged.setdefault(name, Metric(name, about, kind))
                for sample, labels, value in samples:
                    metric.add_sample(sample, {**labels, "replica": replica}, value)
        yield from merged.values()
