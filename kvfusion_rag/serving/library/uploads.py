"""Uploaded files: kept in a folder of the server, and indexed in memory, for each tenant separately.

Names and contents are untrusted. A name must be a single part of a path with a known suffix. A file that its loader
cannot read is rejected before it is written.
"""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from ...errors import InvalidInputError, RetrievalError
from ...retrieval import DocumentIndex, read_document
from ...retrieval.loaders import KINDS, UnreadableFileError
from ...schema import Document
from ...store import namespace_key

MAX_UPLOADS = 50  # files of one tenant
MAX_NAME_BYTES = 200  # file systems allow 255
PREFIX = "upload:"  # in ids, so that an uploaded file cannot be mistaken for one of the server's

_FORBIDDEN = re.compile(r"[/\\:\x00-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff\ufffd]")
_PARTIAL = ".partial"


class Uploads:
    """The uploaded files of one tenant. Its methods may be called from any thread.

    Args:
        folder: the tenant's folder, created if it is missing. Files in it are indexed at once.
        index: an empty index whose base is ``folder``.
        max_files: maximum number of files.
    """

    def __init__(self, folder: Path, index: DocumentIndex, max_files: int) -> None:
        self._folder, self._index, self._max_files = folder, index, max_files
        self._lock = threading.Lock()
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with suppress(RetrievalError):  # there are no files, or none that can be read
            index.update(folder)

    def files(self) -> tuple[str, ...]:
        """Return the sorted names of the files."""
        with self._lock:
            return self._index.files()

    def search(self, question: str, top_k: int) -> list[Document]:
        """Return the chunks nearest to ``question``, nearest first, or nothing if there are no files."""
        with self._lock:
            return [_uploaded(found) for found in self._index.search(question, top_k)] if len(self._index) else []

    def add(self, name: str, content: bytes) -> None:
        """Keep and index a file. A file with the same name is replaced.

        Raises:
            InvalidInputError: the name is not allowed, the file cannot be read, or there are too many files.
        """
        path = self._folder / require_file_name(name)
        try:
            read_document(path, content)
        except UnreadableFileError as error:
            raise InvalidInputError(f"the file {name!r} cannot be read: {error}.") from error
        with self._lock:
            files = self._index.files()
            if name not in files and len(files) >= self._max_files:
                raise InvalidInputError(
                    f"there are already {len(files)} uploaded files, which is the limit; remove one first."
                )
            partial = self._folder / _PARTIAL
            partial.write_bytes(content)
            os.replace(partial, path)
            try:
                self._index.update(path)
            except BaseException:
                path.unlink()  # a file that is not in the index could not be listed and removed
                raise

    def remove(self, name: str) -> list[Document]:
        """Remove a file and return its chunks.

        Raises:
            InvalidInputError: there is no such file.
        """
        with self._lock:
            if name not in self._index.files():
                raise InvalidInputError(f"there is no uploaded file {name[:MAX_NAME_BYTES]!r}.")
            documents = self._index.documents(files=[name])
            (self._folder / name).unlink(missing_ok=True)
            self._index.remove([name])
        return documents

    def close(self) -> None:
        """Discard the index. The files remain."""
        with self._lock:
            self._index.close()


class UploadSpace:
    """The uploaded files of all tenants in one folder.

    Args:
        folder: folder of the server, in which each tenant gets a folder of its own.
        open_index: returns an empty index in memory whose file names are relative to the given folder.
        max_files: maximum number of files of one tenant.
    """

    def __init__(
        self, folder: Path, open_index: Callable[[Path], DocumentIndex], max_files: int = MAX_UPLOADS
    ) -> None:
        self._folder, self._open_index, self.max_files = folder, open_index, max_files
        self._tenants: dict[str, Uploads] = {}
        self._lock = threading.Lock()

    def of(self, namespace: str) -> Uploads:
        """Return the files of one tenant."""
        with self._lock:
            if namespace not in self._tenants:
                folder = self._folder.resolve() / namespace_key(namespace)
                self._tenants[namespace] = Uploads(folder, self._open_index(folder), self.max_files)
            return self._tenants[namespace]

    def close(self) -> None:
        """Discard all indexes. The files remain."""
        for uploads in self._tenants.values():
            uploads.close()


def require_file_name(name: str) -> str:
    """Return ``name`` if it is a single part of a path, and its suffix that of a file with a loader.

    Raises:
        InvalidInputError: it is not.
    """
    if _FORBIDDEN.search(name) or name.startswith(".") or not 0 < len(name.encode()) <= MAX_NAME_BYTES:
        raise InvalidInputError(
            f"the file name is {name[:MAX_NAME_BYTES]!r}, but it must have at most {MAX_NAME_BYTES} bytes, must not "
            "begin with a dot, and must not contain slashes, colons and control characters."
        )
    if Path(name).suffix.lower() not in KINDS:
        raise InvalidInputError(f"the file {name!r} has an unknown type; known types: {', '.join(KINDS)}.")
    return name


def _uploaded(document: Document) -> Document:
    return replace(document, id=f"{PREFIX}{document.id}")
