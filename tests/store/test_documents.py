"""The document store: the fastest tier answers, documents are computed once, and errors of a tier stay inside."""

import asyncio
import os
import pickle
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from stores import (
    SHAPE,
    SIZE,
    Computer,
    fetch,
    fetch_kvs,
    files_of,
    ids_of,
    key_of,
    kv_of,
    layered,
    prefetch,
    run_forked,
    same,
)

from kvfusion_rag import DiskStore, DocumentStore, InvalidInputError, MemoryStore, OverloadError, StoreError
from kvfusion_rag.store import StoreEvent, as_store, namespace_key, open_store


def test_computed_documents_and_those_from_memory_and_disk_are_the_same(tmp_path):
    store = layered(tmp_path)
    assert fetch(store, range(5)) == ["computed"] * 5
    assert fetch(store, range(5)) == ["memory"] * 5
    store.memory.clear()
    assert fetch(store, range(5)) == ["disk"] * 5
    assert fetch(store, range(5)) == ["memory"] * 5
    assert fetch(layered(tmp_path), range(6)) == ["disk"] * 5 + ["computed"]


@settings(max_examples=15)
@given(st.data())
def test_any_contents_of_the_tiers_give_the_correct_documents(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("tiers")
    cap = data.draw(st.integers(1, 4)) * kv_of(0).nbytes
    disk = DiskStore(folder / "d", max_bytes=data.draw(st.integers(1, 4)) * SIZE)
    store = DocumentStore(MemoryStore(cap), disk)
    for _ in range(data.draw(st.integers(1, 6))):
        numbers = data.draw(st.lists(st.integers(0, 6), unique=True, max_size=5))
        if data.draw(st.booleans()) and files_of(disk):
            data.draw(st.sampled_from(files_of(disk))).write_bytes(data.draw(st.binary(max_size=60)))
        fetch(store, numbers)
        assert store.memory.used_bytes <= cap
        assert len(files_of(disk)) * SIZE <= disk.caps.max_bytes


def test_documents_are_written_to_the_requested_slots(tmp_path):
    store = layered(tmp_path)
    for origin in ("computed", "memory", "disk"):
        slots = {n: SHAPE.empty(ids_of(n)) for n in range(3)}
        kvs, origins, _ = fetch_kvs(store, slots, Computer(slots), into=slots)
        assert set(origins.values()) == {origin} and all(kvs[key_of(n)] is slots[n] for n in range(3))
        assert all(same(slots[n], kv_of(n)) for n in range(3))
        if origin == "memory":
            store.memory.clear()
    slots[0].keys.zero_()  # the caller uses its buffer again, which must not change what is stored
    assert fetch(store, range(3)) == ["memory"] * 3


def test_store_without_tiers_keeps_nothing():
    store = DocumentStore()
    assert fetch(store, range(2)) == fetch(store, range(2)) == ["computed"] * 2


def test_v8_gives_the_same_document_computed_or_stored(tmp_path):
    store = DocumentStore(MemoryStore(), DiskStore(tmp_path / "d", codec="v8"))
    documents = []
    for origin in ("computed", "memory", "disk"):
        kvs, origins, _ = fetch_kvs(store, [1], Computer([1]))
        assert set(origins.values()) == {origin}
        documents.append(kvs[key_of(1)])
        if origin == "memory":
            store.memory.clear()
    assert same(documents[0], documents[1]) and same(documents[1], documents[2]) and not same(documents[0], kv_of(1))


# Each document is computed once


def test_threads_that_ask_together_compute_each_document_once(tmp_path):
    store, barrier = layered(tmp_path), threading.Barrier(8)
    compute = Computer(range(6), before=lambda: time.sleep(0.005))

    def ask(seed: int):
        barrier.wait()
        return fetch(store, [(seed + n) % 6 for n in range(6)], compute)

    with ThreadPoolExecutor(8) as threads:
        origins = list(threads.map(ask, range(8)))
    assert sorted(compute.computed) == sorted(key_of(n) for n in range(6))
    assert sum(one.count("computed") for one in origins) == 6
    metrics = store.metrics
    assert metrics.lookups == 8 * 6 == metrics.computed + sum(metrics.hits.values())


def test_tasks_and_threads_together_get_the_correct_documents():
    store = DocumentStore(MemoryStore(max_bytes=4 * kv_of(0).nbytes))  # too small, so that documents are evicted

    async def main():
        return await asyncio.gather(
            *(asyncio.to_thread(fetch, store, [n % 9, (n * 7 + 1) % 9 + 10]) for n in range(60))
        )

    with ThreadPoolExecutor(8) as threads:
        running = [threads.submit(fetch, store, [n % 9]) for n in range(60)]
        asyncio.run(main())
        for one in running:
            one.result()
    assert not store._single_flight._pending


def test_threads_that_wait_for_a_failed_computation_share_the_next_one():
    store, begun, go = DocumentStore(MemoryStore()), threading.Event(), threading.Event()

    def fail() -> None:
        begun.set()
        go.wait(10)
        raise RuntimeError("no power")

    compute = Computer([1, 2], before=lambda: time.sleep(0.01))
    with ThreadPoolExecutor(5) as pool:
        first = pool.submit(fetch, store, [1, 2], Computer([1, 2], before=fail))
        begun.wait(10)
        others = [pool.submit(fetch, store, [1, 2], compute) for _ in range(4)]
        time.sleep(0.05)
        go.set()
        with pytest.raises(RuntimeError, match="no power"):
            first.result(10)
        for one in others:
            one.result(10)
    assert sorted(compute.computed) == sorted([key_of(1), key_of(2)]) and not store._single_flight._pending


def test_interrupted_computation_leaves_nothing_pending():
    store = DocumentStore(MemoryStore())

    def interrupted(keys):
        yield keys[0], kv_of(1)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fetch_kvs(store, [1, 2], interrupted)
    assert not store._single_flight._pending
    assert fetch(store, [1, 2]) == ["memory", "computed"]


def test_forked_process_can_use_the_store(tmp_path):
    store = layered(tmp_path)
    for _ in range(2):
        fetch(store, range(3))  # starts threads
        store.memory.clear()

    def child() -> None:
        assert fetch(store, [0, 1, 2, 3]) == ["disk", "disk", "disk", "computed"]

    assert run_forked(child) == 0
    assert fetch(store, [3]) == ["disk"]


def test_process_forked_during_a_computation_does_not_wait_for_it():
    store, begun, go = DocumentStore(MemoryStore()), threading.Event(), threading.Event()
    compute = Computer([1], before=lambda: (begun.set(), go.wait(30)))
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(fetch, store, [1], compute)
        begun.wait(30)
        code = run_forked(lambda: fetch(store, [1, 2]))
        go.set()
        assert first.result(30) == ["computed"]
    assert code == 0


def test_store_cannot_be_pickled(tmp_path):
    with pytest.raises(TypeError, match="open it again"):
        pickle.dumps(layered(tmp_path))


# Prefetch


def test_prefetch_loads_stored_documents_and_computes_nothing(tmp_path):
    fetch(layered(tmp_path), range(3))
    store = layered(tmp_path)
    loading = prefetch(store, *range(5))
    assert loading.result(10) == 3 == len(store.memory)
    assert not store.metrics.misses
    assert fetch(store, range(4)) == ["memory"] * 3 + ["computed"]


def test_documents_that_prefetch_does_not_find_are_computed_once(tmp_path, monkeypatch):
    store, go = layered(tmp_path), threading.Event()
    fetch(store, [9])
    store.memory.clear()
    before = store.metrics.computed
    load = store._from_files
    monkeypatch.setattr(store, "_from_files", lambda *given: go.wait(10) and load(*given))
    loading = prefetch(store, 1, 2, 3, 9)
    compute = Computer([1, 2, 3, 9], before=lambda: time.sleep(0.01))
    with ThreadPoolExecutor(4) as pool:
        waiting = [pool.submit(fetch, store, [1, 2, 3, 9], compute) for _ in range(4)]
        time.sleep(0.05)
        go.set()
        for one in waiting:
            one.result(10)
    assert loading.result(10) >= 1
    assert sorted(compute.computed) == sorted(key_of(n) for n in (1, 2, 3))
    assert store.metrics.computed == before + 3


def test_too_many_prefetches_raise_overload_error(tmp_path, monkeypatch):
    monkeypatch.setattr("kvfusion_rag.store.documents.MAX_PREFETCHES", 3)
    store, go = layered(tmp_path), threading.Event()
    monkeypatch.setattr(store, "_prefetch", lambda *_: go.wait(10))
    waiting = [prefetch(store) for _ in range(3)]
    with pytest.raises(OverloadError, match="3 calls of prefetch are unfinished"):
        prefetch(store)
    go.set()
    assert all(one.result(10) for one in waiting)
    assert prefetch(store).result(10)


# Namespaces and removal


@pytest.fixture
def full(tmp_path, shared) -> DocumentStore:
    """A store with all three tiers."""
    return DocumentStore(MemoryStore(), DiskStore(tmp_path / "disk"), shared)


def test_tenants_share_no_document_in_any_tier(full):
    assert fetch(full, range(3), namespace="a") == ["computed"] * 3
    full.flush()
    assert fetch(full, range(3), namespace="b") == ["computed"] * 3
    full.flush()
    for tier in (full.disk, full.remote):
        assert set(tier.totals()) == {namespace_key("a"), namespace_key("b")}


def test_no_ids_or_tenants_appear_in_file_names_events_logs_and_metrics(tmp_path, caplog):
    events: list[StoreEvent] = []
    store = layered(tmp_path, on_event=events.append)
    fetch(store, range(3), namespace="secret tenant")
    files_of(store.disk)[0].write_bytes(b"x")
    store.memory.clear()
    fetch(store, range(3), namespace="secret tenant")
    names = [str(file.relative_to(tmp_path)) for file in tmp_path.rglob("*")]
    text = " ".join([*names, repr(events), repr(store), caplog.text, str(store.metrics.to_dict())])
    text = text.replace(str(tmp_path), "")
    assert "secret" not in text and "tenant" not in text
    assert not any(str(ids_of(n)).strip("()") in text for n in range(3))


@pytest.mark.parametrize("remove", ["forget", "clear"])
def test_document_removed_while_it_is_computed_is_not_kept(full, remove):
    def remove_it() -> None:
        full.forget([key_of(1)]) if remove == "forget" else full.clear(namespace_key(""))

    assert fetch(full, [1], Computer([1], before=remove_it)) == ["computed"]
    full.flush()
    assert key_of(1) not in full and not full.remote.totals()
    assert fetch(full, [1]) == ["computed"] and key_of(1) in full  # later requests are kept


@pytest.mark.parametrize("remove", ["forget", "forget of others", "clear"])
def test_removals_do_not_disturb_other_documents_that_are_being_computed(full, remove):
    def remove_others() -> None:
        if remove == "clear":
            full.clear(namespace_key("other"))
        else:
            others = [key_of(n, namespace="other") for n in range(3)]
            full.forget(others if remove == "forget" else [key_of(2)])

    assert fetch(full, [0, 1], Computer([0, 1], before=remove_others)) == ["computed"] * 2
    full.flush()
    full.memory.clear()
    assert fetch(full, [0, 1]) == ["disk"] * 2 and full.remote.totals()[namespace_key("")][1] == 2


def test_document_removed_before_its_upload_ends_is_not_kept(full, monkeypatch):
    upload, waiting = full.remote.put, []
    monkeypatch.setattr(full.remote, "put", lambda *given, **options: waiting.append((given, options)))
    assert fetch(full, [1, 2]) == ["computed"] * 2
    full.forget([key_of(1)])
    for arguments, options in waiting:
        upload(*arguments, **options)
    full.flush()
    assert full.remote.totals()[namespace_key("")][1] == 1


def test_document_removed_while_it_is_loaded_is_not_kept_in_memory(tmp_path, monkeypatch):
    store = layered(tmp_path)
    fetch(store, [1])
    store.memory.clear()
    load = store.disk.get

    def load_and_remove(*given):
        miss = load(*given)
        store.forget([key_of(1)])
        return miss

    monkeypatch.setattr(store.disk, "get", load_and_remove)
    assert fetch(store, [1]) == ["disk"]
    assert key_of(1) not in store


def test_document_removed_while_it_is_downloaded_is_not_kept_on_disk(full, monkeypatch):
    fetch(full, [1])
    full.flush()
    full.memory.clear()
    full.disk.clear()
    download = full.remote.get
    monkeypatch.setattr(full.remote, "get", lambda key, size: (download(key, size), full.forget([key]))[0])
    assert fetch(full, [1]) == ["remote"]
    assert key_of(1) not in full


def test_removal_does_not_disturb_a_store_that_is_read_only(tmp_path):
    layered(tmp_path).close()
    store = DocumentStore(MemoryStore(), DiskStore(tmp_path / "disk", read_only=True))

    def clear() -> None:
        with pytest.raises(StoreError, match="read_only=True"):
            store.clear()

    assert fetch(store, [1], Computer([1], before=clear)) == ["computed"]


def test_clear_accepts_only_namespace_keys(tmp_path):
    store = layered(tmp_path)
    fetch(store, [1])
    for wrong in ("", "tenant", "../x", namespace_key("")[:31]):
        with pytest.raises(InvalidInputError, match="32 hex digits"):
            store.clear(wrong)
    assert key_of(1) in store and store.clear(namespace_key("")) == 2


def test_forget_and_clear_remove_from_every_tier(full):
    fetch(full, range(4))
    full.flush()
    assert full.forget([key_of(1), key_of(2, model="another model")]) == 6
    for number, origin in ((0, "memory"), (1, "computed"), (2, "computed"), (3, "memory")):
        assert fetch(full, [number]) == [origin]
    full.flush()
    assert full.clear(namespace_key("other")) == 0
    assert full.clear(namespace_key("")) == 12
    assert (len(full.memory), full.disk.totals(), full.remote.totals()) == (0, {}, {})


def test_forget_looks_only_at_files_of_the_document(tmp_path, monkeypatch):
    store = DocumentStore(None, DiskStore(tmp_path / "d"))
    fetch(store, range(30))
    seen, look = [], os.lstat
    monkeypatch.setattr(os, "lstat", lambda path: (seen.append(str(path)), look(path))[1])
    assert store.forget([key_of(3)]) == 1
    assert 0 < len({path for path in seen if path.endswith(".safetensors")}) <= 2


@pytest.mark.parametrize(("host", "device", "left"), [(True, "cuda", 3), (False, "cuda", 0), (True, "cpu", 0)])
def test_release_memory_empties_a_tier_that_holds_memory_of_the_device(host, device, left):
    store = DocumentStore(MemoryStore(host=host))
    fetch(store, range(3))
    released = store.release_memory(torch.device(device))
    assert len(store.memory) == left and (released == 0) == (left > 0)


# Opening


def test_as_store_accepts_names_folders_tiers_and_stores(tmp_path):
    assert as_store(None).is_empty and not as_store("memory").is_empty
    memory = MemoryStore()
    assert as_store(memory).memory is memory
    for place in (tmp_path / "s", str(tmp_path / "s"), DiskStore(tmp_path / "s")):
        assert as_store(place).disk.path == tmp_path / "s"
    store = DocumentStore()
    assert as_store(store) is store
    for wrong in (3, {}, b"s"):
        with pytest.raises(InvalidInputError, match="store is"):
            as_store(wrong)
    with pytest.raises(StoreError, match="cannot be opened"):
        as_store("nosuchprotocol://x")


def test_local_disk_of_a_url_is_in_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("KVFUSION_HOME", str(tmp_path / "home"))
    stores = [open_store(f"memory://{tmp_path.name}{number}") for number in (1, 1, 2)]
    paths = [store.disk.path for store in stores]
    assert paths[0] == paths[1] != paths[2] and {path.parent for path in paths} == {tmp_path / "home" / "store"}


def test_cap_smaller_than_one_document_is_rejected(tmp_path):
    memory = SHAPE.nbytes(5)
    stores = {
        "max_bytes of the memory": DocumentStore(MemoryStore(memory - 1)),
        "namespace_bytes of the memory": DocumentStore(MemoryStore(namespace_bytes=memory - 1)),
        "max_bytes of the disk": DocumentStore(None, DiskStore(tmp_path / "a", max_bytes=SIZE - 1)),
        "namespace_bytes of the disk": DocumentStore(None, DiskStore(tmp_path / "b", namespace_bytes=SIZE - 1)),
    }
    for name, store in stores.items():
        with pytest.raises(InvalidInputError, match=f"{name} store is .* one document with 5 tokens"):
            store.require_room(SHAPE, 5)
    DocumentStore(MemoryStore(memory), DiskStore(tmp_path / "c", max_bytes=SIZE)).require_room(SHAPE, 5)
