"""Finds files in folders and reads their text: plain text, Markdown, HTML and PDF.

Files are untrusted: their size is limited, special files are not opened, and links to folders are not followed. A file
that cannot be read is skipped with a reason; exceptions of parsers never escape.
"""

from __future__ import annotations

import io
import os
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ..errors import MissingDependencyError, RetrievalError

Kind = Literal["text", "markdown", "html", "pdf"]

KINDS: dict[str, Kind] = {
    ".txt": "text",
    ".text": "text",
    ".md": "markdown",
    ".markdown": "markdown",
    ".html": "html",
    ".htm": "html",
    ".xhtml": "html",
    ".pdf": "pdf",
}
INDEX_FOLDER = ".kvfusion"
MAX_FILE_BYTES = 32 * 2**20
MAX_TITLE_CHARACTERS = 200
# A file is binary if more than this share of its characters are control characters or invalid UTF-8.
BINARY_SHARE = 0.2

_NOT_TEXT = re.compile("[\x00-\x08\x0b\x0e-\x1f\x7f\ufffd]")
_LONE_SURROGATE = re.compile("[\ud800-\udfff]")
_SPACES = re.compile(r"\s+")
_ATX_HEADING = re.compile(r" {0,3}#{1,6}\s+(.*?)\s*#*\s*$")
_FENCE = re.compile(r" {0,3}(```|~~~)")
_UTF16_MARKS = (b"\xff\xfe", b"\xfe\xff")
_BLOCKS = (
    *("address", "article", "aside", "blockquote", "body", "caption", "dd", "details", "div", "dl", "dt"),
    *("fieldset", "figcaption", "figure", "footer", "form", "h1", "h2", "h3", "h4", "h5", "h6", "header", "hr"),
    *("li", "main", "ol", "p", "pre", "section", "summary", "table", "tr", "ul"),
)


@dataclass(frozen=True, slots=True)
class SkippedFile:
    """A file or folder that was skipped, and the reason."""

    path: str
    reason: str


@dataclass(frozen=True, slots=True)
class LoadedText:
    """The text of one file. ``title`` is its own title or first heading, or else the file's name."""

    text: str
    title: str
    kind: Kind


class UnreadableFileError(RetrievalError):
    """A file has no usable text. The message is only the reason."""


def find_files(paths: Iterable[str | Path], *, exclude: Path | None = None) -> tuple[list[Path], list[SkippedFile]]:
    """Return the files under ``paths``, resolved, sorted and without duplicates, and the skipped files.

    Hidden files and folders, unknown types, special files and links to folders are skipped, but a path in ``paths``
    itself may be hidden or a link. ``exclude`` (the index's own folder) is not reported as skipped.

    Raises:
        RetrievalError: a path does not exist.
    """
    found: dict[Path, None] = {}
    skipped: list[SkippedFile] = []
    for named in paths:
        path = Path(named).expanduser()
        if not os.path.exists(path):  # unlike Path.exists, it does not raise if a parent folder is not readable
            raise RetrievalError(f"{printable_path(path)!r} does not exist, so it cannot be indexed.")
        if path.is_dir():
            _walk(path.resolve(), exclude, found, skipped)
        else:
            _take(path, found, skipped)
    return sorted(found), sorted(skipped, key=lambda one: one.path)


def _walk(folder: Path, exclude: Path | None, found: dict[Path, None], skipped: list[SkippedFile]) -> None:
    """Collect the files of ``folder`` and its subfolders, ordered by name."""
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError as error:
        skipped.append(SkippedFile(printable_path(folder), f"folder cannot be read: {error.strerror}"))
        return
    for entry in entries:
        path = folder / entry.name
        if entry.name == INDEX_FOLDER or path == exclude:
            continue
        if entry.name.startswith("."):
            skipped.append(SkippedFile(printable_path(path), "hidden"))
        elif entry.is_symlink() and entry.is_dir():
            skipped.append(SkippedFile(printable_path(path), "link to a folder; name the folder itself to index it"))
        elif entry.is_dir():
            _walk(path, exclude, found, skipped)
        else:
            _take(path, found, skipped)


def _take(path: Path, found: dict[Path, None], skipped: list[SkippedFile]) -> None:
    """Add ``path`` to the files, or to the skipped files with the reason."""
    reason = None
    if path.suffix.lower() not in KINDS:
        reason = f"unknown file type {path.suffix!r}; known types: {', '.join(KINDS)}"
    elif not os.path.exists(path):
        reason = "broken link"
    elif not os.path.isfile(path):
        reason = "not a regular file"
    elif path.resolve().suffix.lower() not in KINDS:
        reason = "link to a file of unknown type"
    elif not _is_unicode(str(path.resolve())):
        reason = "its name is not valid Unicode"
    if reason is None:
        found[path.resolve()] = None
    else:
        skipped.append(SkippedFile(printable_path(path), reason))


def read_bytes(path: Path, max_bytes: int = MAX_FILE_BYTES) -> bytes:
    """Return the content of a regular file.

    Raises:
        UnreadableFileError: the file cannot be read, is empty, or is larger than ``max_bytes``.
    """
    if not os.path.isfile(path):
        raise UnreadableFileError("not a regular file")
    try:
        with path.open("rb") as file:
            data = file.read(max_bytes + 1)
    except OSError as error:
        raise UnreadableFileError(f"cannot be read: {error.strerror}") from error
    if len(data) > max_bytes:
        raise UnreadableFileError(f"larger than the limit of {max_bytes / 2**20:g} MiB")
    if not data:
        raise UnreadableFileError("empty")
    return data


def read_document(path: Path, data: bytes | None = None) -> LoadedText:
    """Return text and title of one file. Its suffix selects the reader.

    Args:
        path: a file with a suffix in ``KINDS``.
        data: the file's content, if it has been read already.

    Raises:
        UnreadableFileError: the file contains no usable text.
        MissingDependencyError: the parser for this type is not installed.
    """
    kind = KINDS.get(path.suffix.lower())
    if kind is None:
        raise UnreadableFileError(f"unknown file type {path.suffix!r}; known types: {', '.join(KINDS)}")
    text, title = _READERS[kind](read_bytes(path) if data is None else data)
    text = _LONE_SURROGATE.sub("\ufffd", text)
    if not text.strip():
        raise UnreadableFileError("contains no text (a scan?)" if kind == "pdf" else "contains no text")
    title = _SPACES.sub(" ", _LONE_SURROGATE.sub("\ufffd", title)).strip()
    return LoadedText(text, title[:MAX_TITLE_CHARACTERS] or path.stem, kind)


def _read_text(data: bytes) -> tuple[str, str]:
    return _decode(data), ""


def _read_markdown(data: bytes) -> tuple[str, str]:
    text = _decode(data)
    return text, _first_heading(text)


def _decode(data: bytes) -> str:
    """Decode UTF-8, or UTF-16 with a byte order mark. Invalid bytes become U+FFFD, and line ends are unchanged."""
    if data.startswith(_UTF16_MARKS):
        text = data.decode("utf-16", errors="replace")
    else:
        if b"\x00" in data:
            raise UnreadableFileError("binary, not text")
        text = data.decode("utf-8-sig", errors="replace")
    if len(_NOT_TEXT.findall(text)) > BINARY_SHARE * len(text):
        raise UnreadableFileError("neither UTF-8 nor UTF-16 with a byte order mark")
    return text


def _first_heading(text: str) -> str:
    fence = ""
    for line in text.splitlines():
        mark = _FENCE.match(line)
        if mark and fence in ("", mark[1]):
            fence = "" if fence else mark[1]
        heading = None if fence else _ATX_HEADING.match(line)
        if heading and heading[1]:
            return heading[1]
    return ""


def _read_html(data: bytes) -> tuple[str, str]:
    """Return the visible text with a blank line between blocks, and ``<title>`` or the first heading."""
    try:
        from bs4 import BeautifulSoup
        from bs4.element import NavigableString
    except ImportError as error:
        raise _missing("HTML", "beautifulsoup4") from error
    if b"\x00" in data and not data.startswith(_UTF16_MARKS):
        raise UnreadableFileError("binary, not HTML")

    def extract() -> tuple[str, str]:
        soup = BeautifulSoup(data, "html.parser")
        heading = soup.title or soup.find("h1")
        title = heading.get_text() if heading else ""
        for hidden in soup(["head", "nav", "script", "style", "noscript", "template"]):
            hidden.decompose()
        for string in soup.find_all(string=True):
            if type(string) is NavigableString and not string.find_parent("pre"):
                string.replace_with(_SPACES.sub(" ", string))
        for block in soup.find_all(_BLOCKS):
            block.insert_before("\n\n")
            block.insert_after("\n\n")
        for cell in soup.find_all(["td", "th"]):
            cell.insert_after(" ")
        for line_break in soup.find_all("br"):
            line_break.replace_with("\n")
        return _tidy_lines(soup.get_text()), title

    return _guarded(extract, "HTML")


def _tidy_lines(text: str) -> str:
    """Strip the ends of lines, and reduce several blank lines to one."""
    text = "\n".join(line.rstrip() for line in text.splitlines())
    text = re.sub(r"\n{3,}", "\n\n", text)
    return re.sub(r"(?m)^ (?=\S)", "", text).strip()


def _read_pdf(data: bytes) -> tuple[str, str]:
    """Return the text of all pages with a blank line between them, and the title in the PDF's metadata."""
    try:
        from pypdf import PdfReader
    except ImportError as error:
        raise _missing("PDF", "pypdf") from error

    def extract() -> tuple[str, str]:
        reader = PdfReader(io.BytesIO(data))
        text = "\n\n".join(page.extract_text().strip() for page in reader.pages)
        return text, (reader.metadata.title if reader.metadata else None) or ""

    return _guarded(extract, "PDF")


def _guarded(extract: Callable[[], tuple[str, str]], what: str) -> tuple[str, str]:
    try:
        return extract()
    except Exception as error:  # parsers raise any exception for untrusted files, from KeyError to RecursionError
        cause = _SPACES.sub(" ", str(error))[:200] or type(error).__name__
        raise UnreadableFileError(f"cannot be read as {what}: {cause}") from error


def _missing(what: str, package: str) -> MissingDependencyError:
    return MissingDependencyError(
        f'reading {what} needs {package}, which is not installed: pip install "kvfusion-rag[rag]".'
    )


_READERS: dict[Kind, Callable[[bytes], tuple[str, str]]] = {
    "text": _read_text,
    "markdown": _read_markdown,
    "html": _read_html,
    "pdf": _read_pdf,
}


def printable_path(path: Path) -> str:
    """Return ``path`` with U+FFFD for bytes that are not Unicode, so that it can be printed and stored."""
    return os.fsencode(path).decode("utf-8", errors="replace")


def common_folder(paths: Sequence[str | Path]) -> Path:
    """Return the deepest folder that contains all of ``paths``."""
    folders = [path if path.is_dir() else path.parent for path in (Path(p).expanduser().resolve() for p in paths)]
    return Path(os.path.commonpath(folders))


def _is_unicode(text: str) -> bool:
    return not _LONE_SURROGATE.search(text)
