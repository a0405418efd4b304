"""Finds files in folders and reads their text with the readers in ``files``.

Files are untrusted: their size is limited, special files are not opened, and links to folders are not followed. A file
that cannot be read is skipped with a reason; exceptions of parsers never escape.
"""

from __future__ import annotations

import os
import re
import stat
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ..errors import MissingDependencyError, RetrievalError
from ..home import absolute, expanded
from .files.archive import gunzip
from .files.junk import find_junk, without_spans
from .files.kinds import KINDS, KNOWN_TYPES, Kind, kind_of
from .files.reading import Mark, Reading, UnreadableFileError
from .places import shifted_marks

INDEX_FOLDER = ".kvfusion"
QUESTIONS_FILE = "questions.jsonl"  # example questions of a folder, which are not a document
MAX_FILE_BYTES = 32 * 2**20
MAX_TITLE_CHARACTERS = 200

_LONE_SURROGATE = re.compile("[\ud800-\udfff]")
_SPACES = re.compile(r"\s+")
_NAMES: dict[Kind, str] = {
    "text": "text",
    "markdown": "Markdown",
    "code": "source code",
    "html": "HTML",
    "pdf": "PDF",
    "word": "a Word document",
    "slides": "a presentation",
    "workbook": "a workbook",
    "table": "a table",
    "book": "an EPUB book",
    "mail": "a mail",
    "notebook": "a notebook",
}


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
        marks: where pages, rows, chapters or lines begin, for the names of places.
    """

    text: str
    title: str
    kind: Kind
    left_out: tuple[str, ...] = ()
    marks: tuple[Mark, ...] = field(default=(), repr=False)


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
        return _unknown_type(path)
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


def read_document(path: Path, data: bytes | None = None, *, max_bytes: int = MAX_FILE_BYTES) -> LoadedText:
    """Return text and title of one file. Its suffix selects the reader.

    Args:
        path: a file with a suffix in ``KINDS``. A file that ends with ``.gz`` is unpacked, and the suffix in front
            selects the reader.
        data: the file's content, if it has been read already.
        max_bytes: size of a file in bytes, also after it is unpacked.

    Raises:
        UnreadableFileError: the file contains no usable text.
        MissingDependencyError: the parser for this type is not installed.
    """
    kind, data = _unpacked(path, read_bytes(path, max_bytes) if data is None else data, max_bytes)
    reading = _guarded(kind, data)
    text = _LONE_SURROGATE.sub("\ufffd", reading.text)
    spans, junk = find_junk(text)
    marks = shifted_marks(text, reading.marks, spans)
    text = without_spans(text, spans)
    left_out = tuple(_LONE_SURROGATE.sub("\ufffd", what) for what in (*reading.left_out, *junk))
    if not text.strip():
        only = f" except {', '.join(left_out)}" if left_out else " (a scan?)" if kind == "pdf" else ""
        raise UnreadableFileError(f"contains no text{only}")
    title = _SPACES.sub(" ", _LONE_SURROGATE.sub("\ufffd", reading.title)).strip()
    return LoadedText(text, title[:MAX_TITLE_CHARACTERS].rstrip() or _stem(path), kind, left_out, marks)


def _unpacked(path: Path, data: bytes, max_bytes: int) -> tuple[Kind, bytes]:
    """Return kind and content of a file, unpacked if it is compressed."""
    kind = kind_of(path)
    if kind != "gzip":
        if kind is None:
            raise UnreadableFileError(_unknown_type(path))
        return kind, data
    inner = kind_of(Path(path.stem))
    if inner is None or inner == "gzip":
        raise UnreadableFileError(f"compressed file of {_unknown_type(Path(path.stem))}")
    try:
        return inner, gunzip(data, max_bytes)
    except (OSError, zlib.error) as error:
        raise UnreadableFileError(f"cannot be unpacked: {error}") from error


def _unknown_type(path: Path) -> str:
    return f"unknown file type {path.suffix!r}; known types: {KNOWN_TYPES}"


def _stem(path: Path) -> str:
    """Return the name of a file without its suffixes."""
    return Path(path.stem).stem if kind_of(path) == "gzip" else path.stem


def _read_kind(kind: Kind, data: bytes) -> Reading:
    """Call the reader of ``kind``. Each is imported when it is needed, because some need other libraries."""
    if kind in ("text", "code"):
        from .files.text import read_text as read
    elif kind == "markdown":
        from .files.text import read_markdown as read
    elif kind == "html":
        from .files.page import read_page as read
    elif kind == "pdf":
        from .files.pdf import read_pdf as read
    elif kind == "word":
        from .files.office import read_word as read
    elif kind == "slides":
        from .files.office import read_slides as read
    elif kind == "workbook":
        from .files.workbook import read_workbook as read
    elif kind == "table":
        from .files.table import read_table as read
    elif kind == "book":
        from .files.book import read_book as read
    elif kind == "mail":
        from .files.mail import read_mail as read
    else:
        from .files.notebook import read_notebook as read
    return read(data)


def _guarded(kind: Kind, data: bytes) -> Reading:
    """Call the reader of ``kind``, and turn every exception of its parser into a reason."""
    what = _NAMES[kind]
    try:
        return _read_kind(kind, data)
    except UnreadableFileError:
        raise
    except ImportError as error:
        raise MissingDependencyError.of_extra(f"reading {what}", str(error.name), "rag") from error
    except RecursionError as error:
        raise UnreadableFileError(f"cannot be read as {what}: nested too deeply") from error
    except Exception as error:  # parsers raise any exception for untrusted files, from KeyError to MemoryError
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
