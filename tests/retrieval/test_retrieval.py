"""Retrieval: every file has a defined outcome, chunks are true pieces of files, and updates touch what changed."""

from __future__ import annotations

import json
import os
import shutil
import sys
import zlib
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny import TOKENIZER_KINDS, tokenizer

from kvfusion_rag import Document, InvalidInputError, RetrievalError
from kvfusion_rag.retrieval import DocumentIndex, IndexReport, SentenceTransformerEmbedder, read_document
from kvfusion_rag.retrieval.loaders import KINDS, Kind, UnreadableFileError, find_files, read_bytes
from kvfusion_rag.retrieval.splitting import MIN_CHUNK_TOKENS, split_text
from kvfusion_rag.text.encoder import PlainEncoder

EXAMPLES = Path(__file__).parent.parent.parent / "examples"
LIGHTHOUSE = EXAMPLES / "lighthouse"


class WordEmbedder:
    """Vectors of hashed words: near texts share words. Remembers every text that it was given."""

    def __init__(self, size: int = 64) -> None:
        self.name = f"words-{size}"
        self.fingerprint = self.name
        self.size = size
        self.texts: list[str] = []
        self.failure: Exception | None = None

    def embed_documents(self, texts: Sequence[str]) -> np.ndarray:
        if self.failure is not None:
            raise self.failure
        self.texts += texts
        return np.stack([self.embed_question(text) for text in texts])

    def embed_question(self, text: str) -> np.ndarray:
        vector = np.full(self.size, 1e-3, dtype=np.float32)
        for word in text.lower().split():
            vector[zlib.crc32(word.strip(".,?!#").encode(errors="replace")) % self.size] += 1
        return vector / np.linalg.norm(vector)

    def embed_questions(self, texts: Sequence[str]) -> np.ndarray:
        return np.stack([self.embed_question(text) for text in texts])


def count_words(text: str) -> int:
    return len(text.split())


def open_index(folder: Path | None = None, embedder: WordEmbedder | None = None, **options) -> DocumentIndex:
    options = {"count_tokens": count_words, "chunk_tokens": 12} | options
    return DocumentIndex(folder, embedder=embedder or WordEmbedder(), **options)


@pytest.fixture
def docs(tmp_path: Path) -> Path:
    """Three files, two of them longer than one chunk."""
    folder = tmp_path / "docs"
    (folder / "sea").mkdir(parents=True)
    sentences = [f"The lamp number {n} was lit by keeper {n} in the winter. " for n in range(12)]
    (folder / "lamps.txt").write_text("".join(sentences[:5]))
    (folder / "keepers.md").write_text("# The keepers\n\n" + "\n\n".join(sentences[5:]))
    (folder / "sea" / "whales.txt").write_text("Martha is a blue whale.")
    return folder


def text_of(path: Path) -> str:
    return path.read_bytes().decode()


def reasons(skipped) -> dict[str, str]:
    return {Path(one.path).name: one.reason for one in skipped}


# Loaders


def write(tmp_path: Path, name: str, data: bytes) -> Path:
    path = tmp_path / name
    path.write_bytes(data)
    return path


def test_plain_text_keeps_every_character_and_takes_its_title_from_the_name(tmp_path):
    loaded = read_document(write(tmp_path, "My notes.txt", "a\r\n\r\n  b\té🙂\n".encode()))
    assert (loaded.text, loaded.title, loaded.kind) == ("a\r\n\r\n  b\té🙂\n", "My notes", "text")


@pytest.mark.parametrize(
    ("source", "title"),
    [
        ("text\n\n## The  *keepers* ##\n\n# Later", "The *keepers*"),
        ("```\n# a comment\n```\n\n# Real", "Real"),
        ("~~~\n```\n# a comment\n~~~\n# Real", "Real"),
        ("#hashtag\n\nno heading", "file"),
        ("#\n\nempty heading", "file"),
        ("# " + "x" * 500, "x" * 200),
    ],
)
def test_markdown_title_is_the_first_heading(tmp_path, source, title):
    loaded = read_document(write(tmp_path, "file.md", source.encode()))
    assert (loaded.text, loaded.title) == (source, title)


def test_html_is_read_as_a_reader_sees_it(tmp_path):
    page = (
        "<html><head><title>The \n pier</title><style>p {}</style></head><body><nav>Home</nav><h1>Old <i>pier</i></h1>"
        "<script>alert(1)</script><p>It was\n  built &amp; <b>paint</b>ed<br>in 1911.</p><!-- secret -->"
        "<ul><li>one</li><li>two</li></ul><pre>a\n  b</pre></body></html>"
    )
    loaded = read_document(write(tmp_path, "file.html", page.encode()))
    assert loaded.title == "The pier"
    assert loaded.text == "Old pier\n\nIt was built & painted\nin 1911.\n\none\n\ntwo\n\na\n  b"


def test_html_says_its_own_encoding(tmp_path):
    page = '<meta charset="iso-8859-1"><h1>Caf\u00e9</h1>'.encode("latin-1")
    assert read_document(write(tmp_path, "file.htm", page)).title == "Café"


def test_pdf_text_and_title():
    loaded = read_document(LIGHTHOUSE / "barley_cup.pdf")
    assert loaded.title == "Barley Cup Regatta"
    assert "It was first held in 1926." in loaded.text


def pdf(*, encrypted: bool = False) -> bytes:
    """A PDF of one blank page."""
    import io

    from pypdf import PdfWriter

    writer = PdfWriter()
    writer.add_blank_page(100, 100)
    if encrypted:
        writer.encrypt("secret", algorithm="RC4-128")
    buffer = io.BytesIO()
    writer.write(buffer)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("name", "data", "reason"),
    [
        ("a.txt", b"", "empty"),
        ("a.txt", b" \n\t ", "no text in it"),
        ("a.txt", b"\x7fELF\x00\x01", "binary, not text"),
        ("a.txt", bytes(range(128, 256)) * 4, "neither UTF-8"),
        ("a.md", b"\x01\x02\x03\x04 x", "neither UTF-8"),
        ("a.html", b"<script>only()</script>", "no text in it"),
        ("a.html", b"\x00\x01\x02", "binary, not HTML"),
        ("a.pdf", b"not a pdf", "cannot be read as PDF"),
        ("a.pdf", pdf(), "a scan?"),
        ("a.pdf", pdf(encrypted=True), "cannot be read as PDF"),
        ("a.exe", b"MZ", "unknown kind '.exe'"),
    ],
)
def test_what_cannot_be_read_has_a_reason(tmp_path, name, data, reason):
    with pytest.raises(UnreadableFileError, match=reason.replace("?", r"\?")):
        read_document(write(tmp_path, name, data))


@pytest.mark.parametrize(
    ("data", "text"),
    [
        ("Café in Besançon, 1874".encode("latin-1"), "Caf\ufffd in Besan\ufffdon, 1874"),
        (b"\xef\xbb\xbfmarked", "marked"),
        ("naïve 東京".encode("utf-16"), "naïve 東京"),
    ],
)
def test_other_encodings(tmp_path, data, text):
    assert read_document(write(tmp_path, "a.txt", data)).text == text


def test_a_huge_file_is_not_read_to_its_end(tmp_path):
    path = write(tmp_path, "a.txt", b"x" * 1001)
    with pytest.raises(UnreadableFileError, match="larger than the limit"):
        read_bytes(path, max_bytes=1000)
    assert len(read_bytes(path, max_bytes=1001)) == 1001


@given(
    data=st.binary(max_size=300),
    suffix=st.sampled_from(sorted(KINDS)),
    head=st.sampled_from([b"", b"%PDF-1.4\n", b"<p>"]),
)
def test_no_bytes_break_a_reader(data, suffix, head):
    try:
        loaded = read_document(Path(f"file{suffix}"), head + data)
    except UnreadableFileError as error:
        assert str(error)
    else:
        assert loaded.text.strip()
        assert loaded.title
        (loaded.text + loaded.title).encode()  # no lone surrogates


# Finding files


def test_finding_files_reports_what_it_leaves_out(tmp_path):
    folder = tmp_path / "docs"
    (folder / ".git").mkdir(parents=True)
    (folder / ".git" / "a.txt").write_text("x")
    (folder / ".kvfusion").mkdir()
    (folder / ".kvfusion" / "a.txt").write_text("x")
    (folder / "b.txt").write_text("x")
    (folder / "A.MD").write_text("x")
    (folder / "data.bin").write_text("x")
    (folder / "loop").symlink_to(folder)
    (folder / "broken.txt").symlink_to(tmp_path / "nowhere")
    (folder / "again.txt").symlink_to(folder / "b.txt")
    (folder / "folder.txt").mkdir()
    os.mkfifo(folder / "pipe.txt")
    found, skipped = find_files([folder, folder / "b.txt"])
    assert [path.name for path in found] == ["A.MD", "b.txt"]
    assert reasons(skipped) == {
        ".git": "hidden",
        "broken.txt": "broken link",
        "data.bin": f"unknown kind '.bin'; known: {', '.join(KINDS)}",
        "loop": "link to a folder; name the folder itself to index it",
        "pipe.txt": "not a regular file",
    }


def test_what_is_named_itself_may_be_hidden_or_a_link(tmp_path):
    hidden = tmp_path / ".notes"
    hidden.mkdir()
    (hidden / ".secret.txt").write_text("x")
    (tmp_path / "link").symlink_to(hidden)
    assert find_files([tmp_path / "link", hidden / ".secret.txt"])[0] == [hidden.resolve() / ".secret.txt"]


def test_a_missing_path_is_an_error(tmp_path):
    with pytest.raises(RetrievalError, match="does not exist"):
        find_files([tmp_path, tmp_path / "nope"])


@pytest.mark.skipif(sys.platform != "linux", reason="needs a file system that takes any bytes as names")
def test_names_that_are_not_unicode(tmp_path):
    (tmp_path / os.fsdecode(b"a\xff.txt")).write_text("x")
    _, skipped = find_files([tmp_path])
    assert reasons(skipped) == {"a\ufffd.txt": "its name is not valid Unicode"}


@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="needs a file whose reading fails")
def test_a_file_that_cannot_be_read_is_skipped(docs):
    (docs / "bad.txt").symlink_to("/proc/self/mem")  # even root cannot read its first byte
    with pytest.raises(UnreadableFileError, match="cannot be read"):
        read_bytes(docs / "bad.txt")
    with open_index() as index:
        assert reasons(index.update(docs).skipped) == {"bad.txt": "link to a file of unknown kind"}


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_files_and_folders_without_permission_are_skipped(docs):
    (docs / "lamps.txt").chmod(0)
    (docs / "sea").chmod(0)
    with open_index() as index:
        report = index.update(docs)
    (docs / "sea").chmod(0o700)
    assert report.files == ("keepers.md",)
    assert set(reasons(report.skipped)) == {"lamps.txt", "sea"}


# Splitting

PIECES = st.sampled_from(
    [
        *("word ", "é", "🙂", "👩‍🚀", "\u0301", "日本", "a" * 30, ". ", "\n", "\n\n", "\r\n", "\t"),
        *("# Head\n", "- item\n", "`code`", "**b**", "| a | b |\n", "```\n", "[x](y) ", "> q\n"),
    ]
)


def count_bytes(text: str) -> int:
    """As a byte-level tokenizer counts in the worst case, so one character may be four tokens."""
    return len(text.encode())


@given(
    pieces=st.lists(PIECES, max_size=60),
    kind=st.sampled_from(["text", "markdown"]),
    limit=st.integers(MIN_CHUNK_TOKENS, 60),
)
def test_chunks_are_pieces_of_the_text_within_the_limit(pieces: list[str], kind: Kind, limit: int):
    text = "".join(pieces)
    chunks = split_text(text, kind, limit, count_bytes)
    end = 0
    for chunk in chunks:
        assert text[chunk.start : chunk.end] == chunk.text
        assert chunk.text.strip()
        assert count_bytes(chunk.text) <= limit
        assert not text[end : chunk.start].strip()  # nothing but white space is lost, and nothing comes twice
        end = chunk.end
    assert not text[end:].strip()


@given(
    text=st.text(st.characters(exclude_categories=["Cs"]), max_size=200),
    limit=st.integers(MIN_CHUNK_TOKENS, 40),
    kind=st.sampled_from(TOKENIZER_KINDS),
)
def test_chunks_fit_a_model_as_its_tokenizer_counts(text: str, limit: int, kind: str):
    encoder = PlainEncoder(tokenizer(kind))

    def count(text: str) -> int:
        return len(encoder.encode(text))

    for chunk in split_text(text, "text", limit, count):
        assert text[chunk.start : chunk.end] == chunk.text
        assert count(chunk.text) <= limit


def test_a_chunk_size_too_small_for_a_character_is_refused():
    with pytest.raises(InvalidInputError, match="at least 8 tokens"):
        open_index(chunk_tokens=7)


# Updating


def test_the_first_update_reads_everything(docs):
    with open_index() as index:
        report = index.update(docs)
        assert report.added == ("keepers.md", "lamps.txt", "sea/whales.txt") == index.files() == report.files
        assert report.chunks == len(index) > 3
        assert not (report.changed or report.removed or report.unchanged or report.skipped)


def test_chunks_stand_in_their_files(docs):
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
    """All documents held, without their distances to the question and their scores."""
    documents = index.search("lamp", len(index))
    return {
        d.id: replace(d, metadata={k: v for k, v in d.metadata.items() if k != "distance"}, score=None)
        for d in documents
    }


def test_an_update_without_changes_embeds_nothing(docs):
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


def test_only_what_changed_is_embedded(docs):
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


def test_a_file_that_turns_unreadable_leaves_the_index(docs):
    with open_index() as index:
        index.update(docs)
        (docs / "lamps.txt").write_bytes(b"\x00\x01")
        report = index.update(docs)
        assert report.removed == ("lamps.txt",)
        assert reasons(report.skipped) == {"lamps.txt": "binary, not text"}
        assert index.files() == ("keepers.md", "sea/whales.txt")


def test_files_elsewhere_stay_until_they_are_gone_from_disk(tmp_path, docs):
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


def test_a_write_that_was_cut_off_is_made_good(docs):
    embedder = WordEmbedder()
    with open_index(docs / ".kvfusion", embedder) as index:
        embedder.failure = RuntimeError("out of memory")
        with pytest.raises(RuntimeError):
            index.update(docs)
        embedder.failure = None
        assert len(index.update(docs).added) == 3
        whole = snapshot(index)
        index._collection.delete(["lamps.txt#2"])  # as if the process had died between two writes
        embedder.texts.clear()
        assert index.update(docs).changed == ("lamps.txt",)
        assert snapshot(index) == whole


def test_documents_and_index_move_together(tmp_path, docs):
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


def test_an_index_inside_the_documents_is_not_indexed(docs):
    with open_index(docs / "index") as index:
        index.update(docs)
        (docs / "index" / "note.txt").write_text("not a document")
        assert index.update(docs).files == ("keepers.md", "lamps.txt", "sea/whales.txt")


def test_more_chunks_than_one_write_takes(tmp_path):
    folder = tmp_path / "docs"
    folder.mkdir()
    for n in range(60):
        (folder / f"{n:02}.txt").write_text(" ".join(f"word{n}x{i}." for i in range(120)))
    with open_index(tmp_path / "index") as index:
        report = index.update(folder)
        assert len(report.added) == 60
        assert report.chunks == 600
        assert index.update(folder).unchanged == report.added


def test_nothing_to_index_is_an_error(tmp_path):
    with open_index() as index:
        with pytest.raises(RetrievalError, match="there is no file to index"):
            index.update(tmp_path)
        (tmp_path / "a.txt").touch()
        with pytest.raises(RetrievalError, match=r"1 skipped, the first .*a\.txt' \(empty\)"):
            index.update(tmp_path)
        with pytest.raises(RetrievalError, match="does not exist"):
            index.update(tmp_path / "nope")
        with pytest.raises(InvalidInputError, match="no path"):
            index.update([])


# Searching


def test_search_does_not_depend_on_how_the_index_grew(tmp_path, docs):
    (docs / "copy.txt").write_text(text_of(docs / "lamps.txt"))  # equal vectors but for the title
    with open_index(base=docs) as one, open_index(base=docs) as other:
        one.update(docs)
        for path in ("sea", "lamps.txt", "keepers.md", "copy.txt"):
            other.update(docs / path)
        for question in ("the lamp", "keeper 7 winter", "whale"):
            assert [d.id for d in one.search(question, 7)] == [d.id for d in other.search(question, 7)]


def test_equal_distances_come_in_the_order_of_their_ids(tmp_path):
    for folder in "cab":
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "same.txt").write_text("The same words everywhere.")
    with open_index() as index:
        index.update(tmp_path)
        assert [d.id for d in index.search("same words", 2)] == ["a/same.txt#1", "b/same.txt#1"]


@pytest.mark.parametrize(
    ("question", "top_k", "message"), [("", 5, "blank"), (" \n", 5, "blank"), ("a", 0, "top_k is 0")]
)
def test_bad_searches(docs, question, top_k, message):
    with open_index() as index:
        index.update(docs)
        with pytest.raises(InvalidInputError, match=message):
            index.search(question, top_k)


def test_odd_questions_find_something(docs):
    with open_index() as index:
        index.update(docs)
        for question in ("\ud800", "\x00", "🙂" * 1000, "w" * 100_000):
            assert len(index.search(question, 2)) == 2


def test_an_empty_index_says_so():
    with open_index() as index, pytest.raises(RetrievalError, match="is empty"):
        index.search("anything")


# Folders and memory


def test_other_settings_live_side_by_side(tmp_path, docs):
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


def test_a_search_with_settings_that_the_folder_lacks_names_those_it_has(tmp_path, docs):
    with open_index(tmp_path / "index") as index:
        index.update(docs)
    with (
        open_index(tmp_path / "index", chunk_tokens=99) as index,
        pytest.raises(RetrievalError, match=r"chunks of 99 tokens.*only: 12 tokens, 'words-64'"),
    ):
        index.search("lamp")


def test_indexes_in_memory_share_nothing(docs):
    import chromadb

    others = chromadb.EphemeralClient()  # as another library in the same process makes one
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


def test_a_folder_is_opened_once_at_a_time(tmp_path, docs, monkeypatch):
    monkeypatch.setattr("kvfusion_rag.retrieval.chroma.LOCK_SECONDS", 0.01)
    with open_index(tmp_path / "index"), pytest.raises(RetrievalError, match="in use"):
        open_index(tmp_path / "index")
    with open_index(tmp_path / "index") as index:
        index.update(docs)


def test_folders_that_hold_something_else_are_left_alone(tmp_path, docs):
    before = sorted(docs.rglob("*"))
    with pytest.raises(RetrievalError, match=r"is no index: it holds 'keepers\.md'"):
        open_index(docs)
    assert sorted(docs.rglob("*")) == before
    with pytest.raises(RetrievalError, match="cannot be opened"):
        open_index(docs / "lamps.txt")


def test_a_broken_database_is_an_error_that_names_the_way_out(tmp_path, docs):
    with open_index(tmp_path / "index") as index:
        index.update(docs)
    (tmp_path / "index" / "chroma.sqlite3").write_bytes(b"garbage" * 1000)
    with pytest.raises(RetrievalError, match="delete the folder to build it anew"):
        open_index(tmp_path / "index")
    shutil.rmtree(tmp_path / "index")  # and it is not locked any more
    with open_index(tmp_path / "index") as index:
        assert len(index.update(docs).added) == 3


# The real embedding model


@cache
def load_minilm() -> SentenceTransformerEmbedder:
    return SentenceTransformerEmbedder(device="cpu")


@pytest.fixture
def minilm() -> SentenceTransformerEmbedder:
    return load_minilm()


def example_questions() -> list[dict]:
    return [json.loads(line) for line in (EXAMPLES / "questions.jsonl").read_text(encoding="utf-8").splitlines()]


def test_example_answers_stand_in_their_documents():
    rows = example_questions()
    assert len(rows) >= 12
    assert {row["source"] for row in rows} == {path.name for path in LIGHTHOUSE.iterdir() if path.suffix in KINDS}
    for row in rows:
        text = " ".join(read_document(LIGHTHOUSE / row["source"]).text.split())
        assert any(answer in text for answer in row["answers"]), row


def test_every_example_question_finds_its_document(minilm):
    with DocumentIndex(count_tokens=count_words, chunk_tokens=150, embedder=minilm) as index:
        assert not index.update(LIGHTHOUSE).skipped
        for row in example_questions():
            assert row["source"] in [d.metadata["file"] for d in index.search(row["question"], 5)]


@pytest.mark.default_model
def test_the_default_model_answers_example_questions_from_their_documents(default_model):
    rows = example_questions()
    texts = [read_document(LIGHTHOUSE / row["source"]).text for row in rows]
    answers = [
        default_model.answer(row["question"], [text], max_new_tokens=32).text
        for row, text in zip(rows, texts, strict=True)
    ]
    right = [
        any(right.casefold() in answer.casefold() for right in row["answers"])
        for row, answer in zip(rows, answers, strict=True)
    ]
    assert sum(right) > len(rows) / 2, answers


def test_vectors_have_length_one_and_a_stable_fingerprint(minilm):
    vectors = minilm.embed_documents(["a lighthouse", "a whale"])
    assert vectors.dtype == np.float32
    assert vectors.shape == (2, 384)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, rtol=1e-5)
    np.testing.assert_allclose(minilm.embed_question("a whale"), vectors[1], atol=1e-6)
    together = minilm.embed_questions(["a whale", "why does a lamp burn so long in winter?"])
    np.testing.assert_allclose(together[0], vectors[1], atol=1e-6)
    assert SentenceTransformerEmbedder(device="cpu").fingerprint == minilm.fingerprint


def test_chunks_beyond_the_embedding_model_are_told(minilm, caplog):
    minilm.embed_documents(["short", "word " * 400])
    assert "1 of 2 chunks are longer than the 256 tokens" in caplog.text


def test_an_embedding_model_that_cannot_be_loaded(tmp_path):
    with pytest.raises(RetrievalError, match="cannot be loaded"):
        SentenceTransformerEmbedder(tmp_path)
