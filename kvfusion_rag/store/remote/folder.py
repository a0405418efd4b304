"""The files behind an fsspec URL: which are a store's own, and how they are read, written, listed and removed.

Nothing that a remote folder lists or contains is trusted. Names are checked before they become paths, links are not
followed, and no more than the expected bytes of a file are read.
"""

from __future__ import annotations

import glob
import os
import re
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import PurePosixPath
from typing import Any, cast

from ...errors import MissingDependencyError, StoreError
from ..format import FORMAT_VERSION, SUFFIX, check, namespace_of
from ..records import MAX_RECORD_BYTES, is_record

ALL_FILES = f"*/*/*/*{SUFFIX}"
BUCKETS = {"s3", "s3a", "gs", "gcs", "abfs", "abfss", "az", "oci", "oss", "tos"}  # protocols of object stores
_ORPHANED_SECONDS = 86400.0  # age from which a temporary file counts as abandoned
_TEMPORARY = re.compile(rf"(?<={re.escape(SUFFIX)})\.[^/]*\.tmp$")  # ending of a file that is being written
_TIMES = ("mtime", "LastModified", "last_modified", "created")  # names that file systems give to a file's time


class RemoteFolder:
    """Document files behind ``url``. Errors of the file system are passed on, and every system has its own.

    Args:
        url: an fsspec URL.
        options: passed to fsspec.

    Raises:
        StoreError: the kind of URL is unknown.
    """

    def __init__(self, url: str, options: dict[str, Any]) -> None:
        try:
            from fsspec.core import url_to_fs  # pyright: ignore[reportMissingTypeStubs, reportUnknownVariableType]
        except ImportError as error:
            raise MissingDependencyError("a remote store needs fsspec: pip install fsspec.") from error
        self._open = cast(Callable[[], tuple[Any, str]], partial(url_to_fs, url, **options))
        self._opened: Any = None
        try:
            self._opened, self.root = self._open()
        except (ImportError, ValueError) as error:
            raise StoreError(f"the remote store {url!r} cannot be opened: {error}") from error

    def reset(self) -> None:
        """Open the file system again at its next use, in a forked process, because those of buckets refuse to work
        in one."""
        self._opened = None

    @property
    def system(self) -> Any:
        """The file system."""
        if self._opened is None:
            self._opened, _ = self._open()
        return self._opened

    def path(self, name: str) -> str:
        """Return the path of a file by its name in the store."""
        return f"{self.root}/{name}"

    def read(self, path: str, size: int) -> bytes | None:
        """Return a file if it has ``size`` bytes, or None. No more is read of any other.

        Raises:
            FileNotFoundError, IsADirectoryError: there is no such file.
        """
        with self.system.open(path, "rb") as stream:
            is_expected = getattr(stream, "size", None) in (size, None)  # some systems do not know it
            data = stream.read(size + 1) if is_expected else b""
        return data if len(data) == size else None

    def exists(self, path: str) -> bool:
        """Return whether a file exists now. Other machines write and remove files too, so no listing is reused."""
        self.system.invalidate_cache()
        return self.system.exists(path)

    def write(self, path: str, data: bytes) -> None:
        """Write a file, which appears complete or not at all."""
        if not self._is_bucket:  # which has no folders, and which s3fs would create
            self.system.makedirs(path.rsplit("/", 1)[0], exist_ok=True)
        if not self.is_shared_folder:
            self.system.pipe_file(path, data)
            return
        temporary = f"{path}.{uuid.uuid4().hex}.tmp"
        try:
            self.system.pipe_file(temporary, data)
            self.system.mv(temporary, path)
        except OSError:
            with suppress(OSError):
                self.system.rm_file(temporary)
            raise

    def remove(self, path: str) -> None:
        """Remove a file unless another machine has removed it."""
        with suppress(FileNotFoundError):
            self.system.rm_file(path)

    def list(self, ending: str) -> dict[str, dict[str, Any]]:
        """Return facts about the documents' files, also temporary ones, whose paths end in a pattern, by path."""
        self.system.invalidate_cache()
        found = self.system.glob(f"{glob.escape(self.root)}/v{FORMAT_VERSION}-{ending}", detail=True)
        return {path: facts for path, facts in found.items() if self._is_own(path) and self.is_plain(path)}

    def records(self, beginning: str) -> list[str]:
        """Return the names of the records whose names begin with a folder."""
        self.system.invalidate_cache()
        paths = self.system.find(self.path(beginning))
        names = (path.removeprefix(f"{self.root}/") for path in paths)
        return sorted(name for name in names if is_record(name) and self.is_plain(self.path(name)))

    def read_record(self, name: str) -> bytes:
        """Return the contents of a record."""
        with self.system.open(self.path(name), "rb") as stream:
            return stream.read(MAX_RECORD_BYTES)

    def is_plain(self, path: str) -> bool:
        """Return whether a path in a shared folder is absent or a file, and no link leads from the folder elsewhere.

        Buckets have neither links nor pipes.
        """
        if not self.is_shared_folder:
            return True
        if os.path.realpath(path) != os.path.realpath(self.root) + path.removeprefix(self.root):
            return False
        return os.path.isfile(path) or not os.path.lexists(path)

    def is_damaged(self, path: str) -> bool | None:
        """Return whether a file is damaged, or None if another machine has removed it."""
        try:
            with self.system.open(path, "rb") as stream:
                return check(stream, getattr(stream, "size", None), PurePosixPath(path)) is not None
        except FileNotFoundError:
            return None

    def sweep(self) -> None:
        """Remove temporary files of processes that died long ago."""
        if self.is_shared_folder:
            for path, facts in self.list(f"{ALL_FILES}.*.tmp").items():
                if facts["mtime"] < time.time() - _ORPHANED_SECONDS:
                    self.remove(path)

    def evict(self, max_bytes: float) -> int:
        """Remove the oldest files until at most ``max_bytes`` are left. Return the number of removed files."""
        files = sorted(self.list(f"{ALL_FILES}*").items(), key=lambda item: _time_of(item[1]))
        used, evicted = sum(facts["size"] for _, facts in files), 0
        for path, facts in files:
            if used <= max_bytes:
                break
            self.remove(path)
            used -= facts["size"]
            evicted += 1
        return evicted

    @property
    def is_shared_folder(self) -> bool:
        """Whether this is a folder, whose files are visible before they are complete, and not a bucket."""
        return self.system.protocol in ("file", ("file", "local"))

    @property
    def _is_bucket(self) -> bool:
        protocol = self.system.protocol
        return not BUCKETS.isdisjoint([protocol] if isinstance(protocol, str) else protocol)

    def _is_own(self, path: str) -> bool:
        """Return whether a listed path is that of a document's file, or of a temporary one, in this store."""
        name = path.removeprefix(f"{self.root}/")
        return name != path and namespace_of(_TEMPORARY.sub("", name)) is not None


def _time_of(facts: dict[str, Any]) -> str:
    """Return the time when a file was written, in a form that sorts within one file system."""
    return next((str(facts[name]) for name in _TIMES if name in facts), "")
