"""Documents that are stored in batches, in this process: what is computed, what failed, and what the store lists."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvfusion_rag import Document, InvalidInputError, StoreError
from kvfusion_rag.cluster import GeneratorSpec, index_documents
from kvfusion_rag.cluster.pool import apart
from kvfusion_rag.cluster.spec import WorkerCache
from kvfusion_rag.store import collections, namespace_key, open_store

DOCUMENTS = [Document(f"The old mill has {n} sacks of flour.", id=f"mill-{n}") for n in range(40)]


@pytest.fixture
def spec(tmp_path, model_folder, monkeypatch) -> GeneratorSpec:
    monkeypatch.setenv("KVFUSION_HOME", str(tmp_path / "home"))
    return GeneratorSpec(str(model_folder), (tmp_path / "shared").as_uri(), options={"mode": "fusion"})


def lacking(spec: GeneratorSpec, documents: list[Document]) -> set[str]:
    """Return the ids of the documents that the store's URL does not have."""
    generator = spec.load()
    keys = generator.store_keys(documents)
    missing = set(generator.store.missing({key for own in keys.values() for key in own}))
    return {name for name, own in keys.items() if not missing.isdisjoint(own)}


def occupy_folders(spec: GeneratorSpec, documents: list[Document], shared: Path) -> None:
    """Put a file in the place of the folder of each document, so that the store can keep none of them."""
    index_documents(documents, spec)
    for file in shared.glob("v*/*/*/*.safetensors"):
        file.unlink()
    for folder in shared.glob("v*/*/*"):
        folder.rmdir()
        folder.write_text("")


def test_second_run_stores_nothing(spec):
    first = index_documents(DOCUMENTS, spec)
    assert (first.stored, first.present, first.failed) == (40, 0, {})
    second = index_documents(DOCUMENTS, spec)
    assert (second.stored, second.present, second.failed) == (0, 40, {})


def test_store_that_lost_documents_has_them_again(spec, tmp_path):
    index_documents(DOCUMENTS, spec)
    for file in sorted((tmp_path / "shared").glob("v*/*/*/*.safetensors"))[::2]:
        file.unlink()
    lost = lacking(spec, DOCUMENTS)
    assert index_documents(DOCUMENTS, spec).stored == len(lost) > 10
    assert not lacking(spec, DOCUMENTS)


def test_failures_are_exactly_the_documents_that_the_store_lacks(spec, tmp_path):
    occupy_folders(spec, DOCUMENTS[:3], tmp_path / "shared")
    report = index_documents(DOCUMENTS, spec, collection="mills")
    assert set(report.failed) == lacking(spec, DOCUMENTS) >= {"mill-0", "mill-1", "mill-2"}
    assert report.stored + report.present + len(report.failed) == len(DOCUMENTS) and report.stored
    assert all("does not have" in reason for reason in report.failed.values())


def test_invalid_document_fails_alone(spec):
    long = Document("mill " * 3000, id="long")
    report = index_documents([*DOCUMENTS[:5], long], GeneratorSpec(spec.model, spec.store, options={**spec.options}))
    assert report.stored == 5 and list(report.failed) == ["long"] and "tokens" in report.failed["long"]


def test_collection_lists_the_documents_of_the_last_run(spec, monkeypatch):
    monkeypatch.setattr("kvfusion_rag.cluster.indexing.DOCUMENTS_PER_PART", 7)
    index_documents(DOCUMENTS, spec, collection="mills")
    index_documents(DOCUMENTS[10:], spec, collection="mills")
    tier = open_store(spec.store).slowest_tier
    [found] = collections(tier, namespace_key(""))
    assert set(found.documents) == {document.id for document in DOCUMENTS[10:]}
    assert len(tier.records("manifests/")) == 5


def test_collection_that_cannot_be_written_is_reported(spec, monkeypatch):
    def refuse(*_: object) -> None:
        raise StoreError("the disk is full")

    monkeypatch.setattr("kvfusion_rag.cluster.indexing.write_manifest", refuse)
    report = index_documents(DOCUMENTS[:2], spec, collection="mills")
    assert (report.stored, report.unlisted) == (2, "the disk is full")


def test_ids_are_positions_by_default_and_must_differ(spec):
    index_documents([Document("an old mill"), Document(" "), Document("two doves")], spec, collection="c")
    [found] = collections(open_store(spec.store).slowest_tier)
    assert set(found.documents) == {"1", "3"}
    with pytest.raises(InvalidInputError, match="two documents have the id 'a'"):
        index_documents([Document("x", id="a"), Document("y", id="a")], spec)
    with pytest.raises(InvalidInputError, match="store is None"):
        index_documents(DOCUMENTS, GeneratorSpec(spec.model))


def test_workers_of_one_machine_have_folders_of_their_own(spec):
    first, second = WorkerCache("s3://bucket/kv"), WorkerCache("s3://bucket/kv")
    assert first.folder != second.folder
    free = first.folder
    del first
    assert WorkerCache("s3://bucket/kv").folder == free


@pytest.mark.parametrize("bad", [set(), {0}, {3}, {0, 6}, set(range(7))])
def test_invalid_items_do_not_touch_the_results_of_others(bad):
    def work(items: list[int]) -> list[str]:
        if bad & set(items):
            raise InvalidInputError("invalid")
        return [f"done {item}" for item in items]

    found = apart(work, list(range(7)), lambda item, error: f"{error} {item}")
    assert found == [f"{'invalid' if item in bad else 'done'} {item}" for item in range(7)]
