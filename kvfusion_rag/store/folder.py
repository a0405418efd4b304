"""The folder of a disk store: its format version and permissions, and files that appear complete or not at all."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import uuid
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from ..errors import StoreError
from .format import FORMAT_VERSION, SUFFIX, Buffer, write_all

logger = logging.getLogger(__name__)

ABANDONED_SECONDS = 3600.0  # since the last write to a temporary file, after which its writer must have died
_DOCUMENTS = re.compile(r"v(?P<version>\d+)-.*")


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
        self.make(self.path)
        if is_old:
            self._remove_data(version)
        self.make(self._temporary)
        text = json.dumps({"format": "kvfusion-document-store", "version": FORMAT_VERSION}).encode()
        self.write(self._marker, [text])  # at every opening, because it shows that the folder can be written
        self.make(self.path / subfolder)
        self.sweep()

    def sweep(self) -> None:
        """Remove temporary files of processes that died while writing."""
        now = self._marker.stat().st_mtime  # of the last opening, so the folder's own clock is used
        for file in self._temporary.glob("*.part"):
            with suppress(FileNotFoundError):  # its writer has just renamed it
                if now - file.stat().st_mtime > ABANDONED_SECONDS:
                    file.unlink()

    def write(self, file: Path, buffers: Sequence[Buffer]) -> None:
        """Write a file under a temporary name and rename it."""
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
            except FileNotFoundError:  # the first document of its folder
                for folder in (file.parent.parent, file.parent):
                    self.make(folder)
                os.replace(temporary, file)
            if self._fsync:
                _sync_folder(file.parent)
        except BaseException:
            with suppress(OSError):
                temporary.unlink()
            raise

    def make(self, folder: Path) -> None:
        """Create a folder with the store's permissions, independent of the umask. Leave an existing one as it is."""
        try:
            folder.mkdir()
        except FileExistsError:
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
        if not self._marker.exists():
            return None
        try:
            version = json.loads(self._marker.read_text(encoding="utf-8"))["version"]
        except (ValueError, KeyError, TypeError, RecursionError) as error:
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
            elif entry.name.startswith(("index.sqlite", "calibration.json")):
                entry.unlink(missing_ok=True)
            elif entry.name == "tmp":
                for file in entry.glob("*~*"):
                    file.unlink(missing_ok=True)
        logger.warning(
            "the store at %s has format %d, this version writes %d: its %d documents were removed and will be "
            "computed again",
            self.path, version, FORMAT_VERSION, removed,
        )  # fmt: skip


def _may_be_own(entry: Path) -> bool:
    """Return whether a store creates such an entry: another process may be opening the folder, or have died there."""
    return entry.name in ("tmp", "format.json") or entry.name.startswith((f"v{FORMAT_VERSION}-", "index.sqlite"))


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
