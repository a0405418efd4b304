"""A store that keeps its word: what was to be stored durably is in the slowest tier, or the caller is told."""

import os
import shutil
import threading
import time
from pathlib import Path

import pytest
from store_generators import ask, origins, over
from stores import fetch, files_of, remote_entries

from kvfusion_rag import (
    DiskStore,
    Document,
    DocumentStore,
    DurabilityError,
    InvalidInputError,
    MemoryStore,
    RemoteStore,
    StoreError,
)
from kvfusion_rag.engine.document_kvs import Scope
from kvfusion_rag.store import collections, namespace_key, open_store

MANY = [Document(f"the mill number {number} was built in 1874", id=f"d{number}") for number in range(80)]


def slow(remote: RemoteStore, seconds: float) -> None:
    write = remote._folder.write
    remote._folder.write = lambda *given: (time.sleep(seconds), write(*given))[1]


def shared_store(folder: Path, local: str = "local", **options) -> DocumentStore:
    return open_store((folder / "remote").as_uri(), local=folder / local, remote={"wait": 30.0}, **options)


def test_remote_store_slower_than_prefill_gets_every_document(tmp_path):
    """The queue has room for 64 uploads, and fewer are dropped only because prefill waits."""
    gen = over(shared_store(tmp_path))
    slow(gen.store.remote, 0.02)
    sources = gen.prefill(MANY, durable=True)
    assert {source.origin for source in sources} == {"computed"}
    assert not gen.store.missing(gen._engine.read(MANY).keys) and gen.store.remote.dropped == 0
    assert gen.store.flush()


def test_questions_do_not_wait_for_a_full_queue(tmp_path, monkeypatch, go):
    store = shared_store(tmp_path)
    monkeypatch.setattr(store.remote._folder, "write", lambda *_: go.wait(30))
    began = time.monotonic()
    assert set(fetch(store, range(70))) == {"computed"}
    assert store.remote.dropped == 70 - 64 and time.monotonic() - began < 20
    go.set()


def test_remote_store_that_lost_documents_is_filled_again(tmp_path):
    gen = over(shared_store(tmp_path))
    gen.prefill(MANY[:6], durable=True)
    before = sorted(path.name for path in (tmp_path / "remote").rglob("*.safetensors"))
    for durable in (True, False):
        shutil.rmtree(tmp_path / "remote")
        assert {source.origin for source in gen.prefill(MANY[:6], durable=durable)} == {"memory"}
        assert gen.store.flush()
        assert sorted(path.name for path in (tmp_path / "remote").rglob("*.safetensors")) == before


def test_documents_that_only_memory_has_are_uploaded_too(tmp_path):
    gen = over(shared_store(tmp_path))
    gen.prefill(MANY[:3], durable=True)
    for file in [*(tmp_path / "remote").rglob("*.safetensors"), *files_of(gen.store.disk)]:
        file.unlink()
    gen.prefill(MANY[:3], durable=True)
    assert gen.store.remote.verify() == (len(gen._engine.read(MANY[:3]).keys) + 2, 0)  # with prefix and probe


def test_prefix_is_stored_like_a_document(tmp_path):
    gen = over(shared_store(tmp_path))
    gen.prefill(MANY[:2], durable=True)
    prefix = gen._engine.prompts.fused_layout(None).prefix
    assert prefix and not gen.store.missing([gen._engine.document_kvs.key(prefix, Scope())])
    other = over(shared_store(tmp_path, "other"))
    computed = other.store.metrics.computed
    assert {source.origin for source in other.answer("who?", MANY[:2], max_new_tokens=1).sources} == {"remote"}
    assert other.store.metrics.computed == computed  # neither documents nor prefix


def test_one_failed_upload_is_tried_again(tmp_path, monkeypatch):
    gen = over(shared_store(tmp_path))
    monkeypatch.setattr("kvfusion_rag.store.documents.UPLOAD_PAUSES", (0.0, 0.01))
    write, failures = gen.store.remote._folder.write, iter([OSError("throttled")])

    def throttled(*given):
        if (error := next(failures, None)) is not None:
            raise error
        write(*given)

    monkeypatch.setattr(gen.store.remote._folder, "write", throttled)
    gen.prefill(MANY[:5], durable=True)
    assert not gen.store.missing(gen._engine.read(MANY[:5]).keys) and gen.store.remote.failed_writes == 1


def test_lasting_failure_names_the_documents_and_the_cause(tmp_path, monkeypatch):
    gen = over(shared_store(tmp_path))
    monkeypatch.setattr("kvfusion_rag.store.documents.UPLOAD_PAUSES", (0.0, 0.01))
    lost, write = [MANY[1], MANY[3]], gen.store.remote._folder.write
    names = set(gen._engine.read(lost).keys)

    def forbidden(path, data):
        if any(path.removesuffix(".safetensors").endswith(name.split("-", 1)[1]) for name in names):
            raise PermissionError("access denied")
        write(path, data)

    monkeypatch.setattr(gen.store.remote._folder, "write", forbidden)
    with pytest.raises(DurabilityError, match=r"2 documents \('d1', 'd3'\): PermissionError: access denied") as caught:
        gen.prefill(MANY[:5], durable=True)
    assert caught.value.documents == ("d1", "d3") and isinstance(caught.value, StoreError)
    assert origins(ask(gen)) == {"computed"}  # answers go on


def test_unreachable_remote_store_is_an_error_of_durable_prefill_only(tmp_path, monkeypatch, caplog):
    gen = over(shared_store(tmp_path))
    gen.prefill(MANY[:2], durable=True)
    monkeypatch.setattr(gen.store.remote._folder, "exists", lambda path: 1 / 0)
    assert len(gen.prefill(MANY[:2])) == 2 and "are not uploaded again" in caplog.text
    with pytest.raises(StoreError, match="ZeroDivisionError"):
        gen.prefill(MANY[:2], durable=True)


def test_folder_with_a_small_cap_cannot_keep_all(tmp_path):
    sizes = [path.stat().st_size for path in _stored_files(tmp_path / "probe", MANY[:4])]
    gen = over(DiskStore(tmp_path / "small", max_bytes=2 * max(sizes)))
    with pytest.raises(DurabilityError, match="a cap is too small, or a write failed"):
        gen.prefill(MANY[:4], durable=True)


def _stored_files(folder: Path, given: list[Document]) -> list[Path]:
    gen = over(folder)
    gen.prefill(given, durable=True)
    return files_of(gen.store.disk)


@pytest.mark.parametrize("options", [{"durable": True}, {"collection": "mine"}])
def test_durable_needs_a_store_that_can_be_written(tmp_path, options):
    over(tmp_path / "s").prefill(MANY[:1])
    for store in (MemoryStore(), DiskStore(tmp_path / "s", read_only=True)):
        with pytest.raises(InvalidInputError, match="need a folder or URL that can be written"):
            over(store).prefill(MANY[:1], **options)


@pytest.mark.parametrize("name", ["", " ", "a\nb", "x" * 1001, 3])
def test_collection_has_a_printable_name(tmp_path, name):
    with pytest.raises(InvalidInputError, match="collection is"):
        over(tmp_path / "s").prefill(MANY[:1], collection=name)


@pytest.mark.parametrize("place", ["folder", "url"])
def test_manifest_tells_which_documents_are_missing(tmp_path, place):
    def opened() -> DocumentStore:
        return open_store(tmp_path / "s") if place == "folder" else shared_store(tmp_path)

    gen = over(opened())
    gen.prefill(MANY[:4], durable=True, collection="mine")
    gen.prefill(MANY[3:6], durable=True, collection="mine")
    gen.with_namespace("tenant").prefill(MANY[:1], durable=True, collection="mine")
    store = opened()
    tenant, mine = sorted(collections(store.slowest_tier), key=lambda one: len(one.documents))
    assert (mine.name, mine.namespace, list(mine.documents)) == ("mine", namespace_key(""), [d.id for d in MANY[:6]])
    assert (tenant.namespace, list(tenant.documents)) == (namespace_key("tenant"), ["d0"])
    assert collections(store.slowest_tier, namespace_key("tenant")) == [tenant]
    assert not store.missing([key for keys in mine.documents.values() for key in keys])
    victim = mine.documents["d2"][0]
    folder = tmp_path / ("s" if place == "folder" else "remote")
    next(folder.rglob(f"*{victim.split('-', 1)[1]}.safetensors")).unlink()
    assert opened().missing([key for keys in mine.documents.values() for key in keys]) == [victim]


def test_damaged_manifest_is_an_error_and_foreign_names_are_ignored(tmp_path):
    gen = over(tmp_path / "s")
    gen.prefill(MANY[:2], durable=True, collection="mine")
    (part,) = (tmp_path / "s" / "manifests").rglob("*.jsonl")
    (part.parent / "notes.txt").write_text("mine")
    os.symlink("/etc/passwd", part.parent / part.name.replace(part.name[:16], "f" * 16))
    assert len(collections(gen.store.disk)) == 1
    part.write_bytes(part.read_bytes()[:-20])
    with pytest.raises(StoreError, match=r"manifest .* is damaged; store its collection again"):
        collections(gen.store.disk)


def test_threads_that_fill_a_store_at_once_lose_nothing(tmp_path):
    gen = over(shared_store(tmp_path))
    slow(gen.store.remote, 0.005)
    failures: list[BaseException] = []

    def work(part: int) -> None:
        try:
            gen.prefill(MANY[part::4], durable=True, collection="mine")
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(part,)) for part in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    (mine,) = collections(gen.store.remote)
    assert len(mine.documents) == len(MANY) and not gen.store.missing(gen._engine.read(MANY).keys)
    assert remote_entries(gen.store.remote) == len(gen._engine.read(MANY).keys) + 2  # prefix and probe


def test_unreachable_remote_store_costs_one_bounded_wait(tmp_path, monkeypatch, go):
    """Stored documents do not wait one by one for a store that hangs."""
    gen = over(shared_store(tmp_path))
    gen.prefill(MANY, durable=True)
    monkeypatch.setattr("kvfusion_rag.store.remote.maintenance.STALLED_SECONDS", 0.2)
    monkeypatch.setattr("kvfusion_rag.engine.document_kvs.kvs.CHECKED_AT_ONCE", 8)
    asked: list[str] = []
    monkeypatch.setattr(gen.store.remote._folder, "exists", lambda path: asked.append(path) or go.wait(30))
    gen.prefill(MANY)
    assert len(asked) <= 8  # of 80
