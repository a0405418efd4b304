"""Finding and reading files: every file is either read or skipped with a reason."""

from __future__ import annotations

import io
import os
import re
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from growth import growth_of_time
from hypothesis import given, settings
from hypothesis import strategies as st
from indexes import LIGHTHOUSE, open_index, reasons
from pypdf import PageObject, PdfWriter

from kvfusion_rag import RetrievalError
from kvfusion_rag.retrieval import read_document
from kvfusion_rag.retrieval.files.kinds import KNOWN_TYPES
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


def pdf(source: Path | None = None, *, password: str | None = None, algorithm: str = "AES-256") -> bytes:
    """Return the pages of another PDF or one blank page, encrypted if a user password is given ("" for none)."""
    writer = PdfWriter(clone_from=source) if source else PdfWriter()
    if source is None:
        writer.add_blank_page(100, 100)
    if password is not None:
        writer.encrypt(password, "owner", algorithm=algorithm)
    buffer = io.BytesIO()
    writer.write(buffer)
    return buffer.getvalue()


@pytest.mark.parametrize("algorithm", ["RC4-40", "RC4-128", "AES-128", "AES-256-R5", "AES-256"])
def test_pdf_that_is_encrypted_for_permissions_only_is_read(tmp_path, algorithm):
    data = pdf(LIGHTHOUSE / "barley_cup.pdf", password="", algorithm=algorithm)
    assert "It was first held in 1926." in read_document(write(tmp_path, "a.pdf", data)).text


def pdf_objects(*objects: bytes) -> bytes:
    """Return a PDF with these objects, numbered from 1; the first is the catalog."""
    data, offsets = b"%PDF-1.4\n", []
    for number, content in enumerate(objects, start=1):
        offsets.append(len(data))
        data += b"%d 0 obj\n%s\nendobj\n" % (number, content)
    table = b"".join(b"%010d 00000 n \n" % offset for offset in offsets)
    size = len(objects) + 1
    end = b"trailer\n<</Root 1 0 R/Size %d>>\nstartxref\n%d\n%%%%EOF" % (size, len(data))
    return data + b"xref\n0 %d\n0000000000 65535 f \n" % size + table + end


def pdf_stream(content: bytes, entries: bytes = b"") -> bytes:
    return b"<<%s/Length %d>>\nstream\n%s\nendstream" % (entries, len(content), content)


FONT = b"<</Type/Font/Subtype/Type1/BaseFont/Helvetica>>"
LINE = b"BT /F1 12 Tf 72 700 Td (Hello ) Tj ET "


def pdf_of_shared_pages(pages: int, lines: int) -> bytes:
    """Return pages that all show the same content."""
    kids = b" ".join(b"%d 0 R" % (5 + n) for n in range(pages))
    page = b"<</Type/Page/Parent 2 0 R/MediaBox[0 0 9 9]/Contents 4 0 R/Resources<</Font<</F1 3 0 R>>>>>>"
    tree = b"<</Type/Pages/Count %d/Kids[%s]>>" % (pages, kids)
    return pdf_objects(b"<</Type/Catalog/Pages 2 0 R>>", tree, FONT, pdf_stream(LINE * lines), *[page] * pages)


def pdf_of_nested_forms(depth: int) -> bytes:
    """Return a page with a form that shows the next form twice, and so on."""
    fonts = b"/Resources<</Font<</F1 3 0 R>>/XObject<</X %d 0 R>>>>"
    page = b"<</Type/Page/Parent 2 0 R/MediaBox[0 0 9 9]/Contents 5 0 R" + fonts % 6 + b">>"
    head = b"/Type/XObject/Subtype/Form/BBox[0 0 1 1]"
    forms = [pdf_stream(b"/X Do /X Do", head + fonts % (7 + n)) for n in range(depth)]
    last = pdf_stream(LINE, head + b"/Resources<</Font<</F1 3 0 R>>>>")
    tree = b"<</Type/Pages/Count 1/Kids[4 0 R]>>"
    return pdf_objects(b"<</Type/Catalog/Pages 2 0 R>>", tree, FONT, page, pdf_stream(b"/X Do"), *forms, last)


@pytest.mark.parametrize("data", [pdf_of_shared_pages(60, 200), pdf_of_nested_forms(30)])
def test_pdf_that_needs_more_work_than_its_size_allows_is_read_in_part(tmp_path, monkeypatch, data):
    monkeypatch.setattr("kvfusion_rag.retrieval.files.pdf.OPERATIONS", 100)
    read = 0
    extract = PageObject.extract_text

    def counted(page: PageObject, *args: Any, visitor_operand_before: Any, **kwargs: Any) -> str:
        def visit(*values: Any) -> None:
            nonlocal read
            read += 1
            visitor_operand_before(*values)

        return extract(page, *args, visitor_operand_before=visit, **kwargs)

    monkeypatch.setattr(PageObject, "extract_text", counted)
    try:
        loaded = read_document(write(tmp_path, "a.pdf", data))
    except UnreadableFileError as error:
        assert "need too much work" in str(error)
    else:
        assert loaded.text.startswith("Hello")
        assert "need too much work" in loaded.left_out[0]
    assert read < 100 + 2 * len(data)


def test_pdf_with_ordinary_pages_is_read_whole(tmp_path):
    loaded = read_document(write(tmp_path, "a.pdf", pdf_of_shared_pages(1, 3000)))
    assert (loaded.text.count("Hello"), loaded.left_out) == (3000, ())


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
        ("a.pdf", pdf(password="secret"), "cannot be read as PDF: protected by a password"),
        ("a.md", b"\n" + b"iVBORw0KGgo" * 100, "contains no text except unbroken data (1,100 characters)"),
        ("a.exe", b"MZ", "unknown file type '.exe'"),
    ],
)
def test_unreadable_file_has_a_reason(tmp_path, name, data, reason):
    with pytest.raises(UnreadableFileError, match=re.escape(reason)):
        read_document(write(tmp_path, name, data))


@pytest.mark.parametrize(
    ("data", "text"),
    [
        ("Café in Besançon, 1874".encode("latin-1"), "Café in Besançon, 1874"),
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
    (folder / "questions.jsonl").write_text("{}")  # example questions of the page
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
        "data.bin": f"unknown file type '.bin'; known types: {KNOWN_TYPES}",
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


def link_to_itself(folder: Path) -> str:
    (folder / "bad.txt").symlink_to(folder / "bad.txt")
    return "cannot be opened: Too many levels of symbolic links"


def links_to_each_other(folder: Path) -> str:
    (folder / "bad.txt").symlink_to(folder / "other.txt")
    (folder / "other.txt").symlink_to(folder / "bad.txt")
    return "cannot be opened: Too many levels of symbolic links"


def link_through_a_file(folder: Path) -> str:
    (folder / "bad.txt").symlink_to(folder / "good.txt" / "x.txt")
    return "cannot be opened: Not a directory"


def link_to_a_long_name(folder: Path) -> str:
    (folder / "bad.txt").symlink_to("x" * 300 + ".txt")
    return "cannot be opened: File name too long"


def named_pipe(folder: Path) -> str:
    os.mkfifo(folder / "bad.txt")
    return "not a regular file"


def open_socket(folder: Path) -> str:
    here = os.open(folder, os.O_RDONLY)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(f"/proc/self/fd/{here}/bad.txt")
    os.close(here)
    return "not a regular file"


@pytest.mark.parametrize(
    "make", [link_to_itself, links_to_each_other, link_through_a_file, link_to_a_long_name, named_pipe, open_socket]
)
def test_one_bad_entry_is_named_and_does_not_spoil_a_folder(tmp_path, make):
    folder = tmp_path / "docs"
    folder.mkdir()
    (folder / "good.txt").write_text("The lamp was lit in 1870.")
    reason = make(folder)
    found, skipped = find_files([folder])
    assert [path.name for path in found] == ["good.txt"]
    assert reasons(skipped)["bad.txt"] == reason


@pytest.mark.parametrize("depth", [1200, 2500])
def test_deep_folders_are_read_as_far_as_the_system_allows(tmp_path, depth):
    root = tmp_path / "docs"
    root.mkdir()
    (root / "good.txt").write_text("x")
    here = os.getcwd()
    try:
        os.chdir(root)
        for _ in range(depth):
            os.mkdir("d")
            os.chdir("d")
        Path("deep.txt").write_text("x")
        os.chdir(here)
        found, skipped = find_files([root])
    finally:
        os.chdir(here)
        subprocess.run(["rm", "-rf", str(root)], check=True)  # Python and pytest cannot remove it
    names = {path.name for path in found}
    assert names == {"good.txt", "deep.txt"} if depth == 1200 else names == {"good.txt"}
    assert [one.reason for one in skipped] == ["folder cannot be read: File name too long"] * (depth == 2500)


def test_file_that_turns_into_a_pipe_is_not_read(tmp_path):
    os.mkfifo(tmp_path / "a.txt")
    with pytest.raises(UnreadableFileError, match="not a regular file"):
        read_bytes(tmp_path / "a.txt")


@pytest.mark.parametrize("line", ["# A{}B", "#{}", "# {}#", "{}# A", "#" * 6 + "{}x", "```{}"])
def test_time_of_titles_grows_in_step_with_the_text(line):
    def run(size: int) -> None:
        read_document(Path("a.md"), line.format(" " * size).encode() + b"\nx")

    assert growth_of_time(run, 2_000) < 10


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
