"""Counts of a store, as metrics and for Prometheus."""

import errno
import os

import prometheus_client as prometheus
from stores import SIZE, failing, fetch, files_of, kv_of, layered

from kvfusion_rag import DiskStore, DocumentStore, MemoryStore, RemoteStore, StoreEvent
from kvfusion_rag.store.prometheus import COUNTERS, GAUGES, register


def test_metrics_add_up(tmp_path):
    events: list[StoreEvent] = []
    store = layered(tmp_path, on_event=events.append)
    fetch(store, range(4))
    fetch(store, range(4))
    store.memory.clear()
    files_of(store.disk)[0].write_bytes(b"")
    assert fetch(store, range(4)).count("disk") == 3
    metrics = store.metrics
    assert metrics.lookups == 12 and metrics.hits == {"memory": 4, "disk": 3}
    assert metrics.misses == {"absent": 4, "truncated": 1} and metrics.faults == {"disk/truncated": 1}
    assert (metrics.computed, metrics.computed_tokens) == (5, 25)
    assert metrics.loaded_bytes == {"memory": 4 * kv_of(0).nbytes, "disk": 3 * kv_of(0).nbytes}
    assert metrics.stored_bytes == {"memory": 5 * kv_of(0).nbytes, "disk": 5 * SIZE}
    assert metrics.used_bytes == {"memory": 4 * kv_of(0).nbytes, "disk": 4 * SIZE}
    assert metrics.hit_rate == 7 / 12 == metrics.to_dict()["hit_rate"]
    assert {event.kind for event in events} == {"hit", "miss", "computed", "stored"}


def test_documents_that_no_tier_accepted_are_counted_by_tier(tmp_path, monkeypatch):
    remote = RemoteStore(f"memory://{tmp_path.name}")
    memory, disk = MemoryStore(kv_of(0).nbytes - 1), DiskStore(tmp_path / "d", max_bytes=2 * SIZE - 1)
    store = DocumentStore(memory, disk, remote)
    fetch(store, [0])
    store.flush()
    assert store.metrics.rejected == {"memory": 1, "disk": 0} and not any(store.metrics.failed_writes.values())
    full = failing(OSError(errno.ENOSPC, "No space left on device"))
    monkeypatch.setattr(os, "writev", full)
    monkeypatch.setattr(remote._folder.system, "pipe_file", full)
    for number in range(1, 4):  # the first write fails, and the tiers are then not used for a while
        fetch(store, [number])
        store.flush()
    metrics = store.metrics
    assert metrics.failed_writes == {"disk": 1, "remote": 1} and metrics.dropped == {"disk": 2, "remote": 2}
    assert metrics.rejected == {"memory": 4, "disk": 0}


def test_failing_callback_is_called_once(caplog):
    store = DocumentStore(MemoryStore(), on_event=failing(RuntimeError("mine")))
    assert fetch(store, range(3)) == ["computed"] * 3
    assert len(caplog.records) == 1


def test_prometheus_reports_the_counts_of_the_store(tmp_path):
    store = layered(tmp_path)
    registry = prometheus.CollectorRegistry()
    register(store, registry)
    for _ in range(2):
        fetch(store, range(3))
    metrics = store.metrics.to_dict()
    for name, (_, label) in COUNTERS.items():
        for key, value in ({"": metrics[name]} if label is None else metrics[name]).items():
            labels = {} if label is None else {label: key}
            assert registry.get_sample_value(f"kvfusion_store_{name}_total", labels) == value
    for name in GAUGES:
        for tier in ("memory", "disk"):
            assert registry.get_sample_value(f"kvfusion_store_{name}", {"tier": tier}) == metrics[name][tier] > 0
    assert set(metrics) == {*COUNTERS, *GAUGES, "hit_rate"}
