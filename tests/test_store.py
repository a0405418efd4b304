"""The memory tier and its keys."""

import threading

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvfusion_rag import InvalidInputError, MemoryStore
from kvfusion_rag.schema import DocumentKV
from kvfusion_rag.store import document_key

field = st.text(max_size=6)
ids = st.lists(st.integers(0, 2**40), max_size=5)


def kv(tokens: int, seed: int = 0) -> DocumentKV:
    made = torch.full((1, 1, tokens, 8), float(seed))
    return DocumentKV(made, made.clone(), tuple(range(tokens)))


@given(a=st.tuples(field, field, ids), b=st.tuples(field, field, ids))
def test_keys_are_equal_only_for_equal_fields(a, b):
    assert (document_key(*a) == document_key(*b)) == (a == b)


def test_a_key_does_not_show_the_text():
    assert len(document_key("f", "tenant", [1])) == 64 and "tenant" not in document_key("f", "tenant", [1])


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(1, 9)), max_size=40), st.integers(1, 30))
def test_bytes_stay_under_the_cap_and_are_counted_right(puts, cap_tokens):
    store = MemoryStore(max_bytes=cap_tokens * 64)
    for name, tokens in puts:
        store.put(str(name), kv(tokens))
        stats = store.stats
        assert stats.bytes <= stats.max_bytes
        kept = [k for k in map(str, range(6)) if k in store]
        assert stats.entries == len(store) == len(kept)
        found = (store.get(name, tuple(range(size))) for name in kept for size in range(1, 10))
        assert stats.bytes == sum(entry.nbytes for entry in found if entry is not None)


def test_the_least_recently_used_leaves_first():
    store = MemoryStore(max_bytes=2 * 64)
    store.put("a", kv(1))
    store.put("b", kv(1))
    assert store.get("a", (0,)) is not None
    store.put("c", kv(1))
    assert "b" not in store and "a" in store and "c" in store
    assert (store.stats.evictions, store.stats.hits) == (1, 1)


def test_a_hit_needs_the_same_token_ids():
    store = MemoryStore()
    store.put("a", kv(3))
    assert store.get("a", (0, 1, 9)) is None and store.stats.misses == 1


def test_a_document_larger_than_the_store_is_rejected_and_nothing_leaves_for_it():
    store = MemoryStore(max_bytes=64)
    store.put("a", kv(1))
    store.put("big", kv(2))
    assert "a" in store and "big" not in store and store.stats.rejected == 1


def test_clear_and_wrong_cap():
    store = MemoryStore()
    store.put("a", kv(1))
    store.clear()
    assert (len(store), store.stats.bytes) == (0, 0)
    with pytest.raises(InvalidInputError, match="max_bytes"):
        MemoryStore(max_bytes=0)


def test_threads_leave_the_byte_count_right():
    store = MemoryStore(max_bytes=20 * 64)

    def work(seed: int) -> None:
        for i in range(300):
            store.put(str((i * seed) % 37), kv(1 + i % 3))
            store.get(str(i % 37), tuple(range(1 + i % 3)))

    threads = [threading.Thread(target=work, args=(s,)) for s in range(1, 6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    stats = store.stats
    assert stats.bytes <= stats.max_bytes and stats.hits + stats.misses == 1500
