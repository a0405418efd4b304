"""Keys, and the memory tier."""

import threading

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvfusion_rag import InvalidInputError, MemoryStore
from kvfusion_rag.model.kv import DocumentKV
from kvfusion_rag.store import document_key, namespace_key, require_namespace
from kvfusion_rag.store.keys import document_part, is_key

field = st.text(max_size=6)
ids = st.lists(st.integers(0, 2**40), max_size=5)


def kv(tokens: int, seed: int = 0) -> DocumentKV:
    made = torch.full((1, 1, tokens, 8), float(seed))
    return DocumentKV(made, made.clone(), tuple(range(tokens)))


@given(a=st.tuples(field, field, ids), b=st.tuples(field, field, ids))
def test_i7_keys_are_equal_only_for_equal_fields(a, b):
    one, other = document_key(*a), document_key(*b)
    assert (one == other) == (a == b)
    assert is_key(one) and one.startswith(namespace_key(a[1]))
    assert (document_part(one) == document_part(other)) == (a[1:] == b[1:])


def test_t5_a_key_does_not_show_the_text():
    key = document_key("fingerprint", "tenant", [1])
    assert "tenant" not in key and "fingerprint" not in key


@pytest.mark.parametrize("name", ["../other", "a/b", "a\\b", "..", ".", "a\0b", "x" * 129, "\ud800", None, 3, "é"])
def test_t4_a_namespace_is_a_plain_name(name):
    with pytest.raises(InvalidInputError, match="namespace is"):
        require_namespace(name)


@pytest.mark.parametrize("name", ["", "tenant 1", "user@example.org", "a.b:c"])
def test_plain_names_are_namespaces(name):
    require_namespace(name)


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(1, 9)), max_size=40), st.integers(1, 30), st.integers(1, 30))
def test_bytes_stay_under_both_caps_and_are_counted_right(puts, cap_tokens, namespace_tokens):
    store = MemoryStore(max_bytes=cap_tokens * 64, namespace_bytes=namespace_tokens * 64)
    names = [f"{'ab'[n % 2]}-{n}" for n in range(6)]
    for number, tokens in puts:
        kept = store.put(names[number], kv(tokens))
        assert kept == (names[number] in store)
        stats = store.stats
        held = {n: store.get(n, tuple(range(size))) for n in names for size in range(1, 10) if n in store}
        entries = [e for n in names for size in range(1, 10) if (e := store.get(n, tuple(range(size)))) is not None]
        assert stats.entries == len(store) == len(held) == len(entries)
        assert stats.bytes == sum(e.nbytes for e in entries) <= stats.max_bytes
        for namespace in "ab":
            own = [store.get(n, tuple(range(s))) for n in names if n[0] == namespace for s in range(1, 10)]
            assert sum(e.nbytes for e in own if e is not None) <= namespace_tokens * 64


def test_the_least_recently_used_leaves_first():
    store = MemoryStore(max_bytes=2 * 64)
    store.put("a", kv(1))
    store.put("b", kv(1))
    assert store.get("a", (0,)) is not None
    store.put("c", kv(1))
    assert "b" not in store and "a" in store and "c" in store
    assert (store.stats.evictions, store.stats.hits) == (1, 1)


def test_what_is_pinned_stays():
    store = MemoryStore(max_bytes=2 * 64)
    store.put("a", kv(1))
    store.put("b", kv(1))
    assert store.get("a", (0,), pin=True) is not None and store.get("a", (0,), pin=True) is not None
    store.put("c", kv(1))
    assert "a" in store and "b" not in store and store.stats.pinned == 1
    assert not store.put("d", kv(2)) and {"a", "c"} <= {n for n in "abcd" if n in store} | {"c"}
    store.unpin("a")
    assert not store.put("e", kv(2)) and "a" in store
    store.unpin("a")
    assert store.put("f", kv(2)) and "a" not in store and store.stats.pinned == 0


def test_t3_one_tenant_cannot_make_anothers_documents_leave():
    store = MemoryStore(max_bytes=8 * 64, namespace_bytes=4 * 64)
    for n in range(4):
        store.put(f"b-{n}", kv(1))
    for n in range(50):
        store.put(f"a-{n}", kv(1))
    assert all(f"b-{n}" in store for n in range(4)) and store.stats.entries == 8


def test_t3_full_store_a_tenants_own_documents_leave_before_anothers():
    store = MemoryStore(max_bytes=8 * 64, namespace_bytes=4 * 64)
    for name in "ab":
        for n in range(4):
            store.put(f"{name}-{n}", kv(1))
    for n in range(6):
        assert store.put(f"c-{n}", kv(1))
    left = {name: sum(f"{name}-{n}" in store for n in range(6)) for name in "abc"}
    assert left == {"a": 3, "b": 4, "c": 1}  # as of a disk store


def test_a_hit_needs_the_same_token_ids():
    store = MemoryStore()
    store.put("a", kv(3))
    assert store.get("a", (0, 1, 9)) is None and store.stats.misses == 1


def test_a_document_larger_than_the_store_is_rejected_and_nothing_leaves_for_it():
    store = MemoryStore(max_bytes=64)
    store.put("a", kv(1))
    assert not store.put("big", kv(2))
    assert "a" in store and "big" not in store and store.stats.rejected == 1


@pytest.mark.parametrize("caps", [{"max_bytes": 0}, {"max_bytes": True}, {"namespace_bytes": -1}])
def test_wrong_caps(caps):
    with pytest.raises(InvalidInputError, match=next(iter(caps))):
        MemoryStore(**caps)


def test_clear():
    store = MemoryStore()
    store.put("a", kv(1))
    store.clear()
    assert (len(store), store.stats.bytes) == (0, 0)


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
