"""Finds files in folders and reads their text: plain text, Markdown, HTML and PDF.

Files are untrusted: their size is limited, special files are not opened, and links to folders are not followed. A file
that cannot be read is skipped with a reason; exceptions of parsers never escape.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from ..errors import MissingDependencyError, RetrievalError
from ..home import absolute, expanded
from .junk import without_junk

if TYPE_CHECKING:
    from .charsets import DecodedText

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
QUESTIONS_FILE = "questions.jsonl"  # example questions of a folder, which are not a document
MAX_FILE_BYTES = 32 * 2**20
MAX_TITLE_CHARACTERS = 200
# A file is binary if more than this share of its characters are control characters or invalid UTF-8.
BINARY_SHARE = 0.2

_NOT_TEXT = re.compile("[\x00-\x08\x0b\x0e-\x1f\x7f\ufffd]")
_LONE_SURROGATE = re.compile("[\ud800-\udfff]")
_SPACES = re.compile(r"\s+")
_ATX_HEADING = re.compile(r" {0,3}#{1,6}(?=\s|$)")
_FENCE = re.compile(r" {0,3}(```|~~~)")

Reading = tuple[str, str, tuple[str, ...]]  # text, title, and what is missing


@dataclass(frozen=True, slots=True)
class SkippedFile:
    """A file or folder that was skipped, or a part of a file that was left out, and the reason."""

    path: str
    reason: str


@dataclass(frozen=True, slots=True)
class LoadedText:
    """The text of one file.

    Attributes:
        text: the text without embedded data, such as images in base64.
        title: its own title or first heading, or else the file's name.
        left_out: what the text lacks, in words: embedded data, bytes that cannot be decoded, pages of a PDF.
    """

    text: str
    title: str
    kind: Kind
    left_out: tuple[str, ...] = ()


class UnreadableFileError(RetrievalError):
    """A file has no usable text. The message is only the reason."""


def find_files(paths: Iterable[str | Path], *, exclude: Path | None = None) -> tuple[list[Path], list[SkippedFile]]:
    """Return the files under ``paths``, resolved, sorted and without duplicates, and the skipped files.

    Hidden files and folders, unknown types, special files and links to folders are skipped, but a path in ``paths``
    itself may be hidden or a link. ``exclude`` (the index's own folder) and files with example questions are not
    reported as skipped.

    Raises:
        RetrievalError: a path does not exist.
    """
    found: dict[Path, None] = {}
    skipped: list[SkippedFile] = []
    for named in paths:
        path = expanded(named)
        if not os.path.exists(path):  # unlike Path.exists, it does not raise if a parent folder is not readable
            raise RetrievalError(f"{printable_path(path)!r} does not exist, so it cannot be indexed.")
        if path.is_dir():
            _walk(path.resolve(), exclude, found, skipped)
        else:
            _take(path, found, skipped)
    return sorted(found), sorted(skipped, key=lambda one: one.path)


def _walk(root: Path, exclude: Path | None, found: dict[Path, None], skipped: list[SkippedFile]) -> None:
    """Collect the files of ``root`` and its subfolders, at any depth."""
    folders = [root]
    while folders:
        folder = folders.pop()
        try:
            entries = list(os.scandir(folder))
        except OSError as error:
            skipped.append(SkippedFile(printable_path(folder), f"folder cannot be read: {error.strerror}"))
            continue
        for entry in entries:
            path = folder / entry.name
            if entry.name in (INDEX_FOLDER, QUESTIONS_FILE) or path == exclude:
                continue
            if entry.name.startswith("."):
                skipped.append(SkippedFile(printable_path(path), "hidden"))
            elif entry.is_dir(follow_symlinks=False):
                folders.append(path)
            elif os.path.isdir(path):  # unlike DirEntry.is_dir, it is False for a link to itself
                reason = "link to a folder; name the folder itself to index it"
                skipped.append(SkippedFile(printable_path(path), reason))
            else:
                _take(path, found, skipped)


def _take(path: Path, found: dict[Path, None], skipped: list[SkippedFile]) -> None:
    """Add ``path`` to the files, or to the skipped files with the reason."""
    reason = _reason_to_skip(path)
    if reason is None:
        found[path.resolve()] = None
    else:
        skipped.append(SkippedFile(printable_path(path), reason))


def _reason_to_skip(path: Path) -> str | None:
    if path.suffix.lower() not in KINDS:
        return f"unknown file type {path.suffix!r}; known types: {', '.join(KINDS)}"
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        return "broken link"
    except OSError as error:
        return f"cannot be opened: {error.strerror}"
    if not stat.S_ISREG(mode):
        return "not a regular file"
    if path.resolve().suffix.lower() not in KINDS:
        return "link to a file of unknown type"
    return None if _is_unicode(str(path.resolve())) else "its name is not valid Unicode"


def read_bytes(path: Path, max_bytes: int = MAX_FILE_BYTES) -> bytes:
    """Return the content of a regular file.

    Raises:
        UnreadableFileError: the file cannot be read, is empty, or is larger than ``max_bytes``.
    """
    try:
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:  # a pipe would block otherwise
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise UnreadableFileError("not a regular file")
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
    text, title, notes = _guarded(kind, read_bytes(path) if data is None else data)
    text, junk = without_junk(_LONE_SURROGATE.sub("\ufffd", text))
    left_out = (*notes, *junk)
    if not text.strip():
        only = f" except {', '.join(left_out)}" if left_out else " (a scan?)" if kind == "pdf" else ""
        raise UnreadableFileError(f"contains no text{only}")
    title = _SPACES.sub(" ", _LONE_SURROGATE.sub("\ufffd", title)).strip()
    return LoadedText(text, title[:MAX_TITLE_CHARACTERS].rstrip() or path.stem, kind, left_out)


def _read_text(data: bytes) -> Reading:
    decoded = _decode(data)
    return decoded.text, "", decoded.note()


def _read_markdown(data: bytes) -> Reading:
    decoded = _decode(data)
    return decoded.text, _first_heading(decoded.text), decoded.note()


def _decode(data: bytes) -> DecodedText:
    """Decode a text in any encoding; line ends are unchanged."""
    from .charsets import decode_text, has_mark

    if b"\x00" in data and not has_mark(data):
        raise UnreadableFileError("binary, not text")
    decoded = decode_text(data)
    if not decoded.known or len(_NOT_TEXT.findall(decoded.text)) > BINARY_SHARE * len(decoded.text):
        raise UnreadableFileError("neither UTF-8 nor another known encoding")
    return decoded


def _first_heading(text: str) -> str:
    fence = ""
    for line in text.splitlines():
        mark = _FENCE.match(line)
        if mark and fence in ("", mark[1]):
            fence = "" if fence else mark[1]
        heading = None if fence else _ATX_HEADING.match(line)
        title = line[heading.end() :].strip().rstrip("#").rstrip() if heading else ""
        if title:
            return title
    return ""


def _read_html(data: bytes) -> Reading:
    from .charsets import has_mark
    from .page import read_page

    if b"\x00" in data and not has_mark(data):
        raise UnreadableFileError("binary, not HTML")
    return read_page(data)


def _read_pdf(data: bytes) -> Reading:
    from .pdf import read_pdf

    return read_pdf(data)


_READERS: dict[Kind, tuple[Callable[[bytes], Reading], str]] = {
    "text": (_read_text, "text"),
    "markdown": (_read_markdown, "Markdown"),
    "html": (_read_html, "HTML"),
    "pdf": (_read_pdf, "PDF"),
}


def _guarded(kind: Kind, data: bytes) -> Reading:
    """Call the reader of ``kind``, and turn every exception of its parser into a reason."""
    reader, what = _READERS[kind]
    try:
        return reader(data)
    except UnreadableFileError:
        raise
    except ImportError as error:
        raise MissingDependencyError.of_extra(f"reading {what}", str(error.name), "rag") from error
    except Exception as error:  # parsers raise any exception for untrusted files, from KeyError to RecursionError
        cause = _SPACES.sub(" ", str(error))[:200] or type(error).__name__
        raise UnreadableFileError(f"cannot be read as {what}: {cause}") from error


def printable_path(path: Path) -> str:
    """Return ``path`` with U+FFFD for bytes that are not Unicode, so that it can be printed and stored."""
    return os.fsencode(path).decode("utf-8", errors="replace")


def common_folder(paths: Sequence[str | Path]) -> Path:
    """Return the deepest folder that contains all of ``paths``."""
    folders = [path if path.is_dir() else path.parent for path in map(absolute, paths)]
    return Path(os.path.commonpath(folders))


def _is_unicode(text: str) -> bool:
    return not _LONE_SURROGATE.search(text)
