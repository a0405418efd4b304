"""The remote tier: a shared folder or bucket that may be slow, damaged, unreachable or full."""

import errno
import io
import itertools
import os
import threading
import time
from pathlib import Path

import fsspec
import pytest
import torch
from fsspec.asyn import AsyncFileSystem
from fsspec.spec import AbstractBufferedFile
from stores import SIZE, failing, fetch, fetch_kvs, files_of, key_of, kv_of, put_all, remote_entries, run_forked

from kvfusion_rag import DiskStore, DocumentStore, InvalidInputError, MemoryStore, RemoteStore, StoreError
from kvfusion_rag.store import Miss, open_store

NO_ROUTE = ConnectionError("no route")


def behind(remote: RemoteStore, folder: Path) -> DocumentStore:
    """Return a store with a local disk in front of ``remote`` and without memory."""
    return DocumentStore(None, DiskStore(folder), remote)


# Sharing


def test_shared_folder_serves_a_machine_with_an_empty_disk(tmp_path):
    url = f"file://{tmp_path}/shared"
    first = open_store(url, local=tmp_path / "one")
    fetch(first, range(3))
    first.close()
    second = open_store(url, local=tmp_path / "two")
    assert fetch(second, range(4)) == ["remote"] * 3 + ["computed"]
    second.memory.clear()
    assert fetch(second, range(3)) == ["disk"] * 3


def test_read_only_remote_store_is_read_through_a_local_disk_and_never_changed(tmp_path):
    url = (tmp_path / "remote").as_uri()
    writer = open_store(url, local=tmp_path / "a", remote={"wait": 5.0})
    fetch(writer, range(3))
    writer.close()
    before = sorted(tmp_path.joinpath("remote").rglob("*"))
    reader = open_store(url, local=tmp_path / "b", read_only=True)
    assert fetch(reader, [0, 1, 2, 9]) == ["remote"] * 3 + ["computed"]
    with pytest.raises(StoreError, match="read_only=True; nothing can be changed"):
        reader.clear()
    assert not len(reader.memory) and not files_of(reader.disk)  # the other tiers are empty all the same
    assert sorted(tmp_path.joinpath("remote").rglob("*")) == before
    assert reader.metrics.dropped["remote"] == 0


def test_open_store_passes_options_to_the_remote_tier(tmp_path):
    url = (tmp_path / "remote").as_uri()
    store = open_store(url, local=tmp_path / "d", remote={"read_only": True})
    assert fetch(store, [1]) == ["computed"] and store.flush()
    assert files_of(store.disk) and not remote_entries(store.remote)
    with pytest.raises(InvalidInputError, match="same codec"):
        open_store(url, local=tmp_path / "d", remote={"codec": "v8"})
    with pytest.raises(InvalidInputError, match="is a folder"):
        open_store(tmp_path / "c", remote={"wait": 1})


def test_remote_tier_needs_a_disk_tier_with_the_same_codec(tmp_path, shared):
    with pytest.raises(InvalidInputError, match=r"needs a disk store .* there is none"):
        DocumentStore(MemoryStore(), None, shared)
    with pytest.raises(InvalidInputError, match="codec, 'raw', but its codec is 'v8'"):
        DocumentStore(None, DiskStore(tmp_path / "d", codec="v8"), shared)


@pytest.mark.parametrize("wait", [0, -1, "2", None, float("inf"), float("nan")])
def test_wait_must_be_a_finite_number_of_seconds(tmp_path, wait):
    with pytest.raises(InvalidInputError, match=r"wait is .* a number of seconds above 0"):
        RemoteStore(tmp_path.as_uri(), wait=wait)


@pytest.mark.parametrize("wrong", [None, 3, "", "../x", key_of(1) + "/..", key_of(1)[:-1] + "*"])
def test_only_document_keys_reach_a_remote_store(shared, wrong):
    for use in (lambda key: shared.get(key, SIZE), shared.forget, lambda key: shared.put(key, kv_of(1))):
        with pytest.raises(InvalidInputError, match=r"the document key is .* must be 32, 32 and 64 hex digits"):
            use(wrong)
    if wrong is not None:
        with pytest.raises(InvalidInputError, match="32 hex digits"):
            shared.clear(wrong)


def test_documents_with_nan_are_not_uploaded(tmp_path, shared):
    store = behind(shared, tmp_path / "d")

    def compute(keys):
        for key in keys:
            document = kv_of(1)
            document.keys[0, 0, 0, 0] = torch.nan
            yield key, document

    fetch_kvs(store, [1], compute)
    store.close()
    assert not shared.totals() and not files_of(store.disk)


# Damaged files


@pytest.mark.parametrize("data", [b"", b"junk", bytes(SIZE)], ids=["empty", "junk", "zeros"])
def test_downloaded_files_are_checked(tmp_path, shared, data):
    put_all(shared, 1)
    shared.flush()
    (file,) = (tmp_path / "remote").glob("v*/*/*/*.safetensors")
    file.write_bytes(data)
    store = behind(shared, tmp_path / "d")
    assert fetch(store, [1]) == ["computed"]
    assert sum(store.metrics.faults.values()) == 1 and next(iter(store.metrics.faults)).startswith("remote/")


def test_damaged_file_is_replaced_by_the_next_upload(tmp_path, shared):
    for turn, expected in enumerate(["computed", "computed", "remote"]):
        store = behind(shared, tmp_path / f"d{turn}")
        assert fetch(store, [1]) == [expected]
        store.close()
        if turn == 0:
            (file,) = (tmp_path / "remote").rglob("*.safetensors")
            file.write_bytes(file.read_bytes()[:-1] + b"!")


def test_verify_removes_damaged_files(tmp_path, shared):
    put_all(shared, 0, 1, 2)
    shared.flush()
    file = next((tmp_path / "remote").rglob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-1] + b"!")
    assert RemoteStore(shared.url, read_only=True).verify() == (2, 1) and file.exists()
    assert shared.verify() == (2, 1) and not file.exists() and shared.verify() == (2, 0)


# Slow, hanging and unreachable stores


def test_slow_store_costs_one_bounded_wait(tmp_path, monkeypatch, caplog, go):
    remote = RemoteStore(f"memory://{tmp_path.name}", wait=0.1)
    store = DocumentStore(MemoryStore(), DiskStore(tmp_path / "d"), remote)
    real = remote._folder.system.open
    monkeypatch.setattr(
        remote._folder.system,
        "open",
        lambda path, mode, **given: (mode == "rb" and go.wait(10)) or real(path, mode, **given),
    )
    began = time.monotonic()
    assert fetch(store, [1]) == ["computed"]
    assert fetch(store, range(2, 6)) == ["computed"] * 4  # the remote store is not used for a while
    assert time.monotonic() - began < 5 and len(caplog.records) == 1
    assert store.metrics.faults == {"remote/late": 1}


def test_unreachable_store_causes_one_warning_each_for_reading_and_writing(tmp_path, bucket, monkeypatch, caplog):
    for name in ("open", "pipe_file", "exists", "makedirs"):
        monkeypatch.setattr(bucket._folder.system, name, failing(NO_ROUTE))
    store = behind(bucket, tmp_path / "d")
    assert fetch(store, range(4)) == ["computed"] * 4
    store.close()
    assert len(caplog.records) == 2 and caplog.text.count("no route") == 2


def test_store_that_cannot_be_written_is_still_read(tmp_path, bucket, monkeypatch):
    first = behind(RemoteStore(bucket.url), tmp_path / "a")
    fetch(first, range(3))
    first.close()
    second = behind(bucket, tmp_path / "b")
    monkeypatch.setattr(bucket._folder.system, "pipe_file", failing(PermissionError("read-only credentials")))
    assert fetch(second, [9]) == ["computed"]
    second.flush()
    assert fetch(second, range(3)) == ["remote"] * 3


def test_store_that_cannot_be_listed_is_a_store_error(bucket, monkeypatch):
    monkeypatch.setattr(bucket._folder.system, "glob", failing(NO_ROUTE))
    for use in (bucket.totals, bucket.clear, lambda: bucket.forget(key_of(1))):
        with pytest.raises(StoreError, match=r"fails .ConnectionError: no route"):
            use()


@pytest.mark.parametrize("remove", ["forget", "clear"])
def test_hung_store_does_not_block_removal_elsewhere(tmp_path, bucket, monkeypatch, go, remove):
    monkeypatch.setattr("kvfusion_rag.store.remote.maintenance.STALLED_SECONDS", 0.1)
    store = DocumentStore(MemoryStore(), DiskStore(tmp_path / "d"), bucket)
    fetch(store, [1, 2])
    assert store.flush()
    monkeypatch.setattr(bucket._folder.system, "glob", lambda *given, **options: go.wait(30) and [])
    with pytest.raises(StoreError, match=r"has not answered for 0.1 s"):
        store.forget([key_of(1), key_of(2)]) if remove == "forget" else store.clear()
    assert not len(store.memory) and not files_of(store.disk)


def test_number_of_hanging_downloads_is_bounded(tmp_path, monkeypatch, go):
    monkeypatch.setattr("kvfusion_rag.store.remote.store.PAUSE_SECONDS", 0.0)
    remote = RemoteStore(f"memory://{tmp_path.name}", wait=0.01)
    monkeypatch.setattr(remote._folder.system, "open", lambda *given: go.wait(30) and io.BytesIO(b"file"))
    misses = [remote.get(key_of(1), 4) for _ in range(20)]
    hanging = [thread for thread in threading.enumerate() if thread.name == "kvfusion-remote"]
    assert misses == [Miss.LATE] * 16 + [Miss.PAUSED] * 4 and len(hanging) == 16
    go.set()
    for thread in hanging:
        thread.join(10)
    remote._wait = 5.0
    assert remote.get(key_of(1), 4) == b"file"


# Forks


def test_forked_process_reads_the_remote_store(tmp_path, shared):
    store = behind(shared, tmp_path / "a")
    fetch(store, [1])
    store.flush()
    store.disk.clear()

    def child() -> None:
        assert fetch(store, [1]) == ["remote"]

    assert run_forked(child) == 0


def test_forked_process_reads_a_bucket():
    """File systems of buckets refuse to work in a process forked from the one that opened them."""

    class Bucket(AsyncFileSystem):
        protocol = "forked"

        async def _info(self, path, **_):
            return {"name": path, "size": 4, "type": "file"}

        async def _cat_file(self, path, start=None, end=None, **_):
            return b"file"[start:end]

        def _open(self, path, mode="rb", **options):
            return BucketFile(self, path, mode, **options)

    class BucketFile(AbstractBufferedFile):
        def _fetch_range(self, start, end):
            return self.fs.cat_file(self.path, start, end)

    fsspec.register_implementation("forked", Bucket, clobber=True)
    remote = RemoteStore("forked://bucket/kv")

    def read() -> None:
        assert remote.get(key_of(1), 4) == b"file"

    read()
    assert run_forked(read) == 0


# Removal and caps


def test_forget_works_in_a_folder_whose_name_contains_wildcards(tmp_path):
    remote = RemoteStore(f"file://{tmp_path}/shared [1]*")
    put_all(remote, 0, 1, 2)
    assert remote.flush() and remote_entries(remote) == 3
    assert remote.forget(key_of(1)) == 1 and remote.clear() == 2
    assert not list(tmp_path.rglob("*.safetensors"))


def test_forget_finds_what_other_machines_stored_since_the_last_listing(bucket, monkeypatch):
    glob, cache = bucket._folder.system.glob, {}
    monkeypatch.setattr(
        bucket._folder.system, "glob", lambda path, **given: cache.setdefault((path, *given), glob(path, **given))
    )
    monkeypatch.setattr(bucket._folder.system, "invalidate_cache", lambda path=None: cache.clear())
    assert bucket.forget(key_of(1)) == bucket.clear() == 0 and not bucket.totals()
    other = RemoteStore(bucket.url)
    put_all(other, 0, 1)
    other.flush()
    assert bucket.forget(key_of(1)) == 1 and remote_entries(bucket) == 1 and bucket.clear() == 1


def test_file_removed_by_another_machine_does_not_stop_uploads(tmp_path, monkeypatch, caplog):
    remote = RemoteStore((tmp_path / "remote").as_uri(), max_bytes=1)
    remove = remote._folder.system.rm_file
    monkeypatch.setattr(remote._folder.system, "rm_file", lambda name: (Path(name).unlink(), remove(name)))
    put_all(remote, 1)
    assert remote.flush() and not remote.failed_writes and remote.evictions == 1 and not caplog.records


def test_on_stored_is_called_even_if_the_cap_cannot_be_kept(tmp_path, monkeypatch):
    """Otherwise a document that was forgotten during its upload would stay."""
    remote, sizes = RemoteStore(f"memory://{tmp_path.name}", max_bytes=1), []
    monkeypatch.setattr(remote._folder.system, "glob", failing(PermissionError("no listing")))
    remote.put(key_of(1), kv_of(1), sizes.append)
    assert remote.flush() and sizes == [SIZE]


def test_cap_evicts_the_oldest_files(tmp_path):
    remote = RemoteStore(f"memory://{tmp_path.name}", max_bytes=int(2.5 * SIZE))
    store = behind(remote, tmp_path / "d")
    for number in (3, 2, 1, 0):
        remote._uploaded = itertools.count()  # checks the cap at each upload
        fetch(store, [number])
        store.flush()
    assert sorted(remote._folder.system.find(remote._folder.root)) == sorted(
        remote._path(key_of(number)) for number in (0, 1)
    )
    assert store.metrics.evictions == {"disk": 0, "remote": 2} and not store.metrics.failed_writes["remote"]


def test_cap_is_kept_in_the_long_run(tmp_path, monkeypatch):
    monkeypatch.setattr("kvfusion_rag.store.remote.store._UPLOADS_PER_CHECK", 4)
    remote = RemoteStore((tmp_path / "remote").as_uri(), max_bytes=6 * SIZE)
    for number in range(24):
        put_all(remote, number)
        remote.flush()
    assert 0 < remote_entries(remote) <= 6 + 4 and remote.evictions > 0


def test_incomplete_files_are_removed(tmp_path, monkeypatch):
    remote = RemoteStore((tmp_path / "remote").as_uri())
    write = remote._folder.system.pipe_file

    def fill_up(path, data):
        write(path, data[:10])
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(remote._folder.system, "pipe_file", fill_up)
    put_all(remote, 1)
    assert list(remote.flush().lost.values()) == ["OSError: [Errno 28] full"]
    assert not list(tmp_path.rglob("*.tmp"))
    monkeypatch.undo()
    file = Path(remote._path(key_of(1)))
    orphan, fresh = (file.with_name(f"{file.name}.{name}.tmp") for name in ("killed", "running"))
    for one in (orphan, fresh):
        one.write_bytes(b"half")
    os.utime(orphan, (0, 0))
    remote = RemoteStore((tmp_path / "remote").as_uri())
    put_all(remote, 2)
    assert remote.flush() and not orphan.exists() and fresh.exists()
    assert remote.forget(key_of(1)) == 0 and not fresh.exists()
