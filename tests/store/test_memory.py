"""The memory tier: byte caps and eviction."""

import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvfusion_rag import InvalidInputError, MemoryStore
from kvfusion_rag.model.kv import DocumentKV


def kv(tokens: int) -> DocumentKV:
    """A document KV of 64 bytes per token."""
    numbers = torch.zeros((1, 1, tokens, 8))
    return DocumentKV(numbers, numbers.clone(), tuple(range(tokens)))


def present(store: MemoryStore, prefix: str) -> int:
    return sum(f"{prefix}-{n}" in store for n in range(50))


@settings(max_examples=50)
@given(st.lists(st.tuples(st.integers(0, 5), st.integers(1, 9)), max_size=40), st.integers(1, 30), st.integers(1, 30))
def test_both_caps_hold_and_bytes_are_counted_correctly(puts, cap_tokens, namespace_tokens):
    store = MemoryStore(max_bytes=cap_tokens * 64, namespace_bytes=namespace_tokens * 64)
    names = [f"{'ab'[n % 2]}-{n}" for n in range(6)]
    for number, tokens in puts:
        assert store.put(names[number], kv(tokens)) == (names[number] in store)
        sizes = {
            name: size * 64
            for name in names
            for size in range(1, 10)
            if name in store and store.get(name, tuple(range(size))) is not None
        }
        assert len(store) == len(sizes)
        assert store.used_bytes == sum(sizes.values()) <= cap_tokens * 64
        for namespace in "ab":
            assert sum(size for name, size in sizes.items() if name[0] == namespace) <= namespace_tokens * 64


def test_least_recently_used_document_is_evicted_first():
    store = MemoryStore(max_bytes=2 * 64)
    store.put("a", kv(1))
    store.put("b", kv(1))
    assert store.get("a", (0,)) is not None
    store.put("c", kv(1))
    assert "b" not in store and "a" in store and "c" in store
    assert store.evictions == 1


def test_one_tenant_cannot_evict_documents_of_another():
    store = MemoryStore(max_bytes=8 * 64, namespace_bytes=4 * 64)
    for name, count in (("b", 4), ("a", 50)):
        for n in range(count):
            store.put(f"{name}-{n}", kv(1))
    assert present(store, "b") == 4 and len(store) == 8


def test_full_store_evicts_documents_of_the_writer_first():
    store = MemoryStore(max_bytes=8 * 64, namespace_bytes=4 * 64)
    for name, count in (("a", 4), ("b", 4), ("c", 6)):
        for n in range(count):
            assert store.put(f"{name}-{n}", kv(1))
    assert {name: present(store, name) for name in "abc"} == {"a": 3, "b": 4, "c": 1}  # as in a disk store


def test_hit_needs_the_same_token_ids():
    store = MemoryStore()
    store.put("a", kv(3))
    assert store.get("a", (0, 1, 9)) is None


def test_document_larger_than_the_cap_is_rejected_and_evicts_nothing():
    store = MemoryStore(max_bytes=64)
    store.put("a", kv(1))
    assert not store.put("big", kv(2))
    assert "a" in store and "big" not in store and store.rejected == 1


@pytest.mark.parametrize("caps", [{"max_bytes": 0}, {"max_bytes": True}, {"namespace_bytes": -1}])
def test_wrong_caps_are_rejected(caps):
    with pytest.raises(InvalidInputError, match=next(iter(caps))):
        MemoryStore(**caps)


def test_clear_empties_the_store():
    store = MemoryStore()
    store.put("a", kv(1))
    assert store.clear() == 1 and (len(store), store.used_bytes) == (0, 0)


def test_counts_are_correct_after_use_by_several_threads():
    store = MemoryStore(max_bytes=20 * 64)

    def work(seed: int) -> None:
        for i in range(300):
            store.put(str((i * seed) % 37), kv(1 + i % 3))
            store.get(str(i % 37), tuple(range(1 + i % 3)))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(1, 6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    sizes = [size for n in range(37) for size in (1, 2, 3) if store.get(str(n), tuple(range(size))) is not None]
    assert store.used_bytes == 64 * sum(sizes) <= 20 * 64 and len(store) == len(sizes)
