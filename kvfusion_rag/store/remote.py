"""The remote tier: whole document files in a shared folder or bucket (an fsspec URL), behind a local disk tier.

Nothing from a remote store is trusted: names are checked before they are used, no more than the expected bytes are
read, and files are written to the local disk tier and checked there. A remote store that is slow, unreachable or full
costs one bounded wait and is then not used for a while. It never costs an answer.
"""

from __future__ import annotations

import atexit
import glob
import itertools
import logging
import math
import os
import re
import threading
import time
import uuid
import weakref
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import PurePosixPath
from typing import Any, Literal, TypeVar

from ..errors import InvalidInputError, MissingDependencyError, StoreError
from ..model.kv import DocumentKV
from .background import Upload, UploadQueue, call
from .format import (
    CODECS,
    FORMAT_VERSION,
    SUFFIX,
    Codec,
    check,
    encode,
    file_name,
    is_finite,
    namespace_of,
    require_codec,
)
from .keys import paths_of_documents, require_namespace_key
from .metrics import Miss
from .size_limits import add_up, require_bytes

logger = logging.getLogger(__name__)
R = TypeVar("R")

WAIT_SECONDS = 2.0  # longest wait for one document before it is computed
PAUSE_SECONDS = 60.0  # during which a store is not used after an error
FLUSH_SECONDS = 60.0  # longest wait for unfinished uploads when a store is closed
EXIT_SECONDS = 5.0  # the same when a process exits without closing its store
JOIN_SECONDS = 1.0  # longest wait for a thread that has finished its uploads
STALLED_SECONDS = 30.0  # longest wait for one step of maintenance
ALL_FILES = f"*/*/*/*{SUFFIX}"
_MAX_DOWNLOADS = 16
_UPLOADS_PER_CHECK = 64  # uploads between two checks of the cap
_ORPHANED_SECONDS = 86400.0  # age from which a temporary file counts as abandoned
_TEMPORARY = re.compile(rf"(?<={re.escape(SUFFIX)})\.[^/]*\.tmp$")  # ending of a file that is being written
_TIMES = ("mtime", "LastModified", "last_modified", "created")  # names that file systems give to a file's time


class RemoteStore:
    """Document files behind an fsspec URL (``s3://...``, ``gs://...``, ``file:///mnt/shared``).

    Uploads run in the background. A process that exits without :meth:`close` gives them five more seconds. A file
    system that starts threads for new connections may fail in that time, so close a store that was written to.

    :meth:`forget`, :meth:`clear`, :meth:`verify` and :meth:`totals` raise StoreError if the store fails, does not
    answer, or is read-only and would have to be changed.

    Args:
        url: a folder that only this store uses.
        max_bytes: approximate cap on all files. It is checked at the first and then every 64th upload of a process,
            and the oldest files are evicted. None leaves the size to the rules of the bucket.
        codec: "raw" or "v8", as for a :class:`DiskStore`.
        wait: seconds to wait for one document.
        read_only: never write or remove anything.
        options: passed to fsspec (credentials, endpoints).

    Raises:
        InvalidInputError: an argument is not allowed.
        StoreError: the kind of URL is unknown.
    """

    def __init__(
        self,
        url: str,
        *,
        max_bytes: int | None = None,
        codec: Codec = "raw",
        wait: float = WAIT_SECONDS,
        read_only: bool = False,
        **options: Any,
    ) -> None:
        if max_bytes is not None:
            require_bytes("max_bytes", max_bytes)
        if not isinstance(wait, int | float) or not 0 < wait < math.inf:
            raise InvalidInputError(f"wait is {wait!r}, but it must be a number of seconds above 0.")
        require_codec(codec)
        try:
            from fsspec.core import url_to_fs
        except ImportError as error:
            raise MissingDependencyError("a remote store needs fsspec: pip install fsspec.") from error
        self._open = partial(url_to_fs, url, **options)
        self._reset()
        try:
            self._opened, self._root = self._open()
        except (ImportError, ValueError) as error:
            raise StoreError(f"the remote store {url!r} cannot be opened: {error}") from error
        self.url = url
        self.codec: Codec = codec
        self._max_bytes, self._wait, self._read_only = max_bytes, wait, read_only
        self._uploaded = itertools.count()
        self._damaged: set[str] = set()  # paths of files that the next upload replaces
        self._paused_until = {"read": 0.0, "write": 0.0}  # a store that cannot be written may still be readable
        self._warned: set[str] = set()
        self.evictions = self.dropped = self.failed_writes = 0
        at_exit, in_child = weakref.WeakMethod(self._finish), weakref.WeakMethod(self._reset)
        atexit.register(lambda: (finish := at_exit()) and finish())
        os.register_at_fork(after_in_child=lambda: (reset := in_child()) and reset())

    def __repr__(self) -> str:
        return f"RemoteStore({self.url!r})"

    def get(self, key: str, size: int) -> bytes | Miss:
        """Return the file of ``key``, or the reason for the miss.

        Args:
            key: store key of the document.
            size: bytes that the file must have.

        Raises:
            InvalidInputError: ``key`` is not a document key.
        """
        path = self._path(key)
        if self._is_paused("read") or not self._downloads.acquire(blocking=False):
            return Miss.PAUSED

        def work() -> bytes | Miss:
            try:
                return self._download(path, size)
            finally:
                self._downloads.release()

        try:
            return call(work, self._wait)
        except TimeoutError:
            self._pause("read", f"takes more than {self._wait:g} s per document")
            return Miss.LATE

    def put(self, key: str, document: DocumentKV, on_stored: Callable[[int], None] = lambda size: None) -> None:
        """Upload ``document`` in the background, or count it as dropped if uploads are paused or the queue is full.

        Args:
            key: store key of the document.
            document: its KV, which is not uploaded if it contains NaN or infinity.
            on_stored: called with the file's size once it is stored.

        Raises:
            InvalidInputError: ``key`` is not a document key.
        """
        path = self._path(key)
        if self._read_only or not is_finite(document.keys, document.values):
            return
        if self._is_paused("write"):
            self.dropped += 1
            return
        self.dropped += not self._queue.add(Upload(path, b"".join(encode(key, document, self.codec)), on_stored))

    def note_damaged(self, key: str) -> None:
        """Let the next upload of ``key`` replace its file, which was damaged."""
        self._damaged.add(self._path(key))

    def forget(self, *keys: str) -> int:
        """Remove the documents of ``keys`` under every model. Return the number of removed files.

        Raises:
            InvalidInputError: ``keys`` contains an invalid document key.
        """
        return sum(self._remove(f"{codec}/{path}*") for path in paths_of_documents(keys) for codec in CODECS)

    def clear(self, namespace: str | None = None) -> int:
        """Remove all documents of a namespace, or all documents. Return the number of removed files.

        Raises:
            InvalidInputError: ``namespace`` is not a namespace key.
        """
        if namespace is not None:
            require_namespace_key(namespace)
        return self._remove(f"*/{namespace or '*'}/*/*{SUFFIX}*")

    def verify(self) -> tuple[int, int]:
        """Download and check every file, and remove damaged ones. Return the numbers of intact and damaged files."""
        counts = [0, 0]
        for path in self._maintain(self._list, ALL_FILES):
            is_damaged = self._maintain(self._is_damaged, path)
            if is_damaged is not None:
                counts[is_damaged] += 1
            if is_damaged and not self._read_only:
                self._maintain(self._remove_file, path)
        return counts[0], counts[1]

    def totals(self) -> dict[str, tuple[int, int]]:
        """Return bytes and number of documents by namespace key."""
        files = self._maintain(self._list, ALL_FILES)
        return add_up((path.split("/")[-3], facts["size"]) for path, facts in files.items())

    def flush(self, timeout: float = FLUSH_SECONDS) -> bool:
        """Wait at most ``timeout`` seconds for unfinished uploads. Return whether all have ended."""
        return self._queue.flush(timeout)

    def close(self, timeout: float = FLUSH_SECONDS) -> bool:
        """Flush, then drop the uploads that have not begun. Return whether none was dropped.

        The store can still be used afterwards.
        """
        if self.flush(timeout):
            return True
        self._pause("write", f"has not taken all documents within {timeout:g} s")
        self.dropped += self._queue.cancel()
        return False

    def _reset(self) -> None:
        """Start without threads or connections, both in a new store and in a forked process, which has neither."""
        self._opened: Any = None
        self._downloads = threading.BoundedSemaphore(_MAX_DOWNLOADS)
        self._queue = UploadQueue(self._upload)

    def _finish(self) -> None:
        """Give uploads a few seconds when the process exits, and wait for their threads.

        A thread that is still releasing its data when the interpreter ends would crash the process.
        """
        if self.close(EXIT_SECONDS):
            self._queue.join(JOIN_SECONDS)

    @property
    def _system(self) -> Any:
        """The file system, opened again in a forked process, because those of buckets refuse to work in one."""
        if self._opened is None:
            self._opened, _ = self._open()
        return self._opened

    def _path(self, key: str) -> str:
        return f"{self._root}/{file_name(key, self.codec)}"

    def _download(self, path: str, size: int) -> bytes | Miss:
        """Return a file with ``size`` bytes. No more is read of any other."""
        if not self._is_plain(path):
            return Miss.UNREADABLE
        try:
            with self._system.open(path, "rb") as stream:
                is_expected = getattr(stream, "size", None) in (size, None)  # some systems do not know it
                data = stream.read(size + 1) if is_expected else b""
            if len(data) == size:
                return data
            self._damaged.add(path)
            return Miss.TRUNCATED
        except (FileNotFoundError, IsADirectoryError):
            return Miss.ABSENT
        except Exception as error:  # every file system has its own errors
            self._pause("read", f"cannot be read ({type(error).__name__}: {error})")
            return Miss.UNREADABLE

    def _upload(self, upload: Upload) -> None:
        if self._is_paused("write"):
            self.dropped += 1
            return
        path = upload.path
        if not self._is_plain(path):
            self.dropped += 1
            return
        try:
            self._system.invalidate_cache()  # listings may be stale, because other machines write and remove too
            if path not in self._damaged and self._system.exists(path):
                return
            self._system.makedirs(path.rsplit("/", 1)[0], exist_ok=True)
            self._write(path, upload.data)
            self._damaged.discard(path)
            upload.on_stored(len(upload.data))  # first, because it removes a document that was forgotten meanwhile
        except Exception as error:
            self.failed_writes += 1
            self._pause("write", f"cannot be written ({type(error).__name__}: {error})")
            return
        try:
            self._tidy(next(self._uploaded))
        except Exception as error:
            self._pause("write", f"cannot be kept under its cap ({type(error).__name__}: {error})")

    @property
    def _is_folder(self) -> bool:
        """Whether files are visible before they are complete, unlike those of a bucket."""
        return self._system.protocol in ("file", ("file", "local"))

    def _write(self, path: str, data: bytes) -> None:
        if not self._is_folder:
            self._system.pipe_file(path, data)
            return
        temporary = f"{path}.{uuid.uuid4().hex}.tmp"
        try:
            self._system.pipe_file(temporary, data)
            self._system.mv(temporary, path)
        except OSError:
            with suppress(OSError):
                self._system.rm_file(temporary)
            raise

    def _tidy(self, uploaded: int) -> None:
        """After some uploads, remove temporary files of killed processes and evict files above the cap."""
        if uploaded == 0 and self._is_folder:
            for path, facts in self._list(f"{ALL_FILES}.*.tmp").items():
                if facts["mtime"] < time.time() - _ORPHANED_SECONDS:
                    self._remove_file(path)
        if uploaded % _UPLOADS_PER_CHECK == 0 and self._max_bytes is not None:
            files = sorted(self._list(f"{ALL_FILES}*").items(), key=lambda item: _time_of(item[1]))
            used = sum(facts["size"] for _, facts in files)
            for path, facts in files:
                if used <= self._max_bytes * 0.9:
                    break
                self._remove_file(path)
                used -= facts["size"]
                self.evictions += 1

    def _list(self, ending: str) -> dict[str, dict[str, Any]]:
        """Return facts about the documents' files, also temporary ones, whose paths end in a pattern, by path."""
        self._system.invalidate_cache()
        found = self._system.glob(f"{glob.escape(self._root)}/v{FORMAT_VERSION}-{ending}", detail=True)
        return {path: facts for path, facts in found.items() if self._is_own(path) and self._is_plain(path)}

    def _is_own(self, path: str) -> bool:
        """Return whether a listed path is that of a document's file, or of a temporary one, in this store."""
        name = path.removeprefix(f"{self._root}/")
        return name != path and namespace_of(_TEMPORARY.sub("", name)) is not None

    def _is_plain(self, path: str) -> bool:
        """Return whether a path in a shared folder is absent or a file, and no link leads from the folder elsewhere.

        Buckets have neither links nor pipes.
        """
        if not self._is_folder:
            return True
        if os.path.realpath(path) != os.path.realpath(self._root) + path.removeprefix(self._root):
            return False
        return os.path.isfile(path) or not os.path.lexists(path)

    def _is_damaged(self, path: str) -> bool | None:
        """Return whether a file is damaged, or None if another machine has removed it."""
        try:
            with self._system.open(path, "rb") as stream:
                return check(stream, getattr(stream, "size", None), PurePosixPath(path)) is not None
        except FileNotFoundError:
            return None

    def _remove_file(self, path: str) -> None:
        with suppress(FileNotFoundError):  # removed by another machine
            self._system.rm_file(path)

    def _remove(self, ending: str) -> int:
        """Remove files, including temporary ones. Return the number of documents."""
        if self._read_only:
            raise StoreError(f"the remote store {self.url!r} was opened with read_only=True; nothing can be removed.")
        paths = self._maintain(self._list, ending)
        for path in paths:
            self._maintain(self._remove_file, path)
        return sum(path.endswith(SUFFIX) for path in paths)

    def _maintain(self, step: Callable[[str], R], argument: str) -> R:
        """Return the result of one step of maintenance.

        Raises:
            StoreError: the step fails or takes too long.
        """
        try:
            return call(lambda: step(argument), STALLED_SECONDS)
        except TimeoutError as error:
            raise StoreError(
                f"the remote store {self.url!r} has not answered for {STALLED_SECONDS:g} s; check whether it can be "
                "reached, and try again."
            ) from error
        except Exception as error:  # every file system has its own errors
            raise StoreError(f"the remote store {self.url!r} fails ({type(error).__name__}: {error}).") from error

    def _is_paused(self, use: Literal["read", "write"]) -> bool:
        return time.monotonic() < self._paused_until[use]

    def _pause(self, use: Literal["read", "write"], problem: str) -> None:
        self._paused_until[use] = time.monotonic() + PAUSE_SECONDS
        if use not in self._warned:
            self._warned.add(use)
            logger.warning(
                "the remote store %s %s; it is not used for the next %g s", self.url, problem, PAUSE_SECONDS
            )


def _time_of(facts: dict[str, Any]) -> str:
    """Return the time when a file was written, in a form that sorts within one file system."""
    return next((str(facts[name]) for name in _TIMES if name in facts), "")
