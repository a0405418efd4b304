"""The counts of a store as Prometheus shows them."""

import prometheus_client as prometheus
from stores import CPU, SHAPE, Computer, wanted_of

from kvfusion_rag import DiskStore, DocumentStore, MemoryStore
from kvfusion_rag.store.prometheus import register


def test_a_scrape_shows_the_counts_of_the_store(tmp_path):
    store = DocumentStore(MemoryStore(), DiskStore(tmp_path / "d"), load="always")
    registry = prometheus.CollectorRegistry()
    register(store, registry)
    for _ in range(2):
        store.fetch(wanted_of(range(3)), SHAPE, CPU, "model", Computer(range(3)))
    metrics = store.metrics
    values = {
        "kvfusion_store_lookups_total": metrics.lookups,
        "kvfusion_store_computed_total": 3,
        "kvfusion_store_computed_tokens_total": 15,
    }
    for name, value in values.items():
        assert registry.get_sample_value(name) == value
    assert registry.get_sample_value("kvfusion_store_hits_total", {"tier": "memory"}) == 3
    assert registry.get_sample_value("kvfusion_store_misses_total", {"reason": "absent"}) == 3
    for tier in ("memory", "disk"):
        assert registry.get_sample_value("kvfusion_store_used_bytes", {"tier": tier}) == metrics.used_bytes[tier]
    for name in ("rejected", "dropped", "failed_writes"):
        assert registry.get_sample_value(f"kvfusion_store_{name}_total", {"tier": "disk"}) == 0
    assert "kvfusion_store_load_seconds_total" in prometheus.generate_latest(registry).decode()
