"""The document store: the fastest tier that has a document, one computation however many ask, no fault that shows."""

import asyncio
import errno
import itertools
import multiprocessing
import os
import pickle
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import fsspec
import pytest
import torch
from fsspec.asyn import AsyncFileSystem
from hypothesis import given, settings
from hypothesis import strategies as st
from stores import CPU, SHAPE, Computer, files_of, ids_of, key_of, kv_of, same, wanted_of

from kvfusion_rag import (
    DiskStore,
    DocumentStore,
    InvalidInputError,
    MemoryStore,
    OverloadError,
    RemoteStore,
    StoreError,
    StoreEvent,
)
from kvfusion_rag.store import KVRequest, Miss, as_store, namespace_key, open_store
from kvfusion_rag.store.documents import _on_device
from kvfusion_rag.store.format import encode, layout
from kvfusion_rag.store.policy import LoadPolicy

SIZE = layout(key_of(1), 5, SHAPE, "raw").total


def fetch(store: DocumentStore, numbers, compute=None, namespace="", **options):
    numbers = list(numbers)
    compute = compute or Computer(numbers, namespace=namespace)
    found, origins, _ = store.fetch(wanted_of(numbers, namespace=namespace), SHAPE, CPU, "model", compute, **options)
    for number in numbers if options.get("keep", True) else ():
        assert same(found[key_of(number, namespace=namespace)], kv_of(number))
    return [origins[key_of(number, namespace=namespace)] for number in numbers]


def layered(tmp_path, **options) -> DocumentStore:
    return DocumentStore(MemoryStore(), DiskStore(tmp_path / "disk"), load="always", **options)


def test_c2_computed_from_memory_and_from_disk_are_the_same(tmp_path):
    store = layered(tmp_path)
    assert fetch(store, range(5)) == ["computed"] * 5
    assert fetch(store, range(5)) == ["memory"] * 5
    store.memory.clear()
    assert fetch(store, range(5)) == ["disk"] * 5
    assert fetch(store, range(5)) == ["memory"] * 5
    assert fetch(layered(tmp_path), range(6)) == ["disk"] * 5 + ["computed"]


@given(st.data())
@settings(deadline=None, max_examples=25)
def test_whatever_the_tiers_hold_the_right_kv_comes(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("tiers")
    memory = MemoryStore(max_bytes=data.draw(st.integers(1, 4)) * kv_of(0).nbytes)
    store = DocumentStore(
        memory, DiskStore(folder / "d", max_bytes=data.draw(st.integers(1, 4)) * SIZE), load="always"
    )
    for _ in range(data.draw(st.integers(1, 6))):
        numbers = data.draw(st.lists(st.integers(0, 6), unique=True, max_size=5))
        if data.draw(st.booleans()) and files_of(store.disk):
            data.draw(st.sampled_from(files_of(store.disk))).write_bytes(data.draw(st.binary(max_size=60)))
        fetch(store, numbers)
        assert memory.stats.bytes <= memory.max_bytes
        assert len(files_of(store.disk)) * SIZE <= store.disk.caps.total


def test_documents_are_put_into_the_slots_that_were_named(tmp_path):
    store = layered(tmp_path)
    for origin in ("computed", "memory", "disk"):
        slots = {n: SHAPE.empty(ids_of(n)) for n in range(3)}
        wanted = {key_of(n): KVRequest(ids_of(n), slots[n]) for n in range(3)}
        found, origins, _ = store.fetch(wanted, SHAPE, CPU, "model", Computer(range(3)))
        assert set(origins.values()) == {origin} and all(found[key_of(n)] is slots[n] for n in range(3))
        assert all(same(slots[n], kv_of(n)) for n in range(3))
        if origin == "memory":
            store.memory.clear()
    slots[0].keys.zero_()  # a buffer that is used again changes nothing that is kept
    assert fetch(store, range(3)) == ["memory"] * 3


def test_a_store_without_tiers_keeps_nothing():
    store = DocumentStore()
    assert fetch(store, range(2)) == fetch(store, range(2)) == ["computed"] * 2


def test_v8_answers_the_same_whether_computed_or_stored(tmp_path):
    store = DocumentStore(MemoryStore(), DiskStore(tmp_path / "d", codec="v8"), load="always")
    found = []
    for origin in ("computed", "memory", "disk"):
        kvs, origins, _ = store.fetch(wanted_of([1]), SHAPE, CPU, "model", Computer([1]))
        assert set(origins.values()) == {origin}
        found.append(kvs[key_of(1)])
        if origin == "memory":
            store.memory.clear()
    assert same(found[0], found[1]) and same(found[1], found[2]) and not same(found[0], kv_of(1))


# One computation however many ask


def test_l1_threads_that_ask_together_compute_each_document_once(tmp_path):
    store, barrier = layered(tmp_path), threading.Barrier(16)
    compute = Computer(range(6), before=lambda: time.sleep(0.01))

    def ask(seed: int):
        barrier.wait()
        return fetch(store, [(seed + n) % 6 for n in range(6)], compute)

    with ThreadPoolExecutor(16) as threads:
        origins = list(threads.map(ask, range(16)))
    assert sorted(compute.asked) == sorted(key_of(n) for n in range(6))
    assert sum(one.count("computed") for one in origins) == 6
    metrics = store.metrics
    assert metrics.lookups == 16 * 6 == metrics.computed + sum(metrics.hits.values())


def test_l1_asyncio_tasks_and_threads_mixed_equal_serial_ones():
    store = DocumentStore(MemoryStore(max_bytes=4 * kv_of(0).nbytes))  # far too small, so that all is in motion

    async def main():
        return await asyncio.gather(
            *(asyncio.to_thread(fetch, store, [n % 9, (n * 7 + 1) % 9 + 10]) for n in range(200))
        )

    with ThreadPoolExecutor(32) as threads:
        running = [threads.submit(fetch, store, [n % 9]) for n in range(200)]
        asyncio.run(main())
        for one in running:
            one.result()
    assert not store._flights._under_way and store.memory.stats.pinned == 0


def test_where_one_thread_fails_the_others_compute_for_themselves():
    store, begun, go = DocumentStore(MemoryStore()), threading.Event(), threading.Event()

    def failing(keys):
        begun.set()
        go.wait(10)
        raise MemoryError("no room")
        yield

    with ThreadPoolExecutor(2) as threads:
        first = threads.submit(store.fetch, wanted_of([1]), SHAPE, CPU, "model", failing)
        begun.wait(10)
        second = threads.submit(fetch, store, [1])
        time.sleep(0.05)
        go.set()
        with pytest.raises(MemoryError):
            first.result()
        assert second.result() == ["computed"]
    assert not store._flights._under_way


def test_l1_what_prefetch_does_not_find_is_computed_once_for_all_who_wait(tmp_path, monkeypatch):
    store, go = layered(tmp_path), threading.Event()
    fetch(store, [9])
    store.memory.clear()
    computed_before = store.metrics.computed
    held = store._from_files
    monkeypatch.setattr(store, "_from_files", lambda *given: go.wait(10) and held(*given))
    prefetch = store.prefetch({key_of(n): ids_of(n) for n in (1, 2, 3, 9)}, SHAPE, CPU, "model")
    compute = Computer([1, 2, 3, 9], before=lambda: time.sleep(0.02))
    with ThreadPoolExecutor(4) as pool:
        waiting = [pool.submit(fetch, store, [1, 2, 3, 9], compute) for _ in range(4)]
        time.sleep(0.1)
        go.set()
        for one in waiting:
            one.result(10)
    assert prefetch.result(10) >= 1
    assert sorted(compute.asked) == sorted(key_of(n) for n in (1, 2, 3))
    assert store.metrics.computed == computed_before + 3


def test_l1_those_who_wait_for_a_failed_computation_share_the_next_one():
    store, begun, go = DocumentStore(MemoryStore()), threading.Event(), threading.Event()

    def fail() -> None:
        begun.set()
        go.wait(10)
        raise RuntimeError("no power")

    compute = Computer([1, 2], before=lambda: time.sleep(0.02))
    with ThreadPoolExecutor(5) as pool:
        first = pool.submit(fetch, store, [1, 2], Computer([1, 2], before=fail))
        begun.wait(10)
        others = [pool.submit(fetch, store, [1, 2], compute) for _ in range(4)]
        time.sleep(0.1)
        go.set()
        with pytest.raises(RuntimeError, match="no power"):
            first.result(10)
        for one in others:
            one.result(10)
    assert sorted(compute.asked) == sorted([key_of(1), key_of(2)])


def test_f8_a_computation_that_is_broken_off_leaves_nothing_behind():
    store = DocumentStore(MemoryStore())

    def interrupted(keys):
        yield keys[0], kv_of(1)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        store.fetch(wanted_of([1, 2]), SHAPE, CPU, "model", interrupted)
    assert not store._flights._under_way and store.memory.stats.pinned == 0
    assert fetch(store, [1, 2]) == ["memory", "computed"]


def test_f12_a_forked_process_reads_on(tmp_path):
    store = layered(tmp_path)
    fetch(store, range(3))
    store.memory.clear()
    fetch(store, range(3))  # threads are running
    store.memory.clear()
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=lambda: queue.put(fetch(store, [0, 1, 2, 3])))
    child.start()
    assert queue.get(timeout=60) == ["disk", "disk", "disk", "computed"]
    child.join()
    assert fetch(store, [3]) == ["disk"]


def test_f12_a_process_forked_while_a_document_is_computed_does_not_wait_for_it():
    store, begun, go = DocumentStore(MemoryStore()), threading.Event(), threading.Event()

    def wait() -> None:
        begun.set()
        go.wait(30)

    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(fetch, store, [1], Computer([1], before=wait))
        begun.wait(30)
        child = multiprocessing.get_context("fork").Process(target=fetch, args=(store, [1, 2]))
        child.start()
        child.join(30)
        alive = child.is_alive()
        child.kill()
        go.set()
        assert first.result(30) == ["computed"]
    assert not alive and child.exitcode == 0


def test_f12_a_store_is_not_pickled(tmp_path):
    with pytest.raises(TypeError, match="open it anew"):
        pickle.dumps(layered(tmp_path))


# Tenants


def test_t1_t2_tenants_share_no_document_at_any_tier(tmp_path):
    remote = RemoteStore(f"file://{tmp_path}/remote")
    store = DocumentStore(MemoryStore(), DiskStore(tmp_path / "d"), remote, load="always")
    assert fetch(store, range(3), namespace="a") == ["computed"] * 3
    store.flush()
    assert fetch(store, range(3), namespace="b") == ["computed"] * 3  # A's hits cannot be told by time or origin
    for tier in (store.disk, remote):
        assert set(tier.totals()) == {namespace_key("a"), namespace_key("b")} or tier is remote
    store.flush()
    assert set(remote.totals()) == {namespace_key("a"), namespace_key("b")}


def test_t5_no_text_ids_or_tenant_in_names_events_and_repr(tmp_path, caplog):
    events: list[StoreEvent] = []
    store = DocumentStore(MemoryStore(), DiskStore(tmp_path / "d"), load="always", on_event=events.append)
    fetch(store, range(3), namespace="secret tenant")
    files_of(store.disk)[0].write_bytes(b"x")
    store.memory.clear()
    fetch(store, range(3), namespace="secret tenant")
    names = [str(file.relative_to(tmp_path)) for file in tmp_path.rglob("*")]
    said = " ".join([*names, repr(events), repr(store), caplog.text, str(store.metrics.to_dict())])
    said = said.replace(str(tmp_path), "")
    assert "secret" not in said and "tenant" not in said
    assert not any(str(ids_of(n)).strip("()") in said for n in range(3))


@pytest.mark.parametrize("remove", ["forget", "clear"])
def test_what_is_computed_while_it_is_removed_is_not_kept(tmp_path, remove):
    remote = RemoteStore((tmp_path / "remote").as_uri())
    store = DocumentStore(MemoryStore(), DiskStore(tmp_path / "disk"), remote, load="always")

    def take_away() -> None:
        store.forget([key_of(1)]) if remove == "forget" else store.clear(namespace_key(""))

    assert fetch(store, [1], Computer([1], before=take_away)) == ["computed"]
    store.flush()
    assert key_of(1) not in store and not remote.totals()
    assert fetch(store, [1]) == ["computed"] and key_of(1) in store  # later ones are kept as ever


def test_what_is_loaded_while_it_is_removed_is_not_kept_in_memory(tmp_path, monkeypatch):
    store = layered(tmp_path)
    fetch(store, [1])
    store.memory.clear()
    load = store.disk.get

    def slow(*given):
        miss = load(*given)
        store.forget([key_of(1)])
        return miss

    monkeypatch.setattr(store.disk, "get", slow)
    assert fetch(store, [1]) == ["disk"]
    assert key_of(1) not in store


def test_a_namespace_is_cleared_by_its_key_alone(tmp_path):
    store = layered(tmp_path)
    fetch(store, [1])
    for wrong in ("", "tenant", "../x", namespace_key("")[:31]):
        with pytest.raises(InvalidInputError, match="32 hex digits"):
            store.clear(wrong)
    assert key_of(1) in store and store.clear(namespace_key("")) == 2


def test_forgetting_holds_at_every_tier(tmp_path):
    remote = RemoteStore(f"file://{tmp_path}/remote")
    store = DocumentStore(MemoryStore(), DiskStore(tmp_path / "d"), remote, load="always")
    fetch(store, range(4))
    store.flush()
    assert store.forget([key_of(1), key_of(2, model="another model")]) == 6
    for number, origin in ((0, "memory"), (1, "computed"), (2, "computed"), (3, "memory")):
        assert fetch(store, [number]) == [origin]
    store.flush()
    assert store.clear(namespace_key("other")) == 0
    assert store.clear(namespace_key("")) == 12
    assert (len(store.memory), store.disk.totals(), remote.totals()) == (0, {}, {})


def test_forgetting_one_document_looks_at_its_own_files_alone(tmp_path, monkeypatch):
    store = DocumentStore(None, DiskStore(tmp_path / "d"))
    fetch(store, range(30))
    seen, stat = [], Path.stat
    monkeypatch.setattr(Path, "stat", lambda self, **options: (seen.append(self.suffix), stat(self, **options))[1])
    assert store.forget([key_of(3)]) == 1
    assert seen.count(".safetensors") <= 2


def test_memory_is_released_where_it_ran_out():
    for host, device, left in ((True, "cuda", 3), (False, "cuda", 0), (True, "cpu", 0)):
        store = DocumentStore(MemoryStore(host=host))
        fetch(store, range(3))
        released = store.release_memory(torch.device(device))
        assert len(store.memory) == left and (released == 0) == (left > 0)


# The remote tier


def test_a_shared_folder_serves_a_machine_that_has_nothing(tmp_path):
    url = f"file://{tmp_path}/shared"
    first = open_store(url, local=tmp_path / "one")
    fetch(first, range(3))
    first.close()
    second = open_store(url, local=tmp_path / "two")
    assert fetch(second, range(4)) == ["remote"] * 3 + ["computed"]
    second.memory.clear()
    assert fetch(second, range(3)) == ["disk"] * 3  # which it has kept


@pytest.mark.parametrize("data", [b"", b"junk", bytes(SIZE)])
def test_f9_what_a_remote_store_sends_is_checked(tmp_path, data):
    url = f"file://{tmp_path}/shared"
    first = open_store(url, local=tmp_path / "one")
    fetch(first, [1])
    first.close()
    (file,) = (tmp_path / "shared").glob("v*/*/*/*.safetensors")
    file.write_bytes(data)
    second = open_store(url, local=tmp_path / "two")
    assert fetch(second, [1]) == ["computed"]
    assert sum(second.metrics.faults.values()) == 1 and next(iter(second.metrics.faults)).startswith("remote/")


def test_f9_a_slow_remote_store_costs_one_bounded_wait(tmp_path, monkeypatch, caplog):
    remote = RemoteStore(f"memory://{tmp_path.name}", wait=0.1)
    store = DocumentStore(MemoryStore(), DiskStore(tmp_path / "d"), remote, load="always")
    monkeypatch.setattr(remote._system, "cat_file", lambda path: time.sleep(0.6) or b"")
    began = time.monotonic()
    assert fetch(store, [1]) == ["computed"]
    assert time.monotonic() - began < 0.5
    began = time.monotonic()
    assert fetch(store, range(2, 6)) == ["computed"] * 4  # left alone for a while
    assert time.monotonic() - began < 0.5 and len(caplog.records) == 1
    assert store.metrics.faults == {"remote/late": 1}


def test_f9_a_remote_store_that_is_down_costs_a_warning(tmp_path, monkeypatch, caplog):
    remote = RemoteStore(f"memory://{tmp_path.name}")
    store = DocumentStore(MemoryStore(), DiskStore(tmp_path / "d"), remote, load="always")

    def down(*_, **__):
        raise ConnectionError("no route")

    for name in ("cat_file", "pipe_file", "exists", "makedirs"):
        monkeypatch.setattr(remote._system, name, down)
    assert fetch(store, range(4)) == ["computed"] * 4
    store.close()
    assert len(caplog.records) == 2 and caplog.text.count("no route") == 2  # one for reading, one for writing


def test_f9_a_remote_store_that_cannot_be_written_is_still_read(tmp_path, monkeypatch):
    shared = f"memory://{tmp_path.name}"
    first = DocumentStore(None, DiskStore(tmp_path / "a"), RemoteStore(shared), load="always")
    fetch(first, range(3))
    first.close()
    remote = RemoteStore(shared)
    second = DocumentStore(None, DiskStore(tmp_path / "b"), remote, load="always")

    def refuse(*_, **__):
        raise PermissionError("read-only credentials")

    monkeypatch.setattr(remote._system, "pipe_file", refuse)
    assert fetch(second, [9]) == ["computed"]
    second.flush()
    assert fetch(second, range(3)) == ["remote"] * 3


def test_f9_a_broken_remote_file_is_replaced_by_the_next_upload(tmp_path):
    remote = RemoteStore((tmp_path / "remote").as_uri())
    for turn, expected in enumerate(["computed", "computed", "remote"]):
        store = DocumentStore(None, DiskStore(tmp_path / f"d{turn}"), remote, load="always")
        assert fetch(store, [1]) == [expected]
        store.close()
        if turn == 0:
            (file,) = (tmp_path / "remote").rglob("*.safetensors")
            file.write_bytes(file.read_bytes()[:-1] + b"!")


def test_f9_a_remote_store_that_hangs_delays_neither_answers_nor_flushing_nor_the_end(tmp_path):
    """In a process of its own: a thread that hangs for ever must not keep it from ending."""
    script = f"""
import sys, threading, time
sys.path.insert(0, {str(Path(__file__).parent.parent / "helpers")!r})
from stores import CPU, SHAPE, Computer, wanted_of
from kvfusion_rag import DiskStore, DocumentStore, RemoteStore
remote = RemoteStore("memory://hangs", wait=0.2)
for name in ("cat_file", "exists"):
    setattr(remote._system, name, lambda *_: threading.Event().wait())
store = DocumentStore(None, DiskStore({str(tmp_path / "d")!r}), remote, load="always")
origins = store.fetch(wanted_of(range(3)), SHAPE, CPU, "model", Computer(range(3))).origins
assert set(origins.values()) == {{"computed"}}
flushing = [threading.Thread(target=remote.flush, args=(0.2,)) for _ in range(2)]
for one in flushing: one.start()
for one in flushing: one.join(10)
assert not remote.flush(0.1) and not any(one.is_alive() for one in flushing)
"""
    ended = subprocess.run([sys.executable, "-c", script], timeout=60, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr


def test_a_process_that_closes_nothing_uploads_what_it_has_computed(tmp_path):
    script = f"""
import sys, time
sys.path.insert(0, {str(Path(__file__).parent.parent / "helpers")!r})
from stores import CPU, SHAPE, Computer, wanted_of
from kvfusion_rag import DiskStore, DocumentStore, RemoteStore
remote = RemoteStore({(tmp_path / "remote").as_uri()!r})
pipe = remote._system.pipe_file
remote._system.pipe_file = lambda *a, **k: (time.sleep(0.3), pipe(*a, **k))
store = DocumentStore(None, DiskStore({str(tmp_path / "d")!r}), remote, load="always")
store.fetch(wanted_of(range(6)), SHAPE, CPU, "model", Computer(range(6)))
"""
    ended = subprocess.run([sys.executable, "-c", script], timeout=60, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    assert len(list((tmp_path / "remote").rglob("*.safetensors"))) == 6


def test_f12_a_forked_process_reads_the_remote_store(tmp_path):
    remote = RemoteStore((tmp_path / "remote").as_uri())
    store = DocumentStore(None, DiskStore(tmp_path / "a"), remote, load="always")
    fetch(store, [1])
    store.flush()
    store.disk.clear()

    def child() -> None:
        assert fetch(store, [1]) == ["remote"]

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    process.join(30)
    assert process.exitcode == 0


def test_numbers_that_are_not_finite_are_not_uploaded(tmp_path):
    remote = RemoteStore((tmp_path / "remote").as_uri())
    store = DocumentStore(None, DiskStore(tmp_path / "d"), remote, load="always")

    def broken(keys):
        for key in keys:
            document = kv_of(1)
            document.keys[0, 0, 0, 0] = float("nan")
            yield key, document

    store.fetch(wanted_of([1]), SHAPE, CPU, "model", broken)
    store.close()
    assert not remote.totals() and not files_of(store.disk)


def test_a_remote_store_needs_a_disk_of_its_codec(tmp_path):
    remote = RemoteStore((tmp_path / "remote").as_uri())
    with pytest.raises(InvalidInputError, match=r"needs a disk store .* there is none"):
        DocumentStore(MemoryStore(), None, remote)
    with pytest.raises(InvalidInputError, match="codec, 'raw', but its codec is 'v8'"):
        DocumentStore(None, DiskStore(tmp_path / "d", codec="v8"), remote)


def test_a_remote_store_that_is_read_only_is_read_through_a_local_disk_and_never_changed(tmp_path):
    url = (tmp_path / "remote").as_uri()
    writer = open_store(url, local=tmp_path / "a", remote={"wait": 5.0})
    fetch(writer, range(3))
    writer.close()
    before = sorted(tmp_path.joinpath("remote").rglob("*"))
    reader = open_store(url, local=tmp_path / "b", read_only=True)
    reader._policy = writer._policy
    assert fetch(reader, [0, 1, 2, 9]) == ["remote"] * 3 + ["computed"]
    with pytest.raises(StoreError, match="read_only=True; nothing can be removed"):
        reader.clear()
    assert not len(reader.memory) and not files_of(reader.disk)  # the tiers that can let go have
    assert sorted(tmp_path.joinpath("remote").rglob("*")) == before
    with pytest.raises(InvalidInputError, match="is a folder"):
        open_store(tmp_path / "c", remote={"wait": 1})


def test_a_remote_cap_is_kept_in_the_long_run(tmp_path, monkeypatch):
    monkeypatch.setattr("kvfusion_rag.store.remote._CHECKED_EVERY", 4)
    remote = RemoteStore(f"file://{tmp_path}/remote", max_bytes=6 * SIZE)
    store = DocumentStore(None, DiskStore(tmp_path / "d"), remote, load="always")
    for number in range(24):
        fetch(store, [number])
        store.flush()
    assert 0 < sum(count for _, count in remote.totals().values()) <= 6 + 4 and remote.evictions > 0


def upload(remote: RemoteStore, number: int, done=lambda size: None) -> None:
    remote.upload(key_of(number), encode(key_of(number), kv_of(number), "raw"), done)


def test_f12_a_forked_process_reads_a_bucket(tmp_path):
    """File systems of buckets refuse to work in a process forked from the one that opened them."""

    class Bucket(AsyncFileSystem):
        protocol = "forked"

        async def _cat_file(self, path, start=None, end=None, **_):
            return b"file"

    fsspec.register_implementation("forked", Bucket, clobber=True)
    remote = RemoteStore("forked://bucket/kv")

    def read() -> None:
        fetching = remote.start(key_of(1))
        assert fetching is not None and remote.finish(fetching, time.monotonic()) == b"file"

    read()
    process = multiprocessing.get_context("fork").Process(target=read)
    process.start()
    process.join(30)
    assert process.exitcode == 0


def test_what_is_forgotten_leaves_a_folder_whose_name_has_signs_of_patterns(tmp_path):
    remote = RemoteStore(f"file://{tmp_path}/shared [1]*")
    for number in range(3):
        upload(remote, number)
    assert remote.flush() and remote.totals()[namespace_key("")][1] == 3
    assert remote.forget(key_of(1)) == 1 and remote.clear() == 2
    assert not list(tmp_path.rglob("*.safetensors"))


def test_what_other_machines_stored_since_the_last_listing_is_forgotten_too(tmp_path, monkeypatch):
    remote = RemoteStore(f"memory://{tmp_path.name}")
    look, seen = remote._system.glob, {}
    monkeypatch.setattr(
        remote._system, "glob", lambda path, **given: seen.setdefault((path, *given), look(path, **given))
    )
    monkeypatch.setattr(remote._system, "invalidate_cache", lambda path=None: seen.clear())
    assert remote.forget(key_of(1)) == remote.clear() == 0 and not remote.totals()
    other = RemoteStore(f"memory://{tmp_path.name}")
    for number in range(2):
        upload(other, number)
    other.flush()
    assert remote.forget(key_of(1)) == 1 and remote.totals()[namespace_key("")][1] == 1 and remote.clear() == 1


@pytest.mark.parametrize("wrong", [None, 3, "", "../x", key_of(1) + "/..", key_of(1)[:-1] + "*"])
def test_only_keys_of_documents_reach_a_remote_store(tmp_path, wrong):
    remote = RemoteStore((tmp_path / "remote").as_uri())
    for use in (remote.start, remote.forget, lambda key: remote.upload(key, [b""], lambda size: None)):
        with pytest.raises(InvalidInputError, match=r"the key of a document is .* must be 32, 32 and 64 hex digits"):
            use(wrong)
    if wrong is not None:
        with pytest.raises(InvalidInputError, match="32 hex digits"):
            remote.clear(wrong)


@pytest.mark.parametrize("wait", [0, -1, "2", None, float("inf"), float("nan")])
def test_f9_the_wait_for_a_remote_store_is_bounded(tmp_path, wait):
    with pytest.raises(InvalidInputError, match=r"wait is .* a number of seconds above 0"):
        RemoteStore(tmp_path.as_uri(), wait=wait)


def test_options_of_the_remote_store_go_before_those_of_both(tmp_path):
    store = open_store((tmp_path / "remote").as_uri(), local=tmp_path / "d", remote={"read_only": True})
    assert not store.remote.takes_uploads and fetch(store, [1]) == ["computed"] and files_of(store.disk)
    with pytest.raises(InvalidInputError, match="same codec"):
        open_store((tmp_path / "remote").as_uri(), local=tmp_path / "d", remote={"codec": "v8"})


def test_f9_a_remote_store_that_cannot_be_listed_says_so(tmp_path, monkeypatch):
    remote = RemoteStore(f"memory://{tmp_path.name}")

    def down(*_, **__):
        raise ConnectionError("no route")

    monkeypatch.setattr(remote._system, "glob", down)
    for use in (remote.totals, remote.clear, lambda: remote.forget(key_of(1))):
        with pytest.raises(StoreError, match=r"fails .ConnectionError: no route"):
            use()


def let_end(go: threading.Event) -> None:
    """Let threads that wait for ``go`` end, so that later tests do not count them."""
    hanging = [thread for thread in threading.enumerate() if thread.name == "kvfusion-remote"]
    go.set()
    for thread in hanging:
        thread.join(10)


@pytest.mark.parametrize("remove", ["forget", "clear"])
def test_f9_a_remote_store_that_hangs_holds_up_no_removal_from_the_other_tiers(tmp_path, monkeypatch, remove):
    monkeypatch.setattr("kvfusion_rag.store.remote.STALLED_SECONDS", 0.2)
    remote, go = RemoteStore(f"memory://{tmp_path.name}"), threading.Event()
    store = DocumentStore(MemoryStore(), DiskStore(tmp_path / "d"), remote, load="always")
    fetch(store, [1, 2])
    assert store.flush()
    glob = remote._system.glob
    monkeypatch.setattr(remote._system, "glob", lambda *given, **options: go.wait(30) and glob(*given, **options))
    began = time.monotonic()
    with pytest.raises(StoreError, match=r"has not answered for 0.2 s"):
        store.forget([key_of(1), key_of(2)]) if remove == "forget" else store.clear()
    assert time.monotonic() - began < 5 and not len(store.memory) and not files_of(store.disk)
    let_end(go)


def test_flushing_says_whether_uploads_have_ended(tmp_path, monkeypatch):
    remote, go = RemoteStore(f"memory://{tmp_path.name}"), threading.Event()
    store = DocumentStore(None, DiskStore(tmp_path / "d"), remote, load="always")
    assert DocumentStore().flush()
    monkeypatch.setattr(remote._system, "exists", lambda path: not go.wait(30))
    monkeypatch.setattr(remote, "flush", lambda: RemoteStore.flush(remote, 0.1))
    fetch(store, [1])
    assert not store.flush()
    let_end(go)
    assert RemoteStore.flush(remote)


def test_verifying_a_remote_store_removes_what_is_broken(tmp_path):
    remote = RemoteStore((tmp_path / "remote").as_uri())
    for number in range(3):
        upload(remote, number)
    remote.flush()
    file = next((tmp_path / "remote").rglob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-1] + b"!")
    assert RemoteStore(remote.url, read_only=True).verify() == (2, 1) and file.exists()
    assert remote.verify() == (2, 1) and not file.exists() and remote.verify() == (2, 0)
    let_end(threading.Event())


def test_f9_downloads_that_hang_are_bounded_in_number(tmp_path, monkeypatch):
    monkeypatch.setattr("kvfusion_rag.store.remote.PAUSE_SECONDS", 0.0)
    remote, go = RemoteStore(f"memory://{tmp_path.name}", wait=0.01), threading.Event()
    monkeypatch.setattr(remote._system, "cat_file", lambda path: go.wait(30) and b"file")
    before = set(threading.enumerate())
    for _ in range(40):
        fetching = remote.start(key_of(1))
        assert fetching is None or remote.finish(fetching, time.monotonic()) is Miss.LATE
    hanging = len(set(threading.enumerate()) - before)  # those of other tests may be ending
    go.set()
    assert hanging == 16
    while set(threading.enumerate()) - before:
        time.sleep(0.01)
    assert remote.finish(remote.start(key_of(1)), time.monotonic() + 5) == b"file"  # there is room again


def test_f9_closing_gives_up_what_waits_behind_uploads_that_hang(tmp_path, monkeypatch, caplog):
    remote, go = RemoteStore(f"memory://{tmp_path.name}"), threading.Event()
    monkeypatch.setattr(remote._system, "exists", lambda path: not go.wait(30))
    before = threading.active_count()
    for number in range(40):
        upload(remote, number)
    assert threading.active_count() - before == 4  # and none for each that waits
    began = time.monotonic()
    assert not remote.close(0.1) and time.monotonic() - began < 5
    assert remote.dropped == 40 - 4 and "has not taken all documents within 0.1 s" in caplog.text
    go.set()
    assert remote.close(10) and sum(count for _, count in remote.totals().values()) == 4
    while threading.active_count() > before:
        time.sleep(0.01)


def test_what_is_removed_by_another_machine_meanwhile_stops_no_uploads(tmp_path, monkeypatch, caplog):
    remote = RemoteStore((tmp_path / "remote").as_uri(), max_bytes=1)
    remove = remote._system.rm_file
    monkeypatch.setattr(remote._system, "rm_file", lambda name: (Path(name).unlink(), remove(name)))
    upload(remote, 1)
    assert remote.flush() and remote.takes_uploads and remote.evictions == 1 and not caplog.records


def test_what_is_stored_is_told_though_the_cap_cannot_be_kept(tmp_path, monkeypatch):
    """Else a document that was forgotten while it was uploaded would stay."""
    remote, told = RemoteStore(f"memory://{tmp_path.name}", max_bytes=1), []

    def refuse(*_, **__):
        raise PermissionError("no listing")

    monkeypatch.setattr(remote._system, "glob", refuse)
    upload(remote, 1, told.append)
    assert remote.flush() and told == [SIZE]


def test_a_remote_cap_removes_the_oldest(tmp_path):
    remote = RemoteStore(f"memory://{tmp_path.name}", max_bytes=int(2.5 * SIZE))
    for number in (3, 2, 1, 0):
        remote._written = itertools.count()  # looks at the cap each time
        upload(remote, number)
        remote.flush()
    assert sorted(remote._system.find(remote._root)) == sorted(remote._path(key_of(number)) for number in (0, 1))


def test_half_written_remote_files_leave(tmp_path, monkeypatch):
    remote = RemoteStore((tmp_path / "remote").as_uri())
    write = remote._system.pipe_file

    def fill_up(path, data):
        write(path, data[:10])
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(remote._system, "pipe_file", fill_up)
    upload(remote, 1)
    assert remote.flush() and not list(tmp_path.rglob("*.tmp"))
    monkeypatch.undo()
    file = Path(remote._path(key_of(1)))
    orphan, fresh = (file.with_name(f"{file.name}.{name}.tmp") for name in ("killed", "running"))
    for one in (orphan, fresh):
        one.write_bytes(b"half")
    os.utime(orphan, (0, 0))
    remote = RemoteStore((tmp_path / "remote").as_uri())
    upload(remote, 2)
    assert remote.flush() and not orphan.exists() and fresh.exists()
    assert remote.forget(key_of(1)) == 0 and not fresh.exists()


# Load or compute


def test_what_is_slower_to_load_than_to_compute_is_computed(tmp_path):
    store = DocumentStore(None, DiskStore(tmp_path / "d"))
    policy = store._policy
    assert policy.should_load("m")
    policy.note_prefill("m", 300, 0.3)
    assert policy.should_load("m")
    policy.note_load("m", 300, 0.6)
    assert not policy.should_load("m") and policy.should_load("another")
    again = DocumentStore(None, DiskStore(tmp_path / "d"))
    assert not again._policy.should_load("m")  # measured once
    for load in ("always", "never"):
        decided = DocumentStore(None, DiskStore(tmp_path / "d"), load=load)
        assert decided._policy.should_load("m") == (load == "always")
    for other in ("[1, 2", '{"m": {"load": 2.0, "prefill": 1.0}}', '{"version": 2}'):  # the second of an older version
        (tmp_path / "d/calibration.json").write_text(other)
        assert DocumentStore(None, DiskStore(tmp_path / "d"))._policy.should_load("m")


def test_one_bad_measurement_is_not_for_ever(tmp_path):
    policy = LoadPolicy("auto", tmp_path / "calibration.json")
    policy.note_prefill("m", 300, 0.3)
    policy.note_load("m", 300, 3.0)
    refused = 0
    for _ in range(2000):
        if policy.should_load("m"):
            policy.note_load("m", 300, 0.03)
        else:
            refused += 1
    assert 63 <= refused <= 63 * 10 and policy.should_load("m")
    assert LoadPolicy("auto", tmp_path / "calibration.json").should_load("m")
    for _ in range(20):  # and a disk that becomes slow is noticed
        policy.note_load("m", 300, 3.0)
    assert not policy.should_load("m")


def test_what_was_measured_on_one_kind_of_device_says_nothing_of_another(tmp_path, monkeypatch):
    store = DocumentStore(None, DiskStore(tmp_path / "d"))
    store._policy.note_prefill(_on_device("model", CPU), 300, 0.0)
    store._policy.note_load(_on_device("model", CPU), 300, 3.0)
    fetch(store, [1])
    assert fetch(store, [1]) == ["computed"]
    monkeypatch.setattr("kvfusion_rag.store.documents.device_name", lambda device: "a faster one")
    assert fetch(store, [1]) == ["disk"]


def test_documents_that_are_not_loaded_are_counted_so(tmp_path):
    fetch(layered(tmp_path), range(3))
    store = DocumentStore(None, DiskStore(tmp_path / "disk"), load="never")
    assert fetch(store, range(3)) == ["computed"] * 3
    assert store.metrics.misses == {Miss.SLOWER: 3}


def test_prefetch_brings_what_is_stored_into_memory_and_computes_nothing(tmp_path):
    fetch(layered(tmp_path), range(3))
    store = layered(tmp_path)
    there = store.prefetch({key_of(n): ids_of(n) for n in range(5)}, SHAPE, CPU, "model")
    assert there.result(10) == 3 == len(store.memory)
    assert fetch(store, range(4)) == ["memory"] * 3 + ["computed"]


# Metrics


def test_prefetching_counts_as_no_look_up_that_missed(tmp_path):
    store = layered(tmp_path)
    store.prefetch({key_of(n): ids_of(n) for n in range(3)}, SHAPE, CPU, "model").result(10)
    assert store.metrics.lookups == 0 and not store.metrics.misses


def test_f3_measurements_that_cannot_be_written_are_not_kept(tmp_path, monkeypatch):
    store = DocumentStore(None, DiskStore(tmp_path / "disk"))

    def refuse(*_args, **_options):
        raise OSError(errno.EROFS, "read-only file system")

    monkeypatch.setattr(Path, "write_text", refuse)
    monkeypatch.setattr(Path, "unlink", refuse)
    numbers = range(60)  # 300 tokens, enough for a measurement
    assert fetch(store, numbers) == ["computed"] * 60
    assert fetch(store, numbers) == ["disk"] * 60
    assert not (tmp_path / "disk" / "calibration.json").exists()


def test_a_store_that_is_read_only_is_not_written_to(tmp_path):
    writer = DocumentStore(None, DiskStore(tmp_path / "disk"), load="always")
    fetch(writer, range(60))
    writer.close()
    reader = DocumentStore(None, DiskStore(tmp_path / "disk", read_only=True))
    before = sorted(tmp_path.rglob("*"))
    assert fetch(reader, range(60)) == ["disk"] * 60 and fetch(reader, [90]) == ["computed"]
    assert sorted(tmp_path.rglob("*")) == before


def test_metrics_add_up(tmp_path):
    events: list[StoreEvent] = []
    store = layered(tmp_path, on_event=events.append)
    fetch(store, range(4))
    fetch(store, range(4))
    store.memory.clear()
    files_of(store.disk)[0].write_bytes(b"")
    origins = fetch(store, range(4))
    metrics = store.metrics
    assert origins.count("disk") == 3
    assert metrics.lookups == 12 and metrics.hits == {"memory": 4, "disk": 3}
    assert metrics.misses == {"absent": 4, "truncated": 1} and metrics.faults == {"disk/truncated": 1}
    assert (metrics.computed, metrics.computed_tokens) == (5, 25)
    assert metrics.loaded_bytes == {"memory": 4 * kv_of(0).nbytes, "disk": 3 * kv_of(0).nbytes}
    assert metrics.used_bytes == {"memory": 4 * kv_of(0).nbytes, "disk": 4 * SIZE}
    assert metrics.hit_rate == 7 / 12 == metrics.to_dict()["hit_rate"]
    assert {event.kind for event in events} == {"hit", "miss", "computed", "stored"}


def test_what_is_stored_already_is_not_counted_as_stored_again(tmp_path):
    fetch(layered(tmp_path), range(3))
    store = DocumentStore(None, DiskStore(tmp_path / "disk"), load="never")
    assert fetch(store, range(4)) == ["computed"] * 4
    assert store.metrics.stored_bytes == {"disk": SIZE}


def test_documents_that_no_tier_took_are_counted_by_tier(tmp_path, monkeypatch):
    remote = RemoteStore(f"memory://{tmp_path.name}")
    memory, disk = MemoryStore(kv_of(0).nbytes - 1), DiskStore(tmp_path / "d", max_bytes=2 * SIZE - 1)
    store = DocumentStore(memory, disk, remote, load="always")
    fetch(store, [0])
    metrics = store.metrics
    assert metrics.rejected == {"memory": 1, "disk": 0} and not any(metrics.failed_writes.values())

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    store.flush()
    monkeypatch.setattr(os, "writev", full)
    monkeypatch.setattr(remote._system, "pipe_file", full)
    for number in range(1, 4):  # the first fails; then the tiers are left alone for a while
        fetch(store, [number])
        store.flush()
    metrics = store.metrics
    assert metrics.failed_writes == {"disk": 1, "remote": 1} and metrics.dropped == {"disk": 2, "remote": 2}
    assert metrics.rejected == {"memory": 4, "disk": 0}


def test_what_leaves_a_remote_store_is_counted(tmp_path):
    remote = RemoteStore(f"memory://{tmp_path.name}", max_bytes=1)
    store = DocumentStore(None, DiskStore(tmp_path / "d"), remote, load="always")
    fetch(store, [1])
    store.flush()
    assert store.metrics.evictions == {"disk": 0, "remote": 1} and not store.metrics.failed_writes["remote"]


def test_a_callback_that_fails_is_left_alone(caplog):
    def broken(event):
        raise RuntimeError("mine")

    store = DocumentStore(MemoryStore(), on_event=broken)
    assert fetch(store, range(3)) == ["computed"] * 3
    assert len(caplog.records) == 1


# What a caller may name


def test_names_of_stores(tmp_path):
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


def test_a_cap_smaller_than_one_document_is_one_clear_error(tmp_path):
    memory, file = SHAPE.nbytes(5), SIZE
    stores = {
        "max_bytes of the memory": DocumentStore(MemoryStore(memory - 1)),
        "namespace_bytes of the memory": DocumentStore(MemoryStore(namespace_bytes=memory - 1)),
        "max_bytes of the disk": DocumentStore(None, DiskStore(tmp_path / "a", max_bytes=file - 1)),
        "namespace_bytes of the disk": DocumentStore(None, DiskStore(tmp_path / "b", namespace_bytes=file - 1)),
    }
    for name, store in stores.items():
        with pytest.raises(InvalidInputError, match=f"{name} store is .* one document of 5 tokens"):
            store.require_room(SHAPE, 5)
    DocumentStore(MemoryStore(memory), DiskStore(tmp_path / "c", max_bytes=file)).require_room(SHAPE, 5)


# L3: queues have bounds


def test_l3_more_prefetches_than_may_wait_is_one_clear_error(tmp_path, monkeypatch):
    monkeypatch.setattr("kvfusion_rag.store.documents.PREFETCHES", 3)
    store, go = layered(tmp_path), threading.Event()
    monkeypatch.setattr(store, "_prefetch", lambda *_: go.wait(10))
    waiting = [store.prefetch({}, SHAPE, CPU, "model") for _ in range(3)]
    with pytest.raises(OverloadError, match="3 calls of prefetch wait already"):
        store.prefetch({}, SHAPE, CPU, "model")
    go.set()
    assert all(one.result(10) for one in waiting)
    assert store.prefetch({}, SHAPE, CPU, "model").result(10)


def test_l3_uploads_that_find_no_place_in_the_queue_are_dropped_and_counted(tmp_path, monkeypatch):
    remote = RemoteStore(f"memory://{tmp_path.name}")
    store, go = DocumentStore(None, DiskStore(tmp_path / "d"), remote, load="always"), threading.Event()
    real = remote._system.pipe_file
    monkeypatch.setattr(remote._system, "pipe_file", lambda *a, **k: (go.wait(30), real(*a, **k)))
    began = time.monotonic()
    fetch(store, range(70))
    assert time.monotonic() - began < 10 and remote.dropped == 70 - 64
    go.set()
    store.flush()
    assert sum(count for _, count in remote.totals().values()) == 64
