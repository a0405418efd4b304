"""The folder of a store: how it is told from others, the rights in it, and files that appear whole or not at all."""

from __future__ import annotations

import itertools
import json
import os
import re
import socket
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from ..errors import StoreError
from .files import write_all
from .format import FORMAT_VERSION, Buffer

# Since its last byte was written, by the folder's own clock: a host name may be shared by containers that do not
# see each other's processes, and of other machines' processes nothing is known.
DEAD_SECONDS = 600.0  # after which a file of a process that is not seen here counts as left behind
ORPHANED_SECONDS = 86_400.0  # and one of another machine's
_TEMPORARY = re.compile(r"(?P<host>.*)~(?P<pid>\d+)~\d+~\d+")


class Folder:
    """A store's folder.

    Args:
        mode: permissions of its files; folders get the same with the right to enter.
        fsync: wait until what is written is on the disk.
    """

    def __init__(self, path: Path, mode: int, fsync: bool) -> None:
        self.path, self._mode, self._fsync = path, mode, fsync
        self._temporary = path / "tmp"
        self._numbers = itertools.count()

    def open(self, folders: Sequence[str]) -> None:
        """Make it and ``folders`` in it unless they are there, and remove what dead processes left.

        Raises:
            StoreError, OSError: it is none of ours, or cannot be written.
        """
        self._require_folder()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.make(self.path)
        if not self._is_marked() and not all(map(_is_own, self.path.iterdir())):
            raise self._foreign()
        self.make(self._temporary)
        text = json.dumps({"format": "kvfusion-document-store", "version": FORMAT_VERSION}).encode()
        self.write(self._marker, [text])  # before all else, and each time: it shows that the folder can be written
        for name in folders:
            self.make(self.path / name)
        self.sweep()

    def open_to_read(self) -> None:
        """Raise StoreError or OSError where it is no store."""
        self._require_folder()
        if not self._is_marked():
            raise self._foreign()

    def sweep(self) -> None:
        """Remove what processes left behind that died while they wrote."""
        now = self._marker.stat().st_mtime  # written just now, or long ago: then less is removed
        host = socket.gethostname()
        for file in self._temporary.iterdir():
            found = _TEMPORARY.fullmatch(file.name)
            if found is None:
                continue
            with suppress(FileNotFoundError):  # its writer has just renamed it
                age = now - file.stat().st_mtime
                is_dead = found["host"] == host and not _is_alive(int(found["pid"]))
                if age > (DEAD_SECONDS if is_dead else ORPHANED_SECONDS):
                    file.unlink()

    def write(self, file: Path, buffers: Sequence[Buffer]) -> None:
        """Write a file under another name and rename it."""
        temporary = self._temporary / f"{socket.gethostname()}~{os.getpid()}~{id(self)}~{next(self._numbers)}"
        place = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, self._mode)
        try:
            try:
                os.fchmod(place, self._mode)  # whatever the umask says
                write_all(place, buffers)
                if self._fsync:
                    os.fsync(place)
            finally:
                os.close(place)
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
        """A folder with the rights of the store's, whatever the umask says; one that is there stays as it is."""
        try:
            folder.mkdir()
        except FileExistsError:
            return
        folder.chmod(self._mode | (self._mode & 0o444) >> 2)  # who may read may enter
        if self._fsync:
            _sync_folder(folder.parent)

    @property
    def _marker(self) -> Path:
        return self.path / "format.json"

    def _require_folder(self) -> None:
        if self.path.exists() and not self.path.is_dir():
            raise StoreError(f"the store {str(self.path)!r} is a file, but it must be a folder.")

    def _is_marked(self) -> bool:
        if not self._marker.exists():
            return False
        version = _version(self._marker)
        if version > FORMAT_VERSION:
            raise StoreError(
                f"the store {str(self.path)!r} has format {version}, but this version reads up to {FORMAT_VERSION}; "
                "update kvfusion-rag, or name another folder."
            )
        return True

    def _foreign(self) -> StoreError:
        return StoreError(
            f"the folder {str(self.path)!r} is no document store, since it has no format.json; name an empty or a "
            "new one."
        )


def _version(marker: Path) -> int:
    try:
        found = json.loads(marker.read_text(encoding="utf-8"))["version"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise StoreError(f"{str(marker)!r} is damaged; name another folder, or remove this one.") from error
    if not isinstance(found, int):
        raise StoreError(f"{str(marker)!r} names the version {found!r}, which is no number.")
    return found


def _is_own(entry: Path) -> bool:
    """Whether a store makes such an entry: a process may have died, or be, at opening this one."""
    return entry.name in ("tmp", "quarantine", "format.json") or entry.name.startswith(
        (f"v{FORMAT_VERSION}-", "index.sqlite")
    )


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:  # another user's
        return True
    return True


def _sync_folder(folder: Path) -> None:
    place = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(place)
    finally:
        os.close(place)
