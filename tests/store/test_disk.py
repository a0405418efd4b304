"""The disk tier: caps, eviction, removal, opening, and errors of the file system."""

import errno
import json
import os
import stat
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from stores import SIZE, failing, files_of, key_of, kv_of, put, read, same

from kvfusion_rag import DiskStore, InvalidInputError, StoreError
from kvfusion_rag.store import CODECS, Miss, VerifyReport, namespace_key
from kvfusion_rag.store.format import FORMAT_VERSION

NO_SPACE = OSError(errno.ENOSPC, "No space left on device")


@pytest.fixture
def store(tmp_path) -> DiskStore:
    return DiskStore(tmp_path / "store")


def stored(store: DiskStore, numbers, **names: str) -> list[int]:
    """Numbers of the documents that have a file, which does not count as a use."""
    return [number for number in numbers if key_of(number, **names) in store]


def entries(store: DiskStore) -> int:
    return sum(count for _, count in store.totals().values())


# Caps and eviction


@settings(max_examples=15)
@given(st.lists(st.tuples(st.integers(0, 9), st.booleans()), max_size=30), st.integers(1, 6))
def test_cap_holds_and_least_recently_used_files_are_evicted_first(tmp_path_factory, uses, cap):
    store = DiskStore(tmp_path_factory.mktemp("store") / "s", max_bytes=cap * SIZE)
    expected: list[int] = []  # least recently used first
    for number, is_put in uses:
        if is_put and number not in expected:
            put(store, number)
            expected = [*expected, number][-cap:]
        else:
            found = read(store, number)[0] is None
            assert found == (number in expected)
            if found:
                expected = [*[n for n in expected if n != number], number]
        assert {f.stat().st_size for f in files_of(store)} <= {SIZE}
        assert len(files_of(store)) == len(expected) <= cap
    assert store.verify().whole == len(expected)


def test_one_tenant_cannot_evict_files_of_another(tmp_path):
    store = DiskStore(tmp_path / "s", max_bytes=8 * SIZE, namespace_bytes=4 * SIZE)
    put(store, *range(4), namespace="b")
    put(store, *range(30), namespace="a")
    assert stored(store, range(4), namespace="b") == [0, 1, 2, 3] and entries(store) == 8


def test_full_store_evicts_files_of_the_writer_first(tmp_path):
    store = DiskStore(tmp_path / "s", max_bytes=8 * SIZE, namespace_bytes=4 * SIZE)
    for namespace, count in (("a", 4), ("b", 4), ("c", 6)):
        put(store, *range(count), namespace=namespace)
    left = {name: store.totals().get(namespace_key(name), (0, 0))[1] for name in "abc"}
    assert left == {"a": 3, "b": 4, "c": 1}


def test_document_larger_than_the_cap_is_rejected(tmp_path):
    store = DiskStore(tmp_path / "s", max_bytes=SIZE)
    put(store, 1)
    assert not store.put(key_of(2, 50), kv_of(2, 50))
    assert store.rejected == 1 and read(store, 1)[0] is None


def test_read_by_one_process_protects_from_eviction_by_another(tmp_path, monkeypatch):
    monkeypatch.setattr("kvfusion_rag.store.index.index.FLUSH_SECONDS", 0.0)
    reader, writer = (DiskStore(tmp_path / "s", max_bytes=2 * SIZE) for _ in range(2))
    put(writer, 1, 2)
    for number in (1, 2, 1, 1):
        assert read(reader, number)[0] is None
    put(writer, 3)
    assert stored(writer, (1, 2, 3)) == [1, 3]


def test_jumping_clock_does_not_change_the_order_of_eviction(tmp_path, monkeypatch):
    store = DiskStore(tmp_path / "s", max_bytes=2 * SIZE)
    put(store, 1)
    for number, now in ((2, 0.0), (3, 1e12)):
        monkeypatch.setattr(time, "time", lambda now=now: now)
        put(store, number)
    assert stored(store, (1, 2, 3)) == [2, 3]


# Removal and maintenance


def test_file_removed_during_a_read_is_read_to_its_end(store, monkeypatch):
    put(store, 1)
    preadv = os.preadv

    def remove_and_read(*arguments):
        store.clear()
        return preadv(*arguments)

    monkeypatch.setattr(os, "preadv", remove_and_read)
    miss, document = read(store, 1)
    assert miss is None and same(document, kv_of(1)) and not files_of(store)


def test_vanished_file_is_absent_and_can_be_stored_again(store):
    put(store, 1)
    files_of(store)[0].unlink()
    assert read(store, 1)[0] is Miss.ABSENT
    put(store, 1)
    assert read(store, 1)[0] is None and entries(store) == 1


def test_verify_reports_and_repairs(store):
    put(store, *range(4))
    first, second, third, _ = files_of(store)
    data = bytearray(first.read_bytes())
    data[-1] ^= 1
    first.write_bytes(data)
    second.unlink()
    third.rename(third.with_name("0" * 32 + third.name[32:]))
    assert store.verify() == VerifyReport(whole=1, broken=2, uncounted=0, missing=2)
    assert entries(store) == 1 and store.verify() == VerifyReport(1, 0, 0, 0)


def test_verify_keeps_the_cap_of_a_store_in_use(tmp_path, monkeypatch):
    """A document that is written while the index is repaired is either counted in the end or absent."""
    one, two = (DiskStore(tmp_path / "s", max_bytes=4 * SIZE) for _ in range(2))
    write = one._folder.write_file
    monkeypatch.setattr(one._folder, "write_file", lambda *given: (two.verify(), write(*given)))
    for number in range(8):
        one.put(key_of(number), kv_of(number))
        two.put(key_of(100 + number), kv_of(100 + number))
    count = len(files_of(one))
    assert count <= 4
    assert one.totals() == two.totals() == {namespace_key(""): (count * SIZE, count)}


def test_verify_does_not_report_a_removed_file_as_damaged(store, monkeypatch):
    put(store, 1)
    scan = store._folder.scan

    def remove_first(*given):
        for found in list(scan(*given)):
            store.forget(key_of(1)) if not given else None
            yield found

    monkeypatch.setattr(store._folder, "scan", remove_first)
    assert store.verify() == VerifyReport(0, 0, 0, 0)


def test_forget_removes_a_document_under_every_model_and_codec(tmp_path):
    stores = [DiskStore(tmp_path / "s", codec=codec) for codec in CODECS]
    for store in stores:
        for model in ("one", "two"):
            put(store, 1, 2, model=model)
    assert stores[0].forget(key_of(1, model="third")) == 4 == len(files_of(stores[0]))
    assert stored(stores[1], (1, 2), model="two") == [2]


def test_clear_of_a_namespace_leaves_the_others(store):
    for namespace in ("a", "b"):
        put(store, 1, namespace=namespace)
    assert store.clear(namespace_key("a")) == 1
    assert not stored(store, [1], namespace="a") and stored(store, [1], namespace="b")
    assert store.clear() == 1 and not files_of(store)


@pytest.mark.parametrize("remove", ["forget", "clear", "clear all", "clear by another process"])
def test_document_that_is_being_written_is_removed_too(store, monkeypatch, remove):
    write, other = store._folder.write_file, DiskStore(store.path)
    removals = {
        "forget": lambda: store.forget(key_of(1)),
        "clear": lambda: store.clear(namespace_key("")),
        "clear all": store.clear,
        "clear by another process": other.clear,
    }
    monkeypatch.setattr(store._folder, "write_file", lambda *given: (removals[remove](), write(*given)))
    assert not store.put(key_of(1), kv_of(1))
    assert not files_of(store) and not store.totals()


def test_only_keys_reach_the_file_system(tmp_path):
    store, foreign = DiskStore(tmp_path / "s"), tmp_path / "outside" / "x" / "y" / "m.safetensors"
    foreign.parent.mkdir(parents=True)
    foreign.write_bytes(b"x")
    for wrong in ("../../outside/x", "", "tenant", "*"):
        with pytest.raises(InvalidInputError):
            store.clear(wrong)
        with pytest.raises(InvalidInputError):
            store.forget(wrong)
    assert foreign.exists()


# Errors of the file system


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS])
def test_failed_write_causes_one_warning_and_pauses_writing(store, monkeypatch, caplog, code):
    put(store, 0)
    monkeypatch.setattr(os, "writev", failing(OSError(code, os.strerror(code))))
    assert not store.put(key_of(1), kv_of(1)) and not store.put(key_of(2), kv_of(2))
    assert len([r for r in caplog.records if "cannot be stored" in r.message]) == 1
    assert not list((store.path / "tmp").iterdir()) and read(store, 0)[0] is None and entries(store) == 1
    monkeypatch.undo()
    assert not store.put(key_of(1), kv_of(1))
    store._paused_until = 0.0
    put(store, 1)
    assert read(store, 1)[0] is None


def test_unreadable_files_are_misses_with_one_warning(store, monkeypatch, caplog):
    put(store, 1)
    monkeypatch.setattr(os, "preadv", failing(OSError(errno.EIO, "Input/output error")))
    assert read(store, 1)[0] is read(store, 1)[0] is Miss.UNREADABLE
    assert len([r for r in caplog.records if "cannot be read" in r.message]) == 1


@pytest.mark.parametrize("code", [errno.EIO, errno.ESTALE])
def test_unreachable_folder_contains_nothing(store, monkeypatch, code):
    refuse = failing(OSError(code, os.strerror(code)))
    for name in ("lstat", "open"):
        monkeypatch.setattr(os, name, refuse)
    assert key_of(1) not in store and not store.put(key_of(1), kv_of(1))


def test_failed_maintenance_is_a_store_error(store, monkeypatch):
    put(store, 1)
    monkeypatch.setattr(Path, "unlink", failing(OSError(errno.EROFS, "Read-only file system")))
    for work in (store.clear, lambda: store.forget(key_of(1))):
        with pytest.raises(StoreError, match="cannot be changed \\(Read-only file system\\)"):
            work()


# Opening


@pytest.mark.parametrize("wrong", [{"max_bytes": 0}, {"namespace_bytes": 0}, {"codec": "zip"}, {"mode": "0600"},
                                   {"mode": 0o400}, {"mode": True}, {"mode": 0o1777}], ids=str)  # fmt: skip
def test_wrong_options_are_rejected_before_a_folder_is_made(tmp_path, wrong):
    with pytest.raises(InvalidInputError, match=f"{next(iter(wrong))} is"):
        DiskStore(tmp_path / "s", **wrong)
    assert not (tmp_path / "s").exists()


def test_path_that_cannot_be_a_store_is_a_store_error(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(StoreError, match="is a file"):
        DiskStore(tmp_path / "file")
    (tmp_path / "mine/tmp").mkdir(parents=True)
    (tmp_path / "mine/thesis.txt").write_text("mine")
    for read_only in (False, True):
        with pytest.raises(StoreError, match="is not a document store"):
            DiskStore(tmp_path / "mine", read_only=read_only)


@pytest.mark.parametrize(
    ("text", "message"), [("{", "is damaged"), ("[]", "is damaged"), ('{"version": "x"}', "must be a whole number")]
)
def test_unreadable_format_version_is_a_store_error(store, text, message):
    (store.path / "format.json").write_text(text)
    with pytest.raises(StoreError, match=message):
        DiskStore(store.path)


def test_newer_format_is_a_store_error_and_keeps_its_files(store):
    put(store, 1)
    (store.path / "format.json").write_text(json.dumps({"version": 99}))
    with pytest.raises(StoreError, match=f"has format 99, but this version reads up to {FORMAT_VERSION}"):
        DiskStore(store.path)
    assert len(files_of(store)) == 1


def older(folder: Path, documents: int) -> Path:
    """Write a store folder as format 2 left it: with documents, an index and other files."""
    for number in range(documents):
        file = folder / f"v2-{CODECS[number % 2]}" / ("0" * 32) / "ab" / f"{number}.safetensors"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(b"old")
    for name in ("quarantine", "tmp"):
        (folder / name).mkdir()
    for name in ("quarantine/one.checksum", "tmp/host~1~1~1", "index.sqlite", "index.sqlite-wal", "calibration.json"):
        (folder / name).write_bytes(b"old")
    (folder / "format.json").write_text(json.dumps({"format": "kvfusion-document-store", "version": 2}))
    return folder


def test_documents_of_an_older_format_are_removed_with_one_log_line(tmp_path, caplog):
    folder = older(tmp_path / "s", 3)
    store = DiskStore(folder)
    assert [record.getMessage() for record in caplog.records] == [
        f"the store at {folder} has format 2, this version writes {FORMAT_VERSION}: its 3 documents were removed and "
        "will be computed again"
    ]
    assert not any(file.read_bytes() == b"old" for file in folder.rglob("*") if file.is_file())
    assert {path.name for path in folder.iterdir() if "sqlite" not in path.name} == {"format.json", "tmp", "v4-raw"}
    put(store, 1)
    store.close()
    again = DiskStore(folder)
    assert read(again, 1)[0] is None and entries(again) == 1 and len(caplog.records) == 1


def test_removal_of_an_older_format_keeps_files_of_the_current_one(tmp_path):
    """Two processes may open an old store at the same time, and the first may have stored a document already."""
    folder = older(tmp_path / "s", 1)
    store = DiskStore(folder)
    put(store, 1)
    (folder / "format.json").write_text(json.dumps({"version": 2}))
    assert read(DiskStore(folder), 1)[0] is None
    put(store, 2)
    assert entries(store) == 2


def test_older_format_cannot_be_opened_for_reading_only(tmp_path):
    folder = older(tmp_path / "s", 1)
    with pytest.raises(StoreError, match=f"has format 2, but this version reads format {FORMAT_VERSION}"):
        DiskStore(folder, read_only=True)
    assert len(list(folder.glob("v2-*/*/*/*"))) == 1


def test_unwritable_store_can_be_opened_for_reading(store, monkeypatch):
    put(store, 1)
    monkeypatch.setattr(os, "writev", failing(PermissionError(13, "Permission denied")))
    with pytest.raises(StoreError, match=r"cannot be opened for writing .*read_only=True"):
        DiskStore(store.path)
    reader = DiskStore(store.path, read_only=True)
    assert read(reader, 1)[0] is None and not reader.put(key_of(2), kv_of(2))


def test_store_opened_for_reading_is_not_changed(store):
    put(store, 0, 1)
    files_of(store)[1].write_bytes(b"x")
    store.close()

    def state() -> dict[str, tuple[int, int]]:
        return {str(f): (f.stat().st_size, f.stat().st_mtime_ns) for f in (store.path, *store.path.rglob("*"))}

    before, reader = state(), DiskStore(store.path, read_only=True)
    assert sorted(str(read(reader, number)[0]) for number in range(2)) == ["None", "truncated"]
    assert not reader.put(key_of(9), kv_of(9)) and reader.verify().broken == 1 and len(reader.totals()) == 1
    for work in (reader.clear, lambda: reader.forget(key_of(1))):
        with pytest.raises(StoreError, match="read_only=True"):
            work()
    reader.close()
    assert state() == before


def test_folder_name_may_contain_any_letters(tmp_path):
    store = DiskStore(tmp_path / "магазин 店 ü")
    put(store, 1)
    assert read(store, 1)[0] is None


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o664])
def test_files_folders_and_index_have_the_given_mode_whatever_the_umask(tmp_path, mode):
    before = os.umask(0o077)
    try:
        store = DiskStore(tmp_path / "s", mode=mode)
        put(store, 1)
    finally:
        os.umask(before)
    (file,) = files_of(store)
    folders = [store.path, *file.parents[:3], store.path / "tmp"]
    files = [file, store.path / "format.json", *store.path.glob("index.sqlite*")]
    assert {stat.S_IMODE(folder.stat().st_mode) for folder in folders} == {mode | (mode & 0o444) >> 2}
    assert {stat.S_IMODE(one.stat().st_mode) for one in files} == {mode}


def test_fsync_waits_for_the_file_and_its_folders(tmp_path, monkeypatch):
    synced: list[str] = []
    real = os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: (synced.append(os.readlink(f"/proc/self/fd/{fd}")), real(fd)))
    put(DiskStore(tmp_path / "without"), 1)
    assert not synced
    store = DiskStore(tmp_path / "with", fsync=True)
    synced.clear()
    put(store, 1)
    (file,) = files_of(store)
    assert str(store.path / "tmp") in synced[0]
    assert {str(folder) for folder in file.parents[:3]} <= set(synced)
