"""The disk tier: one file a document, in hashed subfolders, under a cap in bytes that all processes share.

A document is written under another name and then renamed, so a file is either whole or absent; it is read only if
its header, checksum and token ids are those that were asked for and its numbers are finite. Every other outcome
is a miss with its reason. Files are never changed in place, so a reader keeps what it has opened.

    FOLDER/format.json             what this folder is
    FOLDER/index.sqlite            sizes and use, for eviction (index.py)
    FOLDER/v2-raw/<namespace>/<2 hex>/<document>-<digest>.safetensors
    FOLDER/tmp/                    files being written
    FOLDER/quarantine/             the last few broken ones, to be looked at; the first to make room
"""

from __future__ import annotations

import logging
import os
import sqlite3
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from ..errors import InvalidInputError, StoreError
from ..model.kv import DocumentKV, KVShape
from .database import is_held
from .files import SUFFIX, Miss, check_alone, read_file
from .folder import Folder
from .format import CODECS, FORMAT_VERSION, Buffer, Codec, encode, is_finite, layout
from .index import ASIDE, Caps, Entry, Index
from .keys import document_key, document_part, require_key, require_namespace_key

logger = logging.getLogger(__name__)

DEFAULT_MAX_BYTES = 20 << 30
PAUSE_SECONDS = 60.0  # without writing, after a write that failed
REMOVED_AT_ONCE = 256  # files, so that other processes need not wait long for the index


@dataclass(frozen=True, slots=True)
class VerifyReport:
    """What came of reading every file of a store."""

    whole: int
    broken: int
    uncounted: int
    missing: int


class DiskStore:
    """Document KVs in a folder.

    Args:
        path: made if it does not exist; must be empty or a store.
        max_bytes: cap on all documents together, broken ones that were put aside among them.
        namespace_bytes: cap on each namespace. With it, a document that finds the store full lets those of its own
            namespace leave first, and another's only when none of its own is left.
        codec: "raw", or "v8": values in 8 bit, which changes answers slightly and saves a quarter to three eighths.
        fsync: wait until a document is on the disk; without it a power cut can lose documents (never spoil them).
        mode: permissions of files; folders get the same with the right to enter.
        read_only: never write, remove or count anything.

    Raises:
        StoreError: the path is a file or somebody else's folder, cannot be written, or is of a newer format.
        InvalidInputError: a cap or mode that is not allowed.
    """

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
        for name, value in (
            ("max_bytes", max_bytes),
            ("namespace_bytes", 1 if namespace_bytes is None else namespace_bytes),
        ):
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise InvalidInputError(f"{name} is {value!r}, but it must be a whole number of bytes from 1.")
        if not isinstance(mode, int) or isinstance(mode, bool) or not 0o600 <= mode <= 0o777 or mode & 0o600 != 0o600:
            raise InvalidInputError(
                f"mode is {mode!r}, but it must be permissions such as 0o600 or 0o660, the owner's right to read and "
                "write among them."
            )
        if codec not in CODECS:
            raise InvalidInputError(f"codec is {codec!r}, but it must be one of {list(CODECS)}.")
        self.path, self.caps = Path(path).expanduser(), Caps(max_bytes, namespace_bytes)
        self.codec: Codec = codec
        self._mode, self._read_only = mode, read_only
        self._folder = Folder(self.path, mode, fsync)
        self._files = self.path / f"v{FORMAT_VERSION}-{codec}"
        self._paused_until = 0.0
        self._warned: set[str] = set()
        self._open()
        self._index = None if read_only else self._open_index()
        self.evictions = self.rejected = self.dropped = self.written = self.failed_writes = 0

    def __repr__(self) -> str:
        return f"DiskStore({str(self.path)!r}, codec={self.codec!r}, max_bytes={self.caps.total:,})"

    @property
    def read_only(self) -> bool:
        return self._read_only

    def file_bytes(self, shape: KVShape, tokens: int) -> int:
        """Size of the file of a document of ``tokens`` tokens."""
        return layout(document_key("", "", ()), tokens, shape, self.codec).total

    def __contains__(self, key: str) -> bool:
        """Whether there is a file for ``key``; counts as no look-up."""
        file = self._file(key)
        try:
            return file.exists()
        except OSError:  # as of a network folder that is gone
            return False

    def get(self, key: str, shape: KVShape, into: DocumentKV) -> Miss | None:
        """Read the document ``into.token_ids`` under ``key`` straight into the CPU tensors of ``into``.

        What ``into`` holds after a miss is undefined.

        Returns:
            ``None`` when it is there, else why it is not.
        """
        plan = layout(key, into.num_tokens, shape, self.codec)
        file = self._file(key)
        try:
            place = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return Miss.ABSENT
        except OSError as error:
            return self._unreadable(error)
        try:
            found = read_file(place, plan, into, self.codec)
        except OSError as error:
            return self._unreadable(error)
        finally:
            os.close(place)
        if found is not None:
            self._quarantine(file, found)
        elif self._index is not None:
            self._index.touch(self._name(file))
        return found

    def put(self, key: str, document: DocumentKV) -> bool:
        """Write ``document``, making room for it; whether it is there now. Faults are counted and logged once."""
        file = self._file(key)
        if self._index is None:
            return False
        if key in self:
            return True
        if self._is_paused():
            return False
        if not is_finite(document.keys, document.values):
            self._warn("a document's keys or values are not finite numbers; it is not stored")
            return False
        return self._place(file, encode(key, document, self.codec))

    def adopt(self, key: str, data: bytes, shape: KVShape, into: DocumentKV) -> Miss | None:
        """Take in a file that was made elsewhere, as far as it is what ``key`` asks for, and read it."""
        file = self._file(key)
        if self._is_paused():
            return Miss.UNREADABLE
        if len(data) != layout(key, into.num_tokens, shape, self.codec).total:
            return Miss.TRUNCATED
        return self.get(key, shape, into) if self._place(file, [data]) else Miss.UNREADABLE

    def forget(self, *keys: str) -> int:
        """Remove the documents of ``keys`` under every model; how many files that were.

        Those that are just being written go with them.

        Raises:
            InvalidInputError: one of ``keys`` is none.
            StoreError: nothing can be removed here.
        """
        for key in keys:
            require_key(key)
        removed = 0
        for part in dict.fromkeys(map(document_part, keys)):
            namespace, document = part.split("-")
            removed += self._remove(f"{namespace}/{document[:2]}/{document}-", f"{part}-")
        return removed

    def clear(self, namespace: str | None = None) -> int:
        """Remove all documents of a namespace (the first part of its keys), or of all; how many files that were.

        Those that are just being written go with them.

        Raises:
            InvalidInputError: ``namespace`` is no key of one.
            StoreError: nothing can be removed here.
        """
        if namespace is None:
            return self._remove("", "")
        require_namespace_key(namespace)
        return self._remove(f"{namespace}/", f"{namespace}-")

    def totals(self) -> dict[str, tuple[int, int]]:
        """Bytes and number of documents by namespace (the first part of its keys)."""
        found: dict[str, tuple[int, int]] = {}
        if self._index is not None:
            with suppress(OSError, sqlite3.Error):
                return self._index.totals()
        for _, entry in self._scan():
            size, count = found.get(entry.namespace, (0, 0))
            found[entry.namespace] = (size + entry.bytes, count + 1)
        return found

    def verify(self) -> VerifyReport:
        """Read every file; put the broken ones aside and set the index right."""
        whole = broken = 0
        for file, _ in self._scan():
            try:
                reason = check_alone(file)
            except FileNotFoundError:  # it made room for another one
                continue
            if reason is None:
                whole += 1
            else:
                broken += 1
                self._quarantine(file, reason)
        with self._maintaining():
            if self._index is not None:
                self._folder.sweep()
            uncounted, missing = (0, 0) if self._index is None else self._index.set_right()
        return VerifyReport(whole, broken, uncounted, missing)

    def close(self) -> None:
        if self._index is not None:
            self._index.close()

    # Opening

    def _open(self) -> None:
        try:
            if self._read_only:
                self._folder.open_to_read()
            else:
                self._folder.open([ASIDE, self._files.name])
        except OSError as error:
            raise StoreError(
                f"the store {str(self.path)!r} cannot be opened for writing ({_cause(error)}); name another folder, "
                "or open it with read_only=True."
            ) from error

    def _open_index(self) -> Index:
        try:
            return Index(self.path / "index.sqlite", self._entries, self._mode)
        except (OSError, sqlite3.Error) as error:
            raise StoreError(
                f"the index of the store {str(self.path)!r} cannot be opened ({_cause(error)})."
            ) from error

    # Files

    def _file(self, key: str) -> Path:
        require_key(key)
        namespace, rest = key.split("-", 1)
        return self._files / namespace / rest[:2] / f"{rest}{SUFFIX}"

    def _name(self, file: Path) -> str:
        return str(file.relative_to(self.path))

    def _scan(self, pattern: str = f"*/*/*{SUFFIX}", codecs: Sequence[Codec] = CODECS) -> Iterator[tuple[Path, Entry]]:
        """The document files whose places fit ``pattern``."""
        for codec in codecs:
            for file in (self.path / f"v{FORMAT_VERSION}-{codec}").glob(pattern):
                with suppress(FileNotFoundError):
                    yield file, Entry(self._name(file), file.parts[-3], file.stat().st_size)

    def _entries(self) -> list[Entry]:
        """All that is counted: document files and those that were put aside."""
        found = [entry for _, entry in self._scan()]
        for file in (self.path / ASIDE).iterdir():
            with suppress(FileNotFoundError):
                found.append(Entry(self._name(file), ASIDE, file.stat().st_size))
        return found

    def _is_paused(self) -> bool:
        """Whether nothing is written for a while, after a write that failed; each document is counted."""
        paused = time.monotonic() < self._paused_until
        self.dropped += paused
        return paused

    def _place(self, file: Path, buffers: Sequence[Buffer]) -> bool:
        """Make room for a document's file, count it and write it; whether it is there now."""
        if self._index is None:
            return False
        entry = Entry(self._name(file), file.parts[-3], sum(len(part) for part in buffers))
        try:
            removed = self._index.reserve(entry, self.caps, self._unlink)
            if removed is None:
                self.rejected += 1
                return False
            self.evictions += removed
            self._folder.write(file, buffers)
            if not self._index.confirm(entry.name, self._unlink):  # another process made room, or removed it
                return False
        except (OSError, sqlite3.Error) as error:
            if is_held(error):  # another process is at it for long; not a fault
                self.rejected += 1
                with suppress(OSError):
                    self._unlink(entry.name)
                return False
            self.failed_writes += 1
            self._paused_until = time.monotonic() + PAUSE_SECONDS
            self._warn(f"documents cannot be stored for now ({_cause(error)}); answers go on without")
            with suppress(OSError, sqlite3.Error):
                self._index.remove([entry.name], self._unlink, wait=0.0)
            return False
        self.written += entry.bytes
        return True

    def _unlink(self, name: str) -> None:
        (self.path / name).unlink(missing_ok=True)

    def _remove(self, beginning: str, aside: str) -> int:
        """Remove all documents whose names begin so, and what was put aside of them; how many files that were."""
        if self._index is None:
            raise StoreError(f"the store {str(self.path)!r} was opened with read_only=True; nothing can be removed.")
        removed, levels = 0, "*/" * (2 - beginning.count("/"))
        with self._maintaining():
            for codec in CODECS:
                begins = f"v{FORMAT_VERSION}-{codec}/{beginning}"
                files = {entry.name for _, entry in self._scan(f"{beginning}{levels}*{SUFFIX}", [codec])}
                names = sorted(files.union(self._index.names(begins)))
                for start in range(0, len(names), REMOVED_AT_ONCE):
                    self._index.remove(names[start : start + REMOVED_AT_ONCE], self._unlink)
                removed += len(files)
            self._index.remove(map(self._name, (self.path / ASIDE).glob(f"{aside}*")), self._unlink)
        return removed

    @contextmanager
    def _maintaining(self) -> Iterator[None]:
        """Faults while the store is looked after are told, other than those of answering."""
        try:
            yield
        except (OSError, sqlite3.Error) as error:
            raise StoreError(
                f"the store {str(self.path)!r} cannot be changed ({_cause(error)}); see whether its disk is full, "
                "read-only or held by another process."
            ) from error

    def _quarantine(self, file: Path, reason: Miss) -> None:
        if self._index is None:
            self._warn(f"a stored document is broken ({reason}); it is computed again")
            return
        aside = self.path / ASIDE / f"{file.parts[-3]}-{file.stem}.{reason}"
        try:
            entry = Entry(self._name(aside), ASIDE, file.stat().st_size)
            self._index.put_aside(self._name(file), entry, lambda: os.replace(file, aside), self._unlink)
        except (OSError, sqlite3.Error) as error:  # it left meanwhile, or the index is held by others
            self._warn(f"a stored document is broken ({reason}) and could not be put aside ({_cause(error)})")
        else:
            self._warn(f"a stored document is broken ({reason}); it was put aside and is computed again")

    def _unreadable(self, error: OSError) -> Miss:
        self._warn(f"stored documents cannot be read ({_cause(error)}); they are computed again")
        return Miss.UNREADABLE

    def _warn(self, message: str) -> None:
        if message not in self._warned:
            self._warned.add(message)
            logger.warning("store %s: %s", self.path, message)


def _cause(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error) or type(error).__name__
