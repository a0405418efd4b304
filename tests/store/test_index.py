"""The index of a disk store: damaged, replaced, locked or failing."""

import errno
import os
import sqlite3
import threading
import time
from contextlib import closing, contextmanager

import pytest
from stores import SIZE, failing, files_of, key_of, kv_of, put, read

from kvfusion_rag import DiskStore
from kvfusion_rag.store import Miss, VerifyReport, namespace_key


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


@contextmanager
def held(store: DiskStore):
    """Hold the index, as another process would."""
    with closing(sqlite3.connect(store.path / "index.sqlite", isolation_level=None)) as database:
        database.execute("BEGIN IMMEDIATE")
        yield
        database.execute("ROLLBACK")


def test_documents_are_stored_while_another_process_holds_the_index(store):
    """They cost one short wait together, can be read at once, and are counted when the index is free."""
    waits, connect = [], sqlite3.connect
    with held(store), pytest.MonkeyPatch.context() as patch:

        def connect_and_note(*given, **options):
            waits.append(options["timeout"])
            return connect(*given, **options)

        patch.setattr(sqlite3, "connect", connect_and_note)
        put(store, *range(3, 43))
        assert sum(waits) <= 0.05
        assert {read(store, number)[0] for number in range(43)} == {None}
    assert (store.failed_writes, store.rejected) == (0, 0)
    assert store.totals() == count_of(store) and len(files_of(store)) == 43
    assert store.verify() == VerifyReport(43, 0, 0, 0)


def test_thread_that_waits_for_the_index_does_not_hold_up_documents(store):
    with held(store):
        removing = threading.Thread(target=lambda: store.forget(key_of(5)))
        removing.start()
        time.sleep(0.1)
        put(store, *range(3, 6))
    removing.join()
    assert {read(store, number)[0] for number in range(3, 5)} == {None} and read(store, 5)[0] is Miss.ABSENT
    assert store.totals() == count_of(store)


def test_damaged_file_is_replaced_while_another_process_holds_the_index(store):
    with held(store):
        files_of(store)[0].write_bytes(b"x")
        misses = [read(store, number)[0] for number in range(3)]
        number = misses.index(Miss.TRUNCATED)
        put(store, number)
        assert read(store, number)[0] is None
    assert store.totals() == count_of(store) and len(files_of(store)) == 3


def test_index_that_is_held_for_long_keeps_the_cap_nearly(tmp_path):
    store = DiskStore(tmp_path / "s", max_bytes=32 * SIZE)
    put(store, *range(32))
    with held(store):
        stored = [store.put(key_of(number), kv_of(number)) for number in range(100, 110)]
        assert stored == [True] * 2 + [False] * 8 and store.rejected == 8  # a sixteenth of the cap
    put(store, 200)
    assert len(files_of(store)) == 32 and store.totals() == count_of(store)
    assert all(key_of(number) in store for number in (100, 101, 200))


def test_documents_forgotten_while_the_index_was_held_are_not_counted(store):
    with held(store):
        put(store, 3, 4)
        for file in files_of(store)[:2]:
            file.unlink()
    store.close()
    assert sum(entries for _, entries in store.totals().values()) <= 5
    store.verify()
    assert store.totals() == count_of(store)


def test_process_that_dies_before_it_counts_leaves_nothing_uncounted(store):
    with held(store):
        put(store, 3)
    assert DiskStore(store.path).totals() == count_of(store)


@pytest.mark.parametrize("error", [OSError(errno.EROFS, "Read-only file system"), sqlite3.OperationalError("full")])
def test_failing_index_does_not_disturb_readers(store, monkeypatch, error):
    monkeypatch.setattr("kvfusion_rag.store.index.index.FLUSH_SECONDS", 0.0)
    store.close()
    monkeypatch.setattr(sqlite3, "connect", failing(error))
    assert read(store, 1)[0] is None
    store.close()
