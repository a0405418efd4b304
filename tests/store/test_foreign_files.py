"""What no store has made, inside a store's folder: it is skipped, left alone, and never leads outside the folder."""

import os
import time
from pathlib import Path

import pytest
from stores import FOREIGN, SIZE, fetch, files_of, key_of, kv_of, put, put_all, read, remote_entries

from kvfusion_rag import DiskStore, DocumentStore, StoreError
from kvfusion_rag.store import Miss, VerifyReport, namespace_key
from kvfusion_rag.store.folder import ABANDONED_SECONDS
from kvfusion_rag.store.format import file_name, namespace_of


@pytest.fixture
def store(tmp_path) -> DiskStore:
    store = DiskStore(tmp_path / "s")
    put(store, 1, 2)
    return store


def replace(path: Path, kind: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    FOREIGN[kind](path)


@pytest.mark.parametrize("kind", FOREIGN)
def test_entry_in_the_place_of_a_document_is_skipped(store, kind, caplog):
    path = store.path / file_name(key_of(1), "raw")
    replace(path, kind)
    before = path.lstat()
    assert key_of(1) not in store and read(store, 1)[0] is Miss.UNREADABLE
    assert store.verify() == VerifyReport(1, 0, 0, 1)
    assert not store.put(key_of(1), kv_of(1))
    assert store.failed_writes == 0
    put(store, 3)  # other documents are still stored
    assert store.forget(key_of(1)) == 0 and store.clear() == 2 and path.lstat() == before
    assert store.totals() == {} == DiskStore(store.path).totals()
    assert DiskStore(store.path, read_only=True).verify() == VerifyReport(0, 0, 0, 0)


@pytest.mark.parametrize("kind", FOREIGN)
@pytest.mark.parametrize(
    "place", ["{name}.safetensors", "v4-raw/{name}", "v4-raw/" + "0" * 32 + "/ab/{name}", "tmp/{name}.part"]
)
def test_other_entries_in_the_folder_are_skipped(store, kind, place):
    path = store.path / place
    replace(path, kind)
    os.utime(path, (0, time.time() - 2 * ABANDONED_SECONDS), follow_symlinks=False)
    again = DiskStore(store.path)
    assert again.verify() == VerifyReport(2, 0, 0, 0)
    put(again, 3)
    assert {read(again, number)[0] for number in (1, 2, 3)} == {None} and os.path.lexists(path)


@pytest.mark.parametrize("kind", FOREIGN)
@pytest.mark.parametrize("name", ["format.json", "tmp", "v4-raw"])
def test_store_without_its_own_entries_cannot_be_opened(store, kind, name):
    if kind == "folder" and name != "format.json":
        pytest.skip("these are folders")
    (store.path / name).rename(store.path.parent / "moved")
    replace(store.path / name, kind)
    with pytest.raises(StoreError, match=r"is damaged|cannot be opened"):
        DiskStore(store.path)


@pytest.mark.parametrize("depth", [0, 1, 2])
def test_linked_folders_are_not_followed(store, depth):
    """Whoever can write to the folder cannot let the store read, write or remove files elsewhere."""
    file = store.path / file_name(key_of(1), "raw")
    folder = [file.parents[2], file.parents[1], file.parent][depth]
    elsewhere = store.path.parent / "elsewhere"
    folder.rename(elsewhere)
    folder.symlink_to(elsewhere)
    files = sorted(elsewhere.rglob("*"))
    assert key_of(1) not in store and read(store, 1)[0] is Miss.UNREADABLE
    assert not store.put(key_of(1), kv_of(1)) and not store.put(key_of(1, namespace=""), kv_of(1))
    store.verify()
    store.forget(key_of(1))
    store.clear()
    assert (
        sorted(elsewhere.rglob("*")) == files and elsewhere.joinpath(file.relative_to(folder)).stat().st_size == SIZE
    )


@pytest.mark.parametrize(
    "name", ["", "x", "../outside", "/etc/passwd", "v4-raw/../x", "v4-raw", f"../{file_name(key_of(1), 'raw')}",
             file_name(key_of(1), "raw") + "\n", file_name(key_of(1), "raw").upper(), b"x", None, 3],
    ids=repr,
)  # fmt: skip
def test_only_names_of_documents_become_paths(store, name):
    assert namespace_of(name) is None
    for work in (store._folder.remove, store._folder.has, store._folder.open_file):
        with pytest.raises(ValueError, match="does not name the file of a document"):
            work(name)
    assert namespace_of(file_name(key_of(1), "v8")) == namespace_key("")


# Shared folders


def remote_file(shared, number: int) -> Path:
    return Path(shared._path(key_of(number)))


@pytest.mark.parametrize("kind", FOREIGN)
def test_entry_in_a_shared_folder_is_skipped(tmp_path, shared, kind):
    put_all(shared, 1, 2)
    shared.flush()
    replace(remote_file(shared, 1), kind)
    store = DocumentStore(None, DiskStore(tmp_path / "d"), shared)
    assert fetch(store, [1, 2]) == ["computed", "remote"] and not store.flush().unfinished
    assert shared.verify() == (1, 0) and remote_entries(shared) == 1
    assert shared.forget(key_of(1)) == 0 and shared.clear() == 1 and os.path.lexists(remote_file(shared, 1))


def test_links_in_a_shared_folder_are_not_followed(tmp_path, shared):
    put_all(shared, 1)
    shared.flush()
    folder, elsewhere = remote_file(shared, 1).parent, tmp_path / "elsewhere"
    folder.rename(elsewhere)
    folder.symlink_to(elsewhere)
    store = DocumentStore(None, DiskStore(tmp_path / "d"), shared)
    assert fetch(store, [1]) == ["computed"] and not store.flush().unfinished
    assert shared.clear() == 0 == remote_entries(shared) and len(list(elsewhere.iterdir())) == 1


def test_listed_names_are_checked(bucket, monkeypatch):
    """A store behind a URL may list anything."""
    put_all(bucket, 1)
    bucket.flush()
    removed, facts = [], {"size": 1, "type": "file"}
    own = bucket._path(key_of(1))
    root = bucket._folder.root
    names = [own, "/etc/passwd", f"{root}/../x/y/z/m.safetensors", f"{root}/v4-raw/a/b/c.safetensors",
             f"/else{own}", f"{own}.tmp/x"]  # fmt: skip
    monkeypatch.setattr(bucket._folder.system, "glob", lambda *_, **__: dict.fromkeys(names, facts))
    monkeypatch.setattr(bucket._folder.system, "rm_file", removed.append)
    assert bucket.totals() == {namespace_key(""): (1, 1)} and bucket.clear() == 1 and removed == [own]


@pytest.mark.parametrize("size", [0, 1, SIZE - 1, SIZE + 1, 3 << 30], ids=str)
def test_remote_file_of_another_size_is_not_read(tmp_path, shared, size):
    put_all(shared, 1)
    shared.flush()
    os.truncate(remote_file(shared, 1), size)
    store = DocumentStore(None, DiskStore(tmp_path / "d"), shared)
    assert shared.get(key_of(1), SIZE) is Miss.TRUNCATED
    assert fetch(store, [1]) == ["computed"] and store.flush()
    assert shared.get(key_of(1), SIZE) == remote_file(shared, 1).read_bytes()  # the upload has replaced it


def test_remote_file_that_grows_while_it_is_read_is_cut_off(bucket, monkeypatch):
    asked = []

    class Endless:
        size = None

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def read(self, count):
            asked.append(count)
            return bytes(count)

    monkeypatch.setattr(bucket._folder.system, "open", lambda *given: Endless())
    assert bucket.get(key_of(1), SIZE) is Miss.TRUNCATED and asked == [SIZE + 1]


def test_verify_reads_no_more_than_the_header_of_a_file_of_another_size(shared, store):
    put_all(shared, 1)
    shared.flush()
    os.truncate(remote_file(shared, 1), 3 << 30)
    os.truncate(files_of(store)[0], 3 << 30)
    began = time.process_time()
    assert shared.verify() == (0, 1) and store.verify().broken == 1
    assert time.process_time() - began < 1.0
