"""The document index: updates, searches and index folders."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from indexes import WordEmbedder, count_words, open_index, reasons

from kvfusion_rag import Document, InvalidInputError, RetrievalError
from kvfusion_rag.retrieval import DocumentIndex, IndexReport


def text_of(path: Path) -> str:
    return path.read_bytes().decode()


# Updates


def test_first_update_adds_all_files(docs):
    with open_index() as index:
        report = index.update(docs)
        assert report.added == ("keepers.md", "lamps.txt", "sea/whales.txt") == index.files() == report.files
        assert report.chunks == len(index) > 3
        assert not (report.changed or report.removed or report.unchanged or report.skipped)


def test_documents_point_into_their_files(docs):
    with open_index() as index:
        report = index.update(docs)
        documents = index.search("keeper", report.chunks)
    assert len(documents) == report.chunks
    for document in documents:
        meta = document.metadata
        assert document.text == text_of(docs / meta["file"])[meta["start"] : meta["end"]]
        assert count_words(document.text) <= 12
        assert meta["source"] == str(docs / meta["file"])
        assert document.id == f"{meta['file']}#{meta['chunk']}"
    assert {d.title for d in documents} == {"The keepers", "lamps", "whales"}


def snapshot(index: DocumentIndex) -> dict[str | None, Document]:
    """Return all documents of the index, without distances and scores."""
    documents = index.search("lamp", len(index))
    return {
        d.id: replace(d, metadata={k: v for k, v in d.metadata.items() if k != "distance"}, score=None)
        for d in documents
    }


def test_update_without_changes_embeds_nothing(docs):
    embedder = WordEmbedder()
    with open_index(docs / ".kvfusion", embedder) as index:
        index.update(docs)
        before = snapshot(index)
    embedder.texts.clear()
    os.utime(docs / "lamps.txt", (1, 1))
    with open_index(docs / ".kvfusion", embedder) as index:
        report = index.update(docs)
        assert report.unchanged == ("keepers.md", "lamps.txt", "sea/whales.txt")
        assert not (report.added or report.changed or report.removed)
        assert snapshot(index) == before
    assert embedder.texts == []


def test_only_changed_files_are_embedded(docs):
    embedder = WordEmbedder()
    with open_index(docs / ".kvfusion", embedder) as index:
        index.update(docs)
        before = snapshot(index)
        embedder.texts.clear()
        (docs / "lamps.txt").write_text("A single short line about lamps.")
        (docs / "new.txt").write_text("Something new about harbours.")
        (docs / "sea" / "whales.txt").unlink()
        report = index.update(docs)
        after = snapshot(index)
    assert report == IndexReport(
        added=("new.txt",),
        changed=("lamps.txt",),
        removed=("sea/whales.txt",),
        unchanged=("keepers.md",),
        skipped=(),
        chunks=len(after),
    )
    assert sorted(embedder.texts) == ["lamps\nA single short line about lamps.", "new\nSomething new about harbours."]
    kept = {i: d for i, d in before.items() if d.metadata["file"] == "keepers.md"}
    assert after == kept | {i: after[i] for i in ("lamps.txt#1", "new.txt#1")}


def test_file_that_became_unreadable_is_removed(docs):
    with open_index() as index:
        index.update(docs)
        (docs / "lamps.txt").write_bytes(b"\x00\x01")
        report = index.update(docs)
        assert report.removed == ("lamps.txt",)
        assert reasons(report.skipped) == {"lamps.txt": "binary, not text"}
        assert index.files() == ("keepers.md", "sea/whales.txt")


def test_files_outside_the_updated_paths_remain_until_deleted(tmp_path, docs):
    other = tmp_path / "other"
    other.mkdir()
    (other / "a.txt").write_text("Ferries cross the sound.")
    with open_index(tmp_path / "index") as index:
        index.update(docs)
        report = index.update([other])
        assert (report.files, report.removed) == (("other/a.txt",), ())
        assert "docs/lamps.txt" in index.files()
        assert {d.metadata["file"] for d in index.search("lamp keeper", 50, files=report.files)} == {"other/a.txt"}
        (docs / "lamps.txt").unlink()
        assert index.update(other).removed == ("docs/lamps.txt",)


def test_interrupted_write_is_repaired(docs):
    embedder = WordEmbedder()
    with open_index(docs / ".kvfusion", embedder) as index:
        embedder.failure = RuntimeError("out of memory")
        with pytest.raises(RuntimeError):
            index.update(docs)
        embedder.failure = None
        assert len(index.update(docs).added) == 3
        whole = snapshot(index)
        index._collection.delete(["lamps.txt#2"])  # as if the process had been killed between two writes
        embedder.texts.clear()
        assert index.update(docs).changed == ("lamps.txt",)
        assert snapshot(index) == whole


def test_documents_and_index_can_be_moved_together(tmp_path, docs):
    embedder = WordEmbedder()
    with open_index(docs / ".kvfusion", embedder) as index:
        index.update(docs)
        before = snapshot(index)
    embedder.texts.clear()
    moved = tmp_path / "elsewhere" / "moved"
    shutil.move(docs, moved)
    with open_index(moved / ".kvfusion", embedder) as index:
        assert not index.update(moved).removed
        after = snapshot(index)
    assert embedder.texts == []
    assert before.keys() == after.keys()
    assert {d.metadata["source"] for d in after.values()} == {str(moved / d.metadata["file"]) for d in after.values()}


def test_index_inside_the_documents_is_not_indexed(docs):
    with open_index(docs / "index") as index:
        index.update(docs)
        (docs / "index" / "note.txt").write_text("not a document")
        assert index.update(docs).files == ("keepers.md", "lamps.txt", "sea/whales.txt")


def test_more_chunks_than_fit_into_one_write(tmp_path):
    folder = tmp_path / "docs"
    folder.mkdir()
    for n in range(30):
        (folder / f"{n:02}.txt").write_text(" ".join(f"word{n}x{i}." for i in range(240)))
    with open_index(tmp_path / "index") as index:
        report = index.update(folder)
        assert len(report.added) == 30
        assert report.chunks == 600
        assert index.update(folder).unchanged == report.added


def test_update_without_usable_files_raises_an_error(tmp_path):
    with open_index() as index:
        with pytest.raises(RetrievalError, match="there are no files to index"):
            index.update(tmp_path)
        (tmp_path / "a.txt").touch()
        with pytest.raises(RetrievalError, match=r"1 skipped, the first .*a\.txt' \(empty\)"):
            index.update(tmp_path)
        with pytest.raises(RetrievalError, match="does not exist"):
            index.update(tmp_path / "nope")
        with pytest.raises(InvalidInputError, match="paths is empty"):
            index.update([])


# Searches


def test_search_does_not_depend_on_the_order_of_updates(tmp_path, docs):
    (docs / "copy.txt").write_text(text_of(docs / "lamps.txt"))  # the vectors differ only by the title
    with open_index(base=docs) as one, open_index(base=docs) as other:
        one.update(docs)
        for path in ("sea", "lamps.txt", "keepers.md", "copy.txt"):
            other.update(docs / path)
        for question in ("the lamp", "keeper 7 winter", "whale"):
            assert [d.id for d in one.search(question, 7)] == [d.id for d in other.search(question, 7)]


def test_equal_distances_are_ordered_by_id(tmp_path):
    for folder in "cab":
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "same.txt").write_text("The same words everywhere.")
    with open_index() as index:
        index.update(tmp_path)
        assert [d.id for d in index.search("same words", 2)] == ["a/same.txt#1", "b/same.txt#1"]


@pytest.mark.parametrize(
    ("question", "top_k", "message"), [("", 5, "blank"), (" \n", 5, "blank"), ("a", 0, "top_k is 0")]
)
def test_invalid_searches_raise_an_error(docs, question, top_k, message):
    with open_index() as index:
        index.update(docs)
        with pytest.raises(InvalidInputError, match=message):
            index.search(question, top_k)


def test_unusual_questions_are_answered(docs):
    with open_index() as index:
        index.update(docs)
        for question in ("\ud800", "\x00", "🙂" * 1000, "w" * 100_000):
            assert len(index.search(question, 2)) == 2


def test_empty_index_raises_an_error():
    with open_index() as index, pytest.raises(RetrievalError, match="is empty"):
        index.search("anything")


# Folders and memory


def test_indexes_with_different_settings_share_a_folder(tmp_path, docs):
    variants = [
        {"chunk_tokens": 12},
        {"chunk_tokens": 30},
        {"count_tokens": len, "chunk_tokens": 30},
        {"embedder": WordEmbedder(32)},
    ]
    sizes = []
    for variant in variants:
        with open_index(tmp_path / "index", **variant) as index:
            with pytest.raises(RetrievalError):
                index.search("lamp")
            assert len(index.update(docs).added) == 3
            sizes.append(len(index))
    assert sizes[0] > sizes[1] < sizes[2]
    for variant, size in zip(variants, sizes, strict=True):
        with open_index(tmp_path / "index", **variant) as index:
            assert len(index) == size
            assert len(index.update(docs).unchanged) == 3


def test_search_with_missing_settings_names_the_existing_ones(tmp_path, docs):
    with open_index(tmp_path / "index") as index:
        index.update(docs)
    with (
        open_index(tmp_path / "index", chunk_tokens=99) as index,
        pytest.raises(RetrievalError, match=r"chunks of 99 tokens.*only: 12 tokens, 'words-64'"),
    ):
        index.search("lamp")


def test_indexes_in_memory_are_separate(docs):
    import chromadb

    others = chromadb.EphemeralClient()  # like another library in the same process
    others.get_or_create_collection("notes", embedding_function=None)
    before = {c.name for c in others.list_collections()}
    with open_index() as one, open_index() as other:
        one.update(docs / "lamps.txt")
        other.update(docs / "sea")
        assert (one.files(), other.files()) == (("lamps.txt",), ("whales.txt",))
        assert len(others.list_collections()) == len(before) + 2
    assert {c.name for c in others.list_collections()} == before
    with open_index() as again:
        assert len(again) == 0
    others.delete_collection("notes")
    others.close()


def test_folder_can_be_opened_only_once_at_a_time(tmp_path, docs, monkeypatch):
    monkeypatch.setattr("kvfusion_rag.retrieval.chroma.LOCK_SECONDS", 0.01)
    with open_index(tmp_path / "index"), pytest.raises(RetrievalError, match="in use"):
        open_index(tmp_path / "index")
    with open_index(tmp_path / "index") as index:
        index.update(docs)


def test_other_folders_are_not_changed(tmp_path, docs):
    before = sorted(docs.rglob("*"))
    with pytest.raises(RetrievalError, match=r"is not an index: it contains 'keepers\.md'"):
        open_index(docs)
    assert sorted(docs.rglob("*")) == before
    with pytest.raises(RetrievalError, match="cannot be opened"):
        open_index(docs / "lamps.txt")


def test_broken_database_raises_an_error_with_a_remedy(tmp_path, docs):
    with open_index(tmp_path / "index") as index:
        index.update(docs)
    (tmp_path / "index" / "chroma.sqlite3").write_bytes(b"garbage" * 1000)
    with pytest.raises(RetrievalError, match="delete the folder to rebuild it"):
        open_index(tmp_path / "index")
    shutil.rmtree(tmp_path / "index")  # it is no longer locked
    with open_index(tmp_path / "index") as index:
        assert len(index.update(docs).added) == 3
