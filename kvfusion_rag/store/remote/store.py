"""The remote tier: whole document files in a shared folder or bucket (an fsspec URL), behind a local disk tier.

Nothing from a remote store is trusted: files are written to the local disk tier and checked there. A remote store that
is slow, unreachable or full costs one bounded wait and is then not used for a while. It never costs an answer.
"""

from __future__ import annotations

import atexit
import itertools
import logging
import math
import os
import threading
import time
import weakref
from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, Literal, TypeVar

from ...errors import InvalidInputError, StoreError
from ...model.kv import DocumentKV
from ...option_names import check_option_names
from ...text.json_text import is_a
from ..format import NO_ENVIRONMENT, Codec, encode, file_name, is_finite, require_codec
from ..metrics import Miss, UploadReport
from ..size_limits import require_bytes
from .folder import RemoteFolder
from .maintenance import Maintenance
from .uploads import Upload, UploadQueue, call

logger = logging.getLogger(__name__)
R = TypeVar("R")

WAIT_SECONDS = 2.0  # longest wait for one document before it is computed
PAUSE_SECONDS = 60.0  # during which a store is not used after an error
FLUSH_SECONDS = 60.0  # longest wait for unfinished uploads when a store is closed
EXIT_SECONDS = 5.0  # the same when a process exits without closing its store
JOIN_SECONDS = 1.0  # longest wait for a thread that has finished its uploads
STALLED_SECONDS = 30.0  # longest wait for one upload to end
_MAX_DOWNLOADS = 16
_UPLOADS_PER_CHECK = 64  # uploads between two checks of the cap
_MAX_REPORTED = 10_000  # lost documents that a report names


class RemoteStore(Maintenance):
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

    @check_option_names()
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
        if not is_a(wait, int, float) or not 0 < wait < math.inf:
            raise InvalidInputError(f"wait is {wait!r}, but it must be a number of seconds above 0.")
        require_codec(codec)
        self._folder = RemoteFolder(url, options)
        self._reset()
        self.url = url
        self.codec: Codec = codec
        self._max_bytes, self._wait, self.read_only = max_bytes, wait, read_only
        self._uploaded = itertools.count()
        self._damaged: set[str] = set()  # paths of files that the next upload replaces
        self._paused_until = {"read": 0.0, "write": 0.0}  # a store that cannot be written may still be readable
        self._problems: dict[str, str] = {}  # why it is paused
        self._warned: set[str] = set()
        self._lost: dict[str, str] = {}  # since the last report, reason by store key
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

    def put(
        self,
        key: str,
        document: DocumentKV,
        on_stored: Callable[[int], None] = lambda size: None,
        *,
        environment: str = NO_ENVIRONMENT,
        patient: bool = False,
    ) -> None:
        """Upload ``document`` in the background, or count it as dropped if uploads are paused or the queue is full.

        Args:
            key: store key of the document.
            document: its KV, which is not uploaded if it contains NaN or infinity.
            on_stored: called with the file's size once it is stored.
            environment: digest of the environment that computed it.
            patient: wait while the queue is full, unless no upload ends for half a minute.

        Raises:
            InvalidInputError: ``key`` is not a document key.
        """
        path = self._path(key)
        if self.read_only or not is_finite(document.keys, document.values):
            return
        if self._is_paused("write"):
            self._lose(key, self._paused_reason())
            return
        data = b"".join(encode(key, document, self.codec, environment))
        self._add(Upload(key, path, len(data), lambda: data, on_stored), patient)

    def put_again(self, key: str, read: Callable[[], bytes | None]) -> None:
        """Upload the file of a document that other tiers have, unless it is there, even while uploads are paused after
        an error. Wait while the queue is full.

        Args:
            key: store key of the document.
            read: returns the file, or None if the other tiers have lost it.

        Raises:
            InvalidInputError: ``key`` is not a document key.
        """
        path = self._path(key)
        if not self.read_only:
            self._add(Upload(key, path, 0, read, lambda size: None, insists=True), patient=True)

    def missing(self, keys: Collection[str]) -> list[str]:
        """Return those of ``keys`` whose documents are not in the store now.

        Raises:
            InvalidInputError: ``keys`` contains an invalid document key.
            StoreError: the store fails or does not answer.
        """
        paths = [self._path(key) for key in keys]
        pool = ThreadPoolExecutor(min(_MAX_DOWNLOADS, max(1, len(paths))))
        try:
            found = list(pool.map(partial(self._maintain, self._folder.exists), paths))
        except StoreError as error:
            self._pause("write", f"cannot be asked for its documents ({error})")
            raise
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
        return [key for key, exists in zip(keys, found, strict=True) if not exists]

    @property
    def takes_uploads(self) -> bool:
        """Whether documents can be uploaded now: the store is not read-only, and not paused after an error."""
        return not self.read_only and not self._is_paused("write")

    def note_damaged(self, key: str) -> None:
        """Let the next upload of ``key`` replace its file, which was damaged."""
        self._damaged.add(self._path(key))

    def flush(self, timeout: float = FLUSH_SECONDS) -> UploadReport:
        """Wait at most ``timeout`` seconds for unfinished uploads. Return what has become of the uploads since the
        last report; it is true if all documents are stored."""
        return self._report(self._queue.flush(timeout))

    def drain(self) -> UploadReport:
        """Like :meth:`flush`, but wait as long as an upload ends every half minute."""
        return self._report(self._queue.drain(STALLED_SECONDS))

    def close(self, timeout: float = FLUSH_SECONDS) -> UploadReport:
        """Flush, then drop the uploads that have not begun.

        The store can still be used afterwards.
        """
        if self._queue.flush(timeout):
            self._pause("write", f"has not taken all documents within {timeout:g} s")
            for upload in self._queue.cancel():
                self._lose(upload.key, "the store was closed")
        return self._report(self._queue.flush(0))

    def _report(self, unfinished: int) -> UploadReport:
        lost, self._lost = self._lost, {}
        return UploadReport(unfinished, lost)

    def _add(self, upload: Upload, patient: bool) -> None:
        if not self._queue.add(upload, STALLED_SECONDS if patient else 0.0):
            self._lose(upload.key, "the queue of uploads was full")

    def _lose(self, key: str, reason: str) -> None:
        self.dropped += 1
        self._note_lost(key, reason)

    def _note_lost(self, key: str, reason: str) -> None:
        if len(self._lost) < _MAX_REPORTED:
            self._lost[key] = reason

    def _reset(self) -> None:
        """Start without threads or connections, both in a new store and in a forked process, which has neither."""
        self._folder.reset()
        self._downloads = threading.BoundedSemaphore(_MAX_DOWNLOADS)
        self._queue = UploadQueue(self._upload)

    def _finish(self) -> None:
        """Give uploads a few seconds when the process exits, and wait for their threads.

        A thread that is still releasing its data when the interpreter ends would crash the process.
        """
        if not self.close(EXIT_SECONDS).unfinished:
            self._queue.join(JOIN_SECONDS)

    def _path(self, key: str) -> str:
        return self._folder.path(file_name(key, self.codec))

    def _download(self, path: str, size: int) -> bytes | Miss:
        if not self._folder.is_plain(path):
            return Miss.UNREADABLE
        try:
            data = self._folder.read(path, size)
        except (FileNotFoundError, IsADirectoryError):
            return Miss.ABSENT
        except Exception as error:  # every file system has its own errors
            self._pause("read", f"cannot be read ({type(error).__name__}: {error})")
            return Miss.UNREADABLE
        if data is None:
            self._damaged.add(path)
            return Miss.TRUNCATED
        return data

    def _upload(self, upload: Upload) -> None:
        if self._is_paused("write") and not upload.insists:
            self._lose(upload.key, self._paused_reason())
            return
        path = upload.path
        if not self._folder.is_plain(path):
            self._lose(upload.key, "something else is in the place of the document's file")
            return
        try:
            if path not in self._damaged and self._folder.exists(path):
                return
            data = upload.read()
            if data is None:
                self._lose(upload.key, "the local disk has lost the document")
                return
            self._folder.write(path, data)
            self._damaged.discard(path)
            upload.on_stored(len(data))  # first, because it removes a document that was forgotten meanwhile
        except Exception as error:
            self.failed_writes += 1
            self._note_lost(upload.key, f"{type(error).__name__}: {error}")
            self._pause("write", f"cannot be written ({type(error).__name__}: {error})")
            return
        try:
            self._tidy(next(self._uploaded))
        except Exception as error:
            self._pause("write", f"cannot be kept under its cap ({type(error).__name__}: {error})")

    def _tidy(self, uploaded: int) -> None:
        """After some uploads, remove temporary files of killed processes and evict files above the cap."""
        if uploaded == 0:
            self._folder.sweep()
        if uploaded % _UPLOADS_PER_CHECK == 0 and self._max_bytes is not None:
            self.evictions += self._folder.evict(self._max_bytes * 0.9)

    def _is_paused(self, use: Literal["read", "write"]) -> bool:
        return time.monotonic() < self._paused_until[use]

    def _paused_reason(self) -> str:
        return f"uploads are paused, because the remote store {self._problems['write']}"

    def _pause(self, use: Literal["read", "write"], problem: str) -> None:
        self._paused_until[use], self._problems[use] = time.monotonic() + PAUSE_SECONDS, problem
        if use not in self._warned:
            self._warned.add(use)
            logger.warning(
                "the remote store %s %s; it is not used for the next %g s", self.url, problem, PAUSE_SECONDS
            )
