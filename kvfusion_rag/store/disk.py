"""The disk tier: one file per document, in hashed subfolders, under byte caps that all processes share.

A document is written under a temporary name and then renamed, so its file is either complete or absent. A read
succeeds only if the file's header, checksum and token ids match the request and its numbers are finite. Every other
result is a miss with its reason, and a damaged file is removed. Files are never changed in place, so a reader can
finish what it has opened.

    FOLDER/format.json             format version of this folder
    FOLDER/index.sqlite            sizes and last use, for eviction (index/)
    FOLDER/v4-raw/<namespace>/<2 hex>/<document>-<digest>.safetensors
    FOLDER/manifests/              the documents of each collection (records.py)
    FOLDER/tmp/                    files that are being written
"""

from __future__ import annotations

import logging
import os
import sqlite3
import time
from collections.abc import Generator, Iterable, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path, PurePath

from ..errors import InvalidInputError, StoreError
from ..model.kv import DocumentKV, KVShape
from ..option_names import check_option_names
from ..text.json_text import is_a
from .folder import Entry, Folder, ForeignFileError
from .format import (
    CODECS,
    FORMAT_VERSION,
    NO_ENVIRONMENT,
    Accepts,
    Buffer,
    Codec,
    check,
    encode,
    file_name,
    is_finite,
    layout,
    namespace_of,
    read_file,
    require_codec,
)
from .index import Index, is_locked
from .keys import document_key, paths_of_documents, require_namespace_key
from .metrics import Miss
from .records import MAX_RECORD_BYTES
from .size_limits import Caps, add_up

logger = logging.getLogger(__name__)

DEFAULT_MAX_BYTES = 20 << 30
PAUSE_SECONDS = 60.0  # during which nothing is written after a failed write
REMOVED_AT_ONCE = 256  # files per transaction, so that other processes do not wait long for the index


@dataclass(frozen=True, slots=True)
class VerifyReport:
    """Result of :meth:`DiskStore.verify`.

    Attributes:
        whole: files that are intact.
        broken: damaged files, which were removed unless the store is read-only.
        uncounted: files that the index did not count.
        missing: files that the index counted but that do not exist.
    """

    whole: int
    broken: int
    uncounted: int
    missing: int


class DiskStore:
    """Document KVs in a folder.

    Args:
        path: the folder. It is created if missing, and must otherwise be empty or a store. The documents of a store
            with an older format are removed.
        max_bytes: cap on all documents together. While another process holds the index, each may exceed it by a
            sixteenth.
        namespace_bytes: cap on each namespace. With it, a full store evicts documents of the writer's own namespace
            first, and those of others only if none is left.
        codec: "raw", or "v8" for values in 8 bits, which changes answers slightly and saves a quarter to three
            eighths of the space.
        fsync: wait until a document is on the disk. Without it, a power failure can lose documents but not damage
            them.
        mode: permissions of files. Folders also get the right to enter for those who may read.
        read_only: never write, remove or count anything.

    Raises:
        StoreError: the path is a file or a foreign folder, cannot be written, or has a newer format.
        InvalidInputError: a cap, the codec or the mode is not allowed.
    """

    @check_option_names()
    def __init__(
        self,
        path: str | os.PathLike[str],
        max_bytes: int = DEFAULT_MAX_BYTES,
        *,
        namespace_bytes: int | None = None,
        codec: Codec = "raw",
        fsync: bool = False,
        mode: int = 0o600,
        read_only: bool = False,
    ) -> None:
        if not is_a(mode, int) or isinstance(mode, bool) or not 0o600 <= mode <= 0o777 or mode & 0o600 != 0o600:
            raise InvalidInputError(
                f"mode is {mode!r}, but it must be permissions such as 0o600 or 0o660 with which the owner can read "
                "and write."
            )
        require_codec(codec)
        self.path, self.caps = _expand(path), Caps(max_bytes, namespace_bytes)
        self.codec: Codec = codec
        self.read_only = read_only
        self._folder = Folder(self.path, mode, fsync)
        self._paused_until = 0.0
        self._warned: set[str] = set()
        self._index = self._open(mode)
        self.rejected = self.dropped = self.failed_writes = 0

    @property
    def evictions(self) -> int:
        """Number of documents that were removed to make room."""
        return 0 if self._index is None else self._index.evictions

    def __repr__(self) -> str:
        return f"DiskStore({str(self.path)!r}, codec={self.codec!r}, max_bytes={self.caps.max_bytes:,})"

    @property
    def takes_uploads(self) -> bool:
        """Whether the store can be written."""
        return not self.read_only

    def file_bytes(self, shape: KVShape, tokens: int) -> int:
        """Return the file size of a document with ``tokens`` tokens."""
        return layout(document_key("", "", ()), tokens, shape, self.codec).total

    def __contains__(self, key: str) -> bool:
        """Return whether ``key`` has a file. This does not count as a use."""
        return self._folder.has(self._name(key))

    def get(self, key: str, shape: KVShape, into: DocumentKV, accepts: Accepts | None = None) -> Miss | None:
        """Read the document ``into.token_ids`` straight into the CPU tensors of ``into``.

        Args:
            key: store key of the document.
            shape: shape of the model's KVs.
            into: where to write them.
            accepts: whether a file from the environment with some digest may be read (default: any).

        Returns:
            None after a hit, otherwise the reason for the miss. After a miss the contents of ``into`` are undefined.
        """
        plan = layout(key, into.num_tokens, shape, self.codec)
        name = self._name(key)
        try:
            descriptor = self._folder.open_file(name)
            try:
                miss = read_file(descriptor, plan, into, self.codec, accepts)
            finally:
                os.close(descriptor)
        except FileNotFoundError:
            return Miss.ABSENT
        except OSError as error:
            self._warn(f"stored documents cannot be read ({_cause(error)}); they are computed again")
            return Miss.UNREADABLE
        if miss is not None and miss is not Miss.ENVIRONMENT:
            self._remove_damaged(name, miss)
        elif self._index is not None:
            self._index.touch(name)
        return miss

    def put(self, key: str, document: DocumentKV, environment: str = NO_ENVIRONMENT) -> bool:
        """Write ``document`` and return whether it is stored now. Errors are counted and logged once.

        ``environment`` is the digest of the environment that computed it.
        """
        if self._index is None:
            return False
        if key in self:
            return True
        if self._is_paused():
            return False
        if not is_finite(document.keys, document.values):
            self._warn("a document's keys or values contain NaN or infinity; it is not stored")
            return False
        return self._write(self._name(key), encode(key, document, self.codec, environment))

    def read(self, key: str) -> bytes | None:
        """Return the file of ``key`` as it is, or None if it cannot be read."""
        try:
            with open(self._folder.open_file(self._name(key)), "rb") as stream:
                return stream.read()
        except OSError:
            return None

    def adopt(
        self, key: str, data: bytes, shape: KVShape, into: DocumentKV, accepts: Accepts | None = None
    ) -> Miss | None:
        """Store a file that another machine wrote for ``key``, and read it like :meth:`get`."""
        if self._is_paused():
            return Miss.UNREADABLE
        if len(data) != layout(key, into.num_tokens, shape, self.codec).total:
            return Miss.TRUNCATED
        return self.get(key, shape, into, accepts) if self._write(self._name(key), [data]) else Miss.UNREADABLE

    def forget(self, *keys: str) -> int:
        """Remove the documents of ``keys`` under every model, even while they are being written. Return their number.

        Raises:
            InvalidInputError: ``keys`` contains an invalid document key.
            StoreError: the store is read-only or cannot be changed.
        """
        return sum(self._remove(path) for path in paths_of_documents(keys))

    def clear(self, namespace: str | None = None) -> int:
        """Remove all documents, or those of one namespace (its key), even while being written. Return their number.

        Raises:
            InvalidInputError: ``namespace`` is not a namespace key.
            StoreError: the store is read-only or cannot be changed.
        """
        if namespace is None:
            return self._remove("")
        require_namespace_key(namespace)
        return self._remove(f"{namespace}/")

    def write_record(self, name: str, data: bytes) -> None:
        """Write a small file beside the documents, which no cap counts.

        Raises:
            StoreError: the store is read-only or cannot be changed.
        """
        self._require_index()
        with self._maintenance():
            self._folder.write_file(name, [data])

    def remove_records(self, names: Iterable[str]) -> None:
        """Remove records.

        Raises:
            StoreError: the store is read-only or cannot be changed.
        """
        self._require_index()
        with self._maintenance():
            for name in names:
                self._folder.remove(name)

    def records(self, beginning: str) -> list[tuple[str, bytes]]:
        """Return name and contents of the records whose names begin with a folder."""
        found: list[tuple[str, bytes]] = []
        for name in self._folder.records(beginning):
            with suppress(FileNotFoundError), open(self._folder.open_file(name), "rb") as stream:
                found.append((name, stream.read(MAX_RECORD_BYTES)))
        return found

    def totals(self) -> dict[str, tuple[int, int]]:
        """Return bytes and number of documents by namespace key."""
        if self._index is not None:
            with suppress(OSError, sqlite3.Error):
                return self._index.totals()
        return add_up((entry.namespace, entry.bytes) for entry in self._folder.scan())

    def verify(self) -> VerifyReport:
        """Check every file, remove the damaged ones and correct the index. Skip whatever is not a document's file."""
        whole = broken = 0
        for entry in self._folder.scan():
            try:
                with open(self._folder.open_file(entry.name), "rb") as stream:
                    miss = check(stream, entry.bytes, PurePath(entry.name))
            except (FileNotFoundError, ForeignFileError):  # removed, evicted or replaced meanwhile
                continue
            except OSError:
                miss = Miss.UNREADABLE
            if miss is None:
                whole += 1
            else:
                broken += 1
                self._remove_damaged(entry.name, miss)
        uncounted = missing = 0
        if self._index is not None:
            with self._maintenance():
                self._folder.sweep()
                uncounted, missing = self._index.recount()
        return VerifyReport(whole, broken, uncounted, missing)

    def close(self) -> None:
        """Write the recorded uses of documents to the index."""
        if self._index is not None:
            self._index.close()

    def _open(self, mode: int) -> Index | None:
        try:
            self._folder.open(f"v{FORMAT_VERSION}-{self.codec}", read_only=self.read_only)
            return None if self.read_only else Index(self.path / "index.sqlite", self._folder, self.caps, mode)
        except (OSError, sqlite3.Error) as error:
            raise StoreError(
                f"the store {str(self.path)!r} cannot be opened for writing ({_cause(error)}); name another folder, "
                "or open it with read_only=True."
            ) from error

    def _name(self, key: str) -> str:
        return file_name(key, self.codec)

    def _is_paused(self) -> bool:
        """Return whether writing is paused after a failed write, and count the document as dropped if it is."""
        paused = time.monotonic() < self._paused_until
        self.dropped += paused
        return paused

    def _write(self, name: str, buffers: Sequence[Buffer]) -> bool:
        """Make room for a document's file, count it and write it. Return whether it is there now."""
        if self._index is None:
            return False
        entry = Entry(name, str(namespace_of(name)), sum(len(part) for part in buffers))
        if entry.bytes > self.caps.largest:
            self.rejected += 1
            return False
        try:
            is_counted = self._index.reserve(entry)
            self._folder.write_file(name, buffers)
            if is_counted:
                return self._index.confirm(entry)  # False if another process has evicted or removed it meanwhile
            self._index.count_later(entry)
            return True
        except (OSError, sqlite3.Error) as error:
            if is_locked(error):  # another process is busy, which is not an error
                self.rejected += 1
                return False
            if isinstance(error, ForeignFileError):
                self.rejected += 1
                self._warn(f"a document cannot be stored ({_cause(error)}); remove what is there")
            else:
                self.failed_writes += 1
                self._paused_until = time.monotonic() + PAUSE_SECONDS
                self._warn(f"documents cannot be stored for now ({_cause(error)}); answers are not affected")
            with suppress(OSError, sqlite3.Error):
                self._index.remove([name], soon=True)
            return False

    def _remove(self, beginning: str) -> int:
        """Remove all documents whose paths begin with ``beginning``. Return the number of removed files."""
        index, removed = self._require_index(), 0
        with self._maintenance():
            for codec in CODECS:
                files = {entry.name for entry in self._folder.scan(beginning, [codec])}
                names = sorted(files.union(index.names(f"v{FORMAT_VERSION}-{codec}/{beginning}")))
                for start in range(0, len(names), REMOVED_AT_ONCE):
                    index.remove(names[start : start + REMOVED_AT_ONCE])
                removed += len(files)
        return removed

    def _require_index(self) -> Index:
        if self._index is None:
            raise StoreError(f"the store {str(self.path)!r} was opened with read_only=True; nothing can be changed.")
        return self._index

    @contextmanager
    def _maintenance(self) -> Generator[None, None, None]:
        """Raise StoreError for errors of maintenance. Errors during an answer are misses instead."""
        try:
            yield
        except (OSError, sqlite3.Error) as error:
            raise StoreError(
                f"the store {str(self.path)!r} cannot be changed ({_cause(error)}); check whether its disk is full, "
                "read-only or locked by another process."
            ) from error

    def _remove_damaged(self, name: str, reason: Miss) -> None:
        outcome = "it is computed again"
        if self._index is not None:
            try:
                self._folder.remove(name)  # even if the index is locked, so that the document can be stored again
                outcome = "it was removed and is computed again"
                with suppress(OSError, sqlite3.Error):  # the document's next file replaces its row
                    self._index.remove([name], soon=True)
            except OSError as error:
                outcome = f"it cannot be removed ({_cause(error)}) and is computed again"
        self._warn(f"a stored document is damaged ({reason}); {outcome}")

    def _warn(self, message: str) -> None:
        if message not in self._warned:
            self._warned.add(message)
            logger.warning("store %s: %s", self.path, message)


def _cause(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


def _expand(path: str | os.PathLike[str]) -> Path:
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise StoreError(f"the store {os.fspath(path)!r} begins with the name of an unknown user.") from error
