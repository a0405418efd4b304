"""The document index: updates, searches and index folders."""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
from indexes import WordEmbedder, count_words, open_index, reasons

from kvfusion_rag import Document, InvalidInputError, RetrievalError
from kvfusion_rag.retrieval import DocumentIndex, IndexReport
from kvfusion_rag.retrieval.collection import DATABASE_FILE


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


@pytest.mark.parametrize("folder", [None, ".kvfusion"])
def test_interrupted_update_leaves_whole_files_and_is_continued(docs, folder):
    embedder = WordEmbedder()
    with open_index(folder and docs / folder, embedder, base=docs) as index:
        embedder.failure = RuntimeError("out of memory")
        with pytest.raises(RuntimeError):
            index.update(docs)
        assert (len(index), index.files()) == (0, ())
        embedder.failure = None
        index.update(docs / "lamps.txt")
        embedder.texts.clear()
        assert index.update(docs).added == ("keepers.md", "sea/whales.txt")
        assert not any(text.startswith("lamps\n") for text in embedder.texts)


def test_failed_write_changes_nothing(docs):
    with open_index(docs / ".kvfusion") as index:
        index.update(docs)
        before = snapshot(index)
        (docs / "lamps.txt").write_text("New lamps.")
        index._collection._database.execute(
            "CREATE TEMP TRIGGER full BEFORE INSERT ON chunk BEGIN SELECT RAISE(ABORT, 'full'); END"
        )
        with pytest.raises(RetrievalError):
            index.update(docs)
        assert snapshot(index) == before
        index._collection._database.execute("DROP TRIGGER full")
        assert index.update(docs).changed == ("lamps.txt",)
        after = snapshot(index)
    with open_index(docs / ".kvfusion") as index:
        assert index.update(docs).damage is None
        assert snapshot(index) == after


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
    with open_index() as one, open_index() as other:
        one.update(docs / "lamps.txt")
        other.update(docs / "sea")
        assert (one.files(), other.files()) == (("lamps.txt",), ("whales.txt",))
    with open_index() as again:
        assert len(again) == 0


def test_index_works_beside_any_client_of_chroma(docs):
    chromadb = pytest.importorskip("chromadb")
    client = chromadb.EphemeralClient(chromadb.config.Settings(allow_reset=True, anonymized_telemetry=False))
    client.get_or_create_collection("notes", embedding_function=None)
    with open_index() as index:
        index.update(docs)
        assert [collection.name for collection in client.list_collections()] == ["notes"]
    client.delete_collection("notes")
    client.close()


def test_folder_can_be_opened_only_once_at_a_time(tmp_path, docs, monkeypatch):
    monkeypatch.setattr("kvfusion_rag.retrieval.collection.LOCK_SECONDS", 0.01)
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


def damaged_copies(data: bytes) -> Iterator[tuple[str, bytes]]:
    """Yield the bytes of a database after every kind of damage."""
    yield "garbage", b"garbage" * 1000
    yield "empty", b""
    yield "zeros", bytes(len(data))
    for share in (0.1, 0.5, 0.9, 0.999):
        yield f"cut at {share}", data[: int(len(data) * share)]
        yield f"zeros after {share}", data[: int(len(data) * share)] + bytes(len(data) - int(len(data) * share))
    numbers = random.Random(1)
    for _ in range(60):
        start = numbers.randrange(len(data))
        length = numbers.choice([1, 1, 16, 700])
        noise = bytes(numbers.randrange(256) for _ in range(length))
        yield f"noise at {start}", (data[:start] + noise + data[start + length :])[: len(data)]


def test_damaged_index_is_rebuilt_or_unharmed(tmp_path, docs, caplog):
    with open_index(tmp_path / "index") as index:
        index.update(docs)
        right = snapshot(index)
    path = tmp_path / "index" / DATABASE_FILE
    data = path.read_bytes()
    rebuilt = 0
    for name, damaged in damaged_copies(data):
        path.write_bytes(damaged)
        caplog.clear()
        with open_index(tmp_path / "index") as index:
            report = index.update(docs)
            assert snapshot(index) == right, name
            assert (report.damage is None) == (not caplog.messages), name
            assert len(report.added) == (0 if report.damage is None else 3), name
        rebuilt += report.damage is not None
    assert rebuilt > 15  # the other damages are in unused bytes


def test_search_in_a_damaged_index_says_so(tmp_path, docs, caplog):
    with open_index(tmp_path / "index") as index:
        index.update(docs)
    (tmp_path / "index" / DATABASE_FILE).write_bytes(b"garbage" * 1000)
    with (
        open_index(tmp_path / "index") as index,
        pytest.raises(RetrievalError, match=r"was damaged .* index its files"),
    ):
        index.search("lamp")
    assert "was damaged" in caplog.text
    with open_index(tmp_path / "index") as index:
        assert len(index.update(docs).added) == 3


def test_index_can_replace_one_of_version_0_1(tmp_path, docs):
    (tmp_path / "index").mkdir()
    (tmp_path / "index" / "chroma.sqlite3").write_bytes(b"SQLite format 3")
    with open_index(tmp_path / "index") as index:
        assert len(index.update(docs).added) == 3


# Identical texts


def copies(folder: Path, count: int) -> None:
    """Write many pages with one text, and three pages that answer questions."""
    folder.mkdir()
    for n in range(count):
        (folder / f"page{n:03}.txt").write_text("This lamp page is not available. Lamp.")
    (folder / "fee.txt").write_text("The lamp fee is nine crowns.")
    (folder / "height.txt").write_text("The lamp is thirty metres high.")
    (folder / "year.txt").write_text("The lamp was lit in 1870.")


def test_identical_texts_are_embedded_once_and_do_not_crowd_out_others(tmp_path):
    copies(tmp_path / "docs", 300)
    embedder = WordEmbedder()
    with open_index(embedder=embedder) as index:
        assert len(index.update(tmp_path / "docs").added) == 303
        assert len(embedder.texts) == 4
        found = [document.metadata["file"] for document in index.search("lamp", 4)]
        assert set(found) == {"page000.txt", "fee.txt", "height.txt", "year.txt"}
        more = [document.metadata["file"] for document in index.search("lamp", 7)]
        assert set(found) < set(more)
        assert len(more) == len(set(more)) == 7
        assert len(index.search("lamp", 1000)) == len(index) == 303
        (one,) = index.search("lamp", 1, files={"page250.txt"})
        assert one.metadata["file"] == "page250.txt"


def test_shared_text_lives_as_long_as_one_file_contains_it(tmp_path):
    copies(tmp_path / "docs", 3)
    with open_index(tmp_path / "index") as index:
        index.update(tmp_path / "docs")
        for n in range(2):
            (tmp_path / "docs" / f"page{n:03}.txt").unlink()
            index.update(tmp_path / "docs")
            assert index.search("not available", 1)[0].id.endswith(f"page{n + 1:03}.txt#1")
        changed = snapshot(index)
        (tmp_path / "docs" / "page002.txt").write_text("Something else.")
        index.update(tmp_path / "docs")
        assert not any("available" in document.text for document in index.search("available", 10))
    with open_index(base=tmp_path) as fresh:
        (tmp_path / "docs" / "page002.txt").write_text("This lamp page is not available. Lamp.")
        fresh.update(tmp_path / "docs")
        assert snapshot(fresh) == changed


def test_every_text_is_found_by_itself_among_many_similar_ones(tmp_path):
    folder = tmp_path / "docs"
    folder.mkdir()
    for n in range(400):
        (folder / f"{n}.txt").write_text(f"Page {n} of 400 is not available.")
    (folder / "real.txt").write_text("A keeper feeds whales.")
    with open_index() as index:
        index.update(folder)
        assert index.search("keeper whales", 1)[0].text == "A keeper feeds whales."
        assert len(index.search("page", 390)) == 390
        assert len(index.search("page", 5, files=["7.txt", "real.txt"])) == 2


# Progress and reports


class Bar:
    """Records what a progress bar is told."""

    made: ClassVar[list[Bar]] = []

    def __init__(self, **options: Any) -> None:
        self.options = options
        self.total = options["total"]
        self.states: list[tuple[int, int | None]] = []
        self.n = 0
        self.made.append(self)

    def update(self, n: int) -> None:
        self.n += n
        self.states.append((self.n, self.total))

    def refresh(self) -> None:
        self.states.append((self.n, self.total))

    def close(self) -> None:
        pass


def test_progress_counts_chunks_while_they_are_embedded(tmp_path, monkeypatch):
    monkeypatch.setattr("kvfusion_rag.retrieval.updating.tqdm", Bar)
    Bar.made.clear()
    folder = tmp_path / "docs"
    folder.mkdir()
    for n in range(4):
        (folder / f"{n}.txt").write_text(" ".join(f"word{n}x{i}." for i in range(12 * 200)))
    with open_index(progress=True) as index:
        chunks = index.update(folder).chunks
    (bar,) = Bar.made
    assert bar.options["unit"] == "chunk"
    assert bar.states[-1] == (chunks, chunks)
    assert len({done for done, _ in bar.states}) > chunks / 100  # a file of hundreds of chunks takes several steps
    assert all(abs(total - chunks) <= 0.05 * chunks for _, total in bar.states)  # estimated from the first file on


def test_report_names_parts_that_were_left_out(tmp_path):
    folder = tmp_path / "docs"
    folder.mkdir()
    (folder / "a.md").write_text(
        "# Map\n\n![m](data:image/png;base64," + "iVBORw0KGgo" * 100 + ")\n\nThe map is blue."
    )
    (folder / "b.txt").write_bytes("Brücke für 7 €. ".encode() + b"\xff")
    with open_index() as index:
        for _ in range(2):  # also if the files are unchanged
            report = index.update(folder)
            assert {Path(one.path).name: one.reason for one in report.left_out} == {
                "a.md": "embedded base64 data (1,122 characters)",
                "b.txt": "1 bytes that are not UTF-8",
            }
        assert "base64" not in "".join(document.text for document in index.documents())
        assert report.to_dict()["left_out"][0]["path"] == str(folder / "a.md")
