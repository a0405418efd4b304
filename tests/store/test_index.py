"""The index of a disk store: damaged, replaced, locked or failing."""

import errno
import os
import sqlite3
import threading
import time
from contextlib import closing

import pytest
from stores import SIZE, failing, files_of, key_of, kv_of, put, read

from kvfusion_rag import DiskStore
from kvfusion_rag.store import Miss, namespace_key


@pytest.fixture
def store(tmp_path) -> DiskStore:
    store = DiskStore(tmp_path / "s")
    put(store, *range(3))
    return store


def count_of(store: DiskStore) -> dict[str, tuple[int, int]]:
    """Totals of a store whose files are all in the default namespace."""
    files = len(files_of(store))
    return {namespace_key(""): (files * SIZE, files)}


@pytest.mark.parametrize("junk", [b"", b"not a database, certainly", os.urandom(5000)], ids=["empty", "text", "noise"])
def test_damaged_index_is_rebuilt_at_opening(store, junk):
    store.close()
    (store.path / "index.sqlite").write_bytes(junk)
    again = DiskStore(store.path)
    assert again.totals() == count_of(store) and read(again, 1)[0] is None


@pytest.mark.parametrize("use", ["put", "verify", "forget", "totals"])
def test_damaged_index_is_rebuilt_while_the_store_is_open(store, use):
    store.close()
    index = store.path / "index.sqlite"
    index.write_bytes(index.read_bytes()[:100] + b"\xff" * (index.stat().st_size - 100))
    if use == "put":
        put(store, 3)
    elif use == "verify":
        assert store.verify().whole == 3
    elif use == "forget":
        assert store.forget(key_of(0)) == 1
    assert store.totals() == count_of(store)


def test_index_whose_creator_died_before_filling_it_is_filled(store):
    store.close()
    with closing(sqlite3.connect(store.path / "index.sqlite")) as database:
        database.executescript("DELETE FROM documents; DELETE FROM totals; PRAGMA user_version = 0;")
    again = DiskStore(store.path, max_bytes=3 * SIZE)
    assert again.totals() == count_of(store)
    put(again, 9)
    assert len(files_of(again)) == 3


def test_index_that_was_replaced_is_opened_again(store):
    (store.path / "index.sqlite").unlink()
    other = DiskStore(store.path)
    put(other, 3)
    put(store, 4)
    assert store.totals() == other.totals() == count_of(store)


@pytest.fixture
def locked(store, monkeypatch):
    """A store whose index another process holds, while a thread waits to remove something."""
    monkeypatch.setattr("kvfusion_rag.store.index.SHORT_WAIT", 0.05)
    monkeypatch.setattr("kvfusion_rag.store.disk.SHORT_WAIT", 0.05)
    with closing(sqlite3.connect(store.path / "index.sqlite", isolation_level=None)) as database:
        database.execute("BEGIN IMMEDIATE")
        removing = threading.Thread(target=lambda: store.forget(key_of(5)))
        removing.start()
        time.sleep(0.1)
        yield store
        database.execute("ROLLBACK")
        removing.join()


def test_locked_index_costs_a_short_wait_and_no_fault(locked, monkeypatch, caplog):
    monkeypatch.setattr("kvfusion_rag.store.index.FLUSH_SECONDS", 0.0)
    began = time.monotonic()
    assert read(locked, 1)[0] is None and not locked.put(key_of(3), kv_of(3))
    files_of(locked)[0].write_bytes(b"x")
    assert Miss.TRUNCATED in [read(locked, number)[0] for number in range(3)]
    assert time.monotonic() - began < 3
    assert locked.failed_writes == 0 and locked.rejected == 1 and "cannot be removed" in caplog.text


@pytest.mark.parametrize("error", [OSError(errno.EROFS, "Read-only file system"), sqlite3.OperationalError("full")])
def test_failing_index_does_not_disturb_readers(store, monkeypatch, error):
    monkeypatch.setattr("kvfusion_rag.store.index.FLUSH_SECONDS", 0.0)
    store.close()
    monkeypatch.setattr(sqlite3, "connect", failing(error))
    assert read(store, 1)[0] is None
    store.close()
