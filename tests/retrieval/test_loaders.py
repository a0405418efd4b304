"""Finding and reading files: every file is either read or skipped with a reason."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from indexes import LIGHTHOUSE, open_index, reasons

from kvfusion_rag import RetrievalError
from kvfusion_rag.retrieval import read_document
from kvfusion_rag.retrieval.loaders import KINDS, UnreadableFileError, find_files, read_bytes


def write(tmp_path: Path, name: str, data: bytes) -> Path:
    path = tmp_path / name
    path.write_bytes(data)
    return path


def test_plain_text_is_unchanged_and_titled_by_its_file_name(tmp_path):
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


def test_html_becomes_its_visible_text(tmp_path):
    page = (
        "<html><head><title>The \n pier</title><style>p {}</style></head><body><nav>Home</nav><h1>Old <i>pier</i></h1>"
        "<script>alert(1)</script><p>It was\n  built &amp; <b>paint</b>ed<br>in 1911.</p><!-- secret -->"
        "<ul><li>one</li><li>two</li></ul><pre>a\n  b</pre></body></html>"
    )
    loaded = read_document(write(tmp_path, "file.html", page.encode()))
    assert loaded.title == "The pier"
    assert loaded.text == "Old pier\n\nIt was built & painted\nin 1911.\n\none\n\ntwo\n\na\n  b"


def test_html_uses_its_declared_encoding(tmp_path):
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
        ("a.txt", b" \n\t ", "contains no text"),
        ("a.txt", b"\x7fELF\x00\x01", "binary, not text"),
        ("a.txt", bytes(range(128, 256)) * 4, "neither UTF-8"),
        ("a.md", b"\x01\x02\x03\x04 x", "neither UTF-8"),
        ("a.html", b"<script>only()</script>", "contains no text"),
        ("a.html", b"\x00\x01\x02", "binary, not HTML"),
        ("a.pdf", b"not a pdf", "cannot be read as PDF"),
        ("a.pdf", pdf(), "a scan?"),
        ("a.pdf", pdf(encrypted=True), "cannot be read as PDF"),
        ("a.exe", b"MZ", "unknown file type '.exe'"),
    ],
)
def test_unreadable_file_has_a_reason(tmp_path, name, data, reason):
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


def test_file_above_the_size_limit_is_rejected(tmp_path):
    path = write(tmp_path, "a.txt", b"x" * 1001)
    with pytest.raises(UnreadableFileError, match="larger than the limit"):
        read_bytes(path, max_bytes=1000)
    assert len(read_bytes(path, max_bytes=1001)) == 1001


@settings(max_examples=50)
@given(
    data=st.binary(max_size=300),
    suffix=st.sampled_from(sorted(KINDS)),
    head=st.sampled_from([b"", b"%PDF-1.4\n", b"<p>"]),
)
def test_readers_accept_or_reject_any_bytes(data, suffix, head):
    try:
        loaded = read_document(Path(f"file{suffix}"), head + data)
    except UnreadableFileError as error:
        assert str(error)
    else:
        assert loaded.text.strip()
        assert loaded.title
        (loaded.text + loaded.title).encode()  # no lone surrogates


# Finding files


def test_skipped_files_are_reported_with_a_reason(tmp_path):
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
        "data.bin": f"unknown file type '.bin'; known types: {', '.join(KINDS)}",
        "loop": "link to a folder; name the folder itself to index it",
        "pipe.txt": "not a regular file",
    }


def test_named_path_may_be_hidden_or_a_link(tmp_path):
    hidden = tmp_path / ".notes"
    hidden.mkdir()
    (hidden / ".secret.txt").write_text("x")
    (tmp_path / "link").symlink_to(hidden)
    assert find_files([tmp_path / "link", hidden / ".secret.txt"])[0] == [hidden.resolve() / ".secret.txt"]


def test_missing_path_raises_an_error(tmp_path):
    with pytest.raises(RetrievalError, match="does not exist"):
        find_files([tmp_path, tmp_path / "nope"])


@pytest.mark.skipif(sys.platform != "linux", reason="needs a file system that takes any bytes as names")
def test_file_names_that_are_not_unicode_are_skipped(tmp_path):
    (tmp_path / os.fsdecode(b"a\xff.txt")).write_text("x")
    _, skipped = find_files([tmp_path])
    assert reasons(skipped) == {"a\ufffd.txt": "its name is not valid Unicode"}


@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="needs a file whose reading fails")
def test_file_that_cannot_be_read_is_skipped(docs):
    (docs / "bad.txt").symlink_to("/proc/self/mem")  # even root cannot read its first byte
    with pytest.raises(UnreadableFileError, match="cannot be read"):
        read_bytes(docs / "bad.txt")
    with open_index() as index:
        assert reasons(index.update(docs).skipped) == {"bad.txt": "link to a file of unknown type"}


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_files_and_folders_without_permission_are_skipped(docs):
    (docs / "lamps.txt").chmod(0)
    (docs / "sea").chmod(0)
    with open_index() as index:
        report = index.update(docs)
    (docs / "sea").chmod(0o700)
    assert report.files == ("keepers.md",)
    assert set(reasons(report.skipped)) == {"lamps.txt", "sea"}
