"""The folder of a disk store: its format version and permissions, and files that appear complete or not at all.

Every name is checked before it becomes a path, and links are not followed, so nothing outside the folder is touched.
Whatever else lies in the folder, such as pipes, sockets, links and folders in the place of files, is left alone.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import re
import shutil
import stat
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from ..errors import StoreError
from ..text.json_text import parse_json
from .format import CODECS, FORMAT_VERSION, SUFFIX, Buffer, Codec, namespace_of, write_all
from .records import RECORD_FOLDERS, is_record

logger = logging.getLogger(__name__)

ABANDONED_SECONDS = 3600.0  # since the last write to a temporary file, after which its writer must have died
_DOCUMENTS = re.compile(r"v(?P<version>\d+)-.*")


class ForeignFileError(OSError):
    """Something that no store has made is in the place of a document's file or folder."""


@dataclass(frozen=True, slots=True)
class Entry:
    """A document's file.

    Attributes:
        name: path relative to the store folder (``file_name``).
        namespace: namespace part of the document's key.
        bytes: size of the file.
    """

    name: str
    namespace: str
    bytes: int


class Folder:
    """A store's folder.

    Args:
        path: the folder.
        mode: permissions of its files. Folders also get the right to enter for those who may read.
        fsync: wait until written data is on the disk.
    """

    def __init__(self, path: Path, mode: int, fsync: bool) -> None:
        self.path, self._mode, self._fsync = path, mode, fsync
        self._temporary = path / "tmp"

    def open(self, subfolder: str, *, read_only: bool) -> None:
        """Check that the folder is a store of the current format. Unless ``read_only``, create or update it.

        An update removes the documents of an older format and the temporary files of dead processes.

        Args:
            subfolder: created in the folder if missing.
            read_only: change nothing.

        Raises:
            StoreError: the folder is not a store, or its format cannot be used.
            OSError: the folder cannot be written.
        """
        if self.path.exists() and not self.path.is_dir():
            raise StoreError(f"the store {str(self.path)!r} is a file, but it must be a folder.")
        version = self._version()
        if version is None and (read_only or (self.path.exists() and not all(map(_may_be_own, self.path.iterdir())))):
            raise StoreError(
                f"the folder {str(self.path)!r} is not a document store, because it has no format.json; name an empty "
                "or a new folder."
            )
        is_old = version is not None and version < FORMAT_VERSION
        if read_only and is_old:
            raise StoreError(
                f"the store {str(self.path)!r} has format {version}, but this version reads format {FORMAT_VERSION}; "
                "open it once without read_only=True, which removes its documents."
            )
        if read_only:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._make(self.path)
        if is_old:
            self._remove_data(version)
        self._make(self._temporary)
        text = json.dumps({"format": "kvfusion-document-store", "version": FORMAT_VERSION}).encode()
        self._write(self._marker, [text])  # at every opening, because it shows that the folder can be written
        self._make(self.path / subfolder)
        self.sweep()

    def sweep(self) -> None:
        """Remove temporary files of processes that died while writing."""
        now = self._marker.lstat().st_mtime  # of the last opening, so the folder's own clock is used
        self._require_own(self._temporary, stat.S_ISDIR)
        for file in self._temporary.glob("*.part"):
            with suppress(FileNotFoundError):  # its writer has just renamed it
                facts = file.lstat()
                if stat.S_ISREG(facts.st_mode) and now - facts.st_mtime > ABANDONED_SECONDS:
                    file.unlink()

    def scan(self, beginning: str = "", codecs: Sequence[Codec] = CODECS) -> Iterator[Entry]:
        """List the documents' files.

        Args:
            beginning: beginning of their paths below the folders of ``codecs``.
            codecs: which folders to list.
        """
        known = beginning.rpartition("/")[0]
        for codec in codecs:
            top = f"v{FORMAT_VERSION}-{codec}"
            if not self._is_own(self.path / top / known, stat.S_ISDIR):
                continue
            for folder, subfolders, files in os.walk(self.path / top / known):
                parent = os.path.relpath(folder, self.path)
                if parent.count("/") == 2:  # v4-raw/namespace/xx
                    subfolders.clear()
                for name in (f"{parent}/{file}" for file in files):
                    namespace = namespace_of(name)
                    if namespace is not None and name.startswith(f"{top}/{beginning}"):
                        with suppress(FileNotFoundError):
                            facts = os.lstat(f"{self.path}/{name}")
                            if stat.S_ISREG(facts.st_mode):
                                yield Entry(name, namespace, facts.st_size)

    def has(self, name: str) -> bool:
        """Return whether a document's file exists."""
        return self._is_own(self._file(name), stat.S_ISREG)

    def open_file(self, name: str) -> int:
        """Return the descriptor of a document's file, opened for reading.

        Raises:
            FileNotFoundError: it does not exist.
            ForeignFileError: something else is in its place.
            OSError: it cannot be opened.
        """
        file = self._file(name)
        self._require_own(file)
        return os.open(file, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)

    def remove(self, name: str) -> None:
        """Remove a document's file if it exists, and leave anything else in its place alone.

        Raises:
            ValueError: ``name`` is not the name of a document's file.
            OSError: the file cannot be removed.
        """
        file = self._file(name)
        with suppress(ForeignFileError, FileNotFoundError):
            self._require_own(file)
            file.unlink()

    def write_file(self, name: str, buffers: Sequence[Buffer]) -> None:
        """Write a document's file, which appears complete or not at all.

        Raises:
            ForeignFileError: something else is in its place.
            OSError: the file cannot be written.
        """
        file = self._file(name)
        with suppress(FileNotFoundError):
            self._require_own(file)
        self._write(file, buffers)

    def records(self, beginning: str) -> list[str]:
        """Return the names of the records below a folder of the store."""
        files = (self.path / beginning).rglob("*") if self._is_own(self.path / beginning, stat.S_ISDIR) else ()
        names = (file.relative_to(self.path).as_posix() for file in files)
        return sorted(name for name in names if is_record(name) and self.has(name))

    def _file(self, name: str) -> Path:
        """Return the path of a document's file or a record. Raise ValueError if ``name`` does not name one."""
        if namespace_of(name) is None and not is_record(name):
            raise ValueError(f"{name!r} does not name the file of a document")
        return self.path / name

    def _is_own(self, path: Path, is_kind: Callable[[int], bool]) -> bool:
        try:
            self._require_own(path, is_kind)
        except OSError:  # for example, a network folder that is gone
            return False
        return True

    def _require_own(self, path: Path, is_kind: Callable[[int], bool] = stat.S_ISREG) -> None:
        """Raise ForeignFileError if a path in the store is of another kind, or leads through something but folders.

        Raises:
            OSError: the path does not exist or cannot be reached.
        """
        if path.parent != self.path:
            self._require_own(path.parent, stat.S_ISDIR)
        if not is_kind(os.lstat(path).st_mode):
            raise ForeignFileError(errno.EEXIST, "something else is in the place of a file or folder of the store")

    def _write(self, file: Path, buffers: Sequence[Buffer]) -> None:
        """Write a file under a temporary name and rename it."""
        self._require_own(self._temporary, stat.S_ISDIR)
        temporary = self._temporary / f"{uuid.uuid4().hex}.part"
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, self._mode)
        try:
            try:
                os.fchmod(descriptor, self._mode)  # independent of the umask
                write_all(descriptor, buffers)
                if self._fsync:
                    os.fsync(descriptor)
            finally:
                os.close(descriptor)
            try:
                os.replace(temporary, file)
            except FileNotFoundError:  # the first file of its folder
                for folder in reversed(file.relative_to(self.path).parents[:-1]):
                    self._make(self.path / folder)
                os.replace(temporary, file)
            if self._fsync:
                _sync_folder(file.parent)
        except BaseException:
            with suppress(OSError):
                temporary.unlink()
            raise

    def _make(self, folder: Path) -> None:
        """Create a folder with the store's permissions, independent of the umask. Leave an existing one as it is.

        Raises:
            ForeignFileError: something else is in its place, such as a link.
        """
        try:
            folder.mkdir()
        except FileExistsError:
            if folder != self.path:
                self._require_own(folder, stat.S_ISDIR)
            return
        folder.chmod(self._mode | (self._mode & 0o444) >> 2)
        if self._fsync:
            _sync_folder(folder.parent)

    @property
    def _marker(self) -> Path:
        return self.path / "format.json"

    def _version(self) -> int | None:
        """Return the folder's format version, or None if it has no format.json.

        Raises:
            StoreError: the version is newer than this one, or unreadable.
        """
        try:
            if not stat.S_ISREG(os.lstat(self._marker).st_mode):  # reading a pipe would wait forever
                raise ValueError("not a file")
            version = parse_json(self._marker.read_text(encoding="utf-8"))["version"]
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError) as error:
            raise StoreError(f"{str(self._marker)!r} is damaged; name another folder, or remove this one.") from error
        if not isinstance(version, int):
            raise StoreError(f"{str(self._marker)!r} names the version {version!r}, but it must be a whole number.")
        if version > FORMAT_VERSION:
            raise StoreError(
                f"the store {str(self.path)!r} has format {version}, but this version reads up to {FORMAT_VERSION}; "
                "update kvfusion-rag, or name another folder."
            )
        return version

    def _remove_data(self, version: int | None) -> None:
        """Remove everything that older formats have written."""
        removed = 0
        for entry in self.path.iterdir():
            documents = _DOCUMENTS.fullmatch(entry.name)
            is_old = int(documents["version"]) < FORMAT_VERSION if documents else entry.name == "quarantine"
            if is_old:
                removed += 0 if documents is None else sum(1 for _ in entry.glob(f"*/*/*{SUFFIX}"))
                shutil.rmtree(entry, ignore_errors=True)  # another process may be removing it too
            elif entry.name in RECORD_FOLDERS:
                shutil.rmtree(entry, ignore_errors=True)
            elif entry.name.startswith(("index.sqlite", "calibration.json")):
                _unlink_file(entry)
            elif entry.name == "tmp" and not entry.is_symlink():
                for file in entry.glob("*~*"):
                    _unlink_file(file)
        logger.warning(
            "the store at %s has format %d, this version writes %d: its %d documents were removed and will be "
            "computed again",
            self.path, version, FORMAT_VERSION, removed,
        )  # fmt: skip


def _may_be_own(entry: Path) -> bool:
    """Return whether a store creates such an entry: another process may be opening the folder, or have died there."""
    names, beginnings = ("tmp", "format.json", *RECORD_FOLDERS), (f"v{FORMAT_VERSION}-", "index.sqlite")
    return entry.name in names or entry.name.startswith(beginnings)


def _unlink_file(file: Path) -> None:
    with suppress(FileNotFoundError):
        if not stat.S_ISDIR(file.lstat().st_mode):
            file.unlink()


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
