"""The cold tier: whole document files in a shared folder or bucket, by fsspec URL, with a local disk in front.

Nothing of a remote store is trusted: what comes is written to the local disk tier and checked there. One that is
slow, down or full costs a bounded wait and is then left alone for a while; it never costs an answer.
"""

from __future__ import annotations

import atexit
import glob
import io
import itertools
import logging
import math
import os
import threading
import time
import uuid
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from concurrent.futures import TimeoutError as LateError
from contextlib import suppress
from functools import partial
from pathlib import PurePosixPath
from typing import Any, Literal, NamedTuple, TypeVar

from ..errors import InvalidInputError, MissingDependencyError, StoreError
from .files import SUFFIX, Miss, check_stream
from .format import CODECS, FORMAT_VERSION, Buffer, Codec
from .keys import document_part, require_key, require_namespace_key

logger = logging.getLogger(__name__)
R = TypeVar("R")

WAIT_SECONDS = 2.0  # for one document, before it is computed instead
PAUSE_SECONDS = 60.0  # without asking, after a fault
FLUSH_SECONDS = 60.0  # for what is being written, when a store is closed
END_SECONDS = 5.0  # the same, when a process ends that has closed nothing
LAST_SECONDS = 1.0  # for a thread that has written all to end
STALLED_SECONDS = 30.0  # without a sign of the store, after which removing and listing are given up
_QUEUED, _QUEUED_BYTES = 64, 512 << 20  # uploads that may wait
_AT_ONCE = {"read": 16, "write": 4}
_CHECKED_EVERY = 64  # uploads between two looks at the cap
_ORPHANED_SECONDS = 86400.0  # after which nobody goes on with a half-written file
_AGES = ("mtime", "LastModified", "last_modified", "created")  # what file systems call the time of a file


class _Upload(NamedTuple):
    key: str
    data: bytes
    done: Callable[[int], None]


class RemoteStore:
    """Document files behind an fsspec URL (``s3://...``, ``gs://...``, ``file:///mnt/shared``).

    Uploads run in the background. A process that ends without ``close`` gives them five seconds more, in which a file
    system that needs threads of its own for new connections may not be able to go on; so close what was written to.

    Args:
        url: of a folder of its own.
        max_bytes: cap on all files, kept approximately: looked at with the first and then every 64th upload of a
            process, the oldest files leaving first; ``None`` leaves it to the bucket's own rules.
        wait: seconds that one document may take to come.
        read_only: never write or remove anything.
        options: passed on to fsspec (credentials, endpoints).

    Raises:
        InvalidInputError: an argument is not what it may be.
        StoreError: the URL is of no known kind.
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
        if max_bytes is not None and (not isinstance(max_bytes, int) or max_bytes < 1):
            raise InvalidInputError(f"max_bytes is {max_bytes!r}, but it must be a whole number of bytes from 1.")
        if not isinstance(wait, int | float) or not 0 < wait < math.inf:
            raise InvalidInputError(f"wait is {wait!r}, but it must be a number of seconds above 0.")
        if codec not in CODECS:
            raise InvalidInputError(f"codec is {codec!r}, but it must be one of {list(CODECS)}.")
        try:
            from fsspec.core import url_to_fs
        except ImportError as error:
            raise MissingDependencyError("a remote store needs fsspec: pip install fsspec.") from error
        self._open = partial(url_to_fs, url, **options)
        self._begin()
        try:
            self._opened, root = self._open()
        except (ImportError, ValueError) as error:
            raise StoreError(f"the remote store {url!r} cannot be opened: {error}") from error
        self._root, self._root_pattern = root, glob.escape(root)
        self.url = url
        self.codec: Codec = codec
        self._max_bytes, self._wait, self._read_only = max_bytes, wait, read_only
        self._written = itertools.count()
        self._broken: set[str] = set()
        self._paused_until = {"read": 0.0, "write": 0.0}  # what cannot be written may still be read
        self._warned: set[str] = set()
        self.evictions = self.dropped = self.failed_writes = 0
        at_end, in_child = weakref.WeakMethod(self._finish), weakref.WeakMethod(self._begin)
        atexit.register(lambda: (finish := at_end()) and finish())
        os.register_at_fork(after_in_child=lambda: (begin := in_child()) and begin())

    def _begin(self) -> None:
        """Nothing is under way: so in a new store, and in a forked process, which has no threads."""
        self._opened: Any = None
        self._downloads = threading.BoundedSemaphore(_AT_ONCE["read"])
        self._changed = threading.Condition()
        self._queue: deque[_Upload] = deque()
        self._workers = self._waiting = self._waiting_bytes = 0  # waiting: queued or being written
        self._threads: deque[threading.Thread] = deque(maxlen=_AT_ONCE["write"])  # those that wrote last

    def __repr__(self) -> str:
        return f"RemoteStore({self.url!r})"

    @property
    def _system(self) -> Any:
        """The file system, opened anew in a forked process: those of buckets refuse to work in one."""
        if self._opened is None:
            self._opened, _ = self._open()
        return self._opened

    def start(self, key: str) -> Future[bytes | Miss] | None:
        """Begin to fetch the file of ``key``; ``None`` while the store is left alone, or has enough to fetch.

        Raises:
            InvalidInputError: ``key`` is none.
        """
        require_key(key)
        if self._is_paused("read") or not self._downloads.acquire(blocking=False):
            return None
        fetching: Future[bytes | Miss] = Future()
        self._in_background(lambda: self._fetch(key, fetching))
        return fetching

    def finish(self, fetching: Future[bytes | Miss], began: float) -> bytes | Miss:
        """The file, or why it is not there."""
        try:
            return fetching.result(max(0.0, began + self._wait - time.monotonic()))
        except LateError:
            self._pause("read", f"takes more than {self._wait:g} s a document")
            return Miss.LATE

    def note_broken(self, key: str) -> None:
        """What came for ``key`` was not what it should be: the next upload replaces it."""
        if not self._read_only:
            self._broken.add(key)

    def note_dropped(self) -> None:
        """A document was not uploaded, since the store is left alone for a while."""
        if not self._read_only:
            self.dropped += 1

    @property
    def takes_uploads(self) -> bool:
        return not self._read_only and not self._is_paused("write")

    def upload(self, key: str, buffers: Sequence[Buffer], done: Callable[[int], None]) -> None:
        """Write a file in the background; dropped where too many wait already.

        Raises:
            InvalidInputError: ``key`` is none.
        """
        require_key(key)
        if not self.takes_uploads:
            return
        size = sum(memoryview(part).nbytes for part in buffers)
        with self._changed:
            if self._waiting == _QUEUED or (self._waiting and self._waiting_bytes + size > _QUEUED_BYTES):
                self.dropped += 1
                return
            self._queue.append(_Upload(key, b"".join(buffers), done))
            self._waiting += 1
            self._waiting_bytes += size
            if self._workers < _AT_ONCE["write"]:
                self._workers += 1
                self._threads.append(self._in_background(self._work))

    def forget(self, *keys: str) -> int:
        """Remove the documents of ``keys`` under every model; how many files that were.

        Raises:
            InvalidInputError: one of ``keys`` is none.
            StoreError: nothing can be removed there.
        """
        for key in keys:
            require_key(key)
        removed = 0
        for part in dict.fromkeys(map(document_part, keys)):
            namespace, document = part.split("-")
            for codec in CODECS:
                folder = f"{self._root_pattern}/v{FORMAT_VERSION}-{codec}/{namespace}/{document[:2]}"
                removed += self._remove(f"{folder}/{document}-*")
        return removed

    def clear(self, namespace: str | None = None) -> int:
        """Remove all documents of a namespace, or of all; how many files that were. Raises as :meth:`forget`."""
        if namespace is not None:
            require_namespace_key(namespace)
        return self._remove(f"{self._root_pattern}/v{FORMAT_VERSION}-*/{namespace or '*'}/*/*{SUFFIX}*")

    def verify(self) -> tuple[int, int]:
        """Download and check every file, and remove the broken ones; how many are whole, and how many were broken.

        Raises:
            StoreError: the store cannot be read, or a broken file not be removed.
        """
        return self._told(self._verify)

    def _verify(self) -> tuple[int, int]:
        found = [0, 0]
        for path in self._list(SUFFIX):
            try:
                stream = io.BytesIO(self._system.cat_file(path))
            except FileNotFoundError:  # another machine has removed it
                continue
            is_broken = check_stream(stream, PurePosixPath(path)) is not None
            if is_broken and not self._read_only:
                self._remove_file(path)
            found[is_broken] += 1
            self._heard = time.monotonic()
        return found[0], found[1]

    def totals(self) -> dict[str, tuple[int, int]]:
        """Bytes and number of documents by namespace.

        Raises:
            StoreError: the store cannot be listed.
        """
        files = self._told(lambda: self._list(SUFFIX))
        found: dict[str, tuple[int, int]] = {}
        for name, facts in files.items():
            namespace = name.split("/")[-3]
            size, count = found.get(namespace, (0, 0))
            found[namespace] = (size + facts["size"], count + 1)
        return found

    def flush(self, timeout: float = FLUSH_SECONDS) -> bool:
        """Wait for uploads under way, for ``timeout`` seconds at most; whether they have ended."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._waiting, timeout)

    def close(self, timeout: float = FLUSH_SECONDS) -> bool:
        """Wait as :meth:`flush`, then give up what has not begun; whether nothing was. It can be used again."""
        if self.flush(timeout):
            return True
        self._pause("write", f"has not taken all documents within {timeout:g} s")
        with self._changed:
            self.dropped += len(self._queue)
            while self._queue:
                self._end(self._queue.popleft())
        return False

    def _finish(self) -> None:
        """Give uploads some seconds at the process's end.

        Threads that are done are waited for: one that is still releasing its data when the interpreter goes would end
        the process with an error.
        """
        if self.close(END_SECONDS):
            for thread in list(self._threads):
                thread.join(LAST_SECONDS)

    def _path(self, key: str) -> str:
        namespace, rest = key.split("-", 1)
        return f"{self._root}/v{FORMAT_VERSION}-{self.codec}/{namespace}/{rest[:2]}/{rest}{SUFFIX}"

    def _fetch(self, key: str, fetching: Future[bytes | Miss]) -> None:
        file = self._download(key)
        self._downloads.release()
        fetching.set_result(file)

    def _download(self, key: str) -> bytes | Miss:
        try:
            return self._system.cat_file(self._path(key))
        except FileNotFoundError:
            return Miss.ABSENT
        except Exception as error:  # every file system has its own
            self._pause("read", f"cannot be read ({type(error).__name__}: {error})")
            return Miss.UNREADABLE

    def _work(self) -> None:
        """Upload what is queued, until nothing is."""
        while True:
            with self._changed:
                if not self._queue:
                    self._workers -= 1
                    return
                upload = self._queue.popleft()
            if self._is_paused("write"):
                self.dropped += 1
            else:
                self._store(upload)
            with self._changed:
                self._end(upload)

    def _end(self, upload: _Upload) -> None:
        self._waiting -= 1
        self._waiting_bytes -= len(upload.data)
        self._changed.notify_all()

    def _store(self, upload: _Upload) -> None:
        path = self._path(upload.key)
        try:
            self._system.invalidate_cache()  # of listings: other machines write and remove too
            if upload.key not in self._broken and self._system.exists(path):
                return
            self._system.makedirs(path.rsplit("/", 1)[0], exist_ok=True)
            self._place(path, upload.data)
            self._broken.discard(upload.key)
            upload.done(len(upload.data))  # before anything else may fail: it takes back what was forgotten meanwhile
        except Exception as error:
            self.failed_writes += 1
            self._pause("write", f"cannot be written ({type(error).__name__}: {error})")
            return
        try:
            self._tidy(next(self._written))
        except Exception as error:
            self._pause("write", f"cannot be kept under its cap ({type(error).__name__}: {error})")

    @property
    def _is_folder(self) -> bool:
        """Whether files appear before they are whole; those of a bucket do not."""
        return self._system.protocol in ("file", ("file", "local"))

    def _place(self, path: str, data: bytes) -> None:
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

    def _tidy(self, written: int) -> None:
        """Now and then: remove what killed processes left half-written, and what is above the cap."""
        if written == 0 and self._is_folder:
            for name, facts in self._list(f"{SUFFIX}.*.tmp").items():
                if facts["mtime"] < time.time() - _ORPHANED_SECONDS:
                    self._remove_file(name)
        if written % _CHECKED_EVERY == 0 and self._max_bytes is not None:
            self._make_room(self._max_bytes)

    def _make_room(self, cap: int) -> None:
        files = sorted(self._list(f"{SUFFIX}*").items(), key=lambda item: _age(item[1]))
        used = sum(facts["size"] for _, facts in files)
        for name, facts in files:
            if used <= cap * 0.9:
                break
            self._remove_file(name)
            used -= facts["size"]
            self.evictions += 1

    def _list(self, ending: str) -> dict[str, dict[str, Any]]:
        self._system.invalidate_cache()
        return self._system.glob(f"{self._root_pattern}/v{FORMAT_VERSION}-*/*/*/*{ending}", detail=True)

    def _remove_file(self, name: str) -> None:
        with suppress(FileNotFoundError):  # another machine was faster
            self._system.rm_file(name)

    def _remove(self, pattern: str) -> int:
        """Remove the files of a pattern, half-written ones too; how many documents that were."""
        if self._read_only:
            raise StoreError(f"the remote store {self.url!r} was opened with read_only=True; nothing can be removed.")
        return self._told(lambda: self._remove_all(pattern))

    def _remove_all(self, pattern: str) -> int:
        self._system.invalidate_cache()
        names = self._system.glob(pattern)
        for name in names:
            self._remove_file(name)
            self._heard = time.monotonic()
        return sum(name.endswith(SUFFIX) for name in names)

    def _told(self, work: Callable[[], R]) -> R:
        """``work`` of looking after the store; in the background and given up after a while, since it may hang.

        Raises:
            StoreError: faults are told, other than those of answering.
        """
        working: Future[R] = Future()

        def run() -> None:
            try:
                working.set_result(work())
            except BaseException as error:  # every file system has its own
                working.set_exception(error)

        self._heard = time.monotonic()
        self._in_background(run)
        while not working.done():
            left = self._heard + STALLED_SECONDS - time.monotonic()
            if left <= 0:
                raise StoreError(
                    f"the remote store {self.url!r} has not answered for {STALLED_SECONDS:g} s; see whether it can be "
                    "reached, and do this again."
                )
            wait([working], left)
        error = working.exception()
        if error is not None:
            raise StoreError(f"the remote store {self.url!r} fails ({type(error).__name__}: {error}).") from error
        return working.result()

    def _is_paused(self, way: Literal["read", "write"]) -> bool:
        return time.monotonic() < self._paused_until[way]

    def _pause(self, way: Literal["read", "write"], what: str) -> None:
        self._paused_until[way] = time.monotonic() + PAUSE_SECONDS
        if way not in self._warned:
            self._warned.add(way)
            logger.warning(
                "the remote store %s %s; it is left alone for %g s at a time", self.url, what, PAUSE_SECONDS
            )

    @staticmethod
    def _in_background(work: Callable[[], None]) -> threading.Thread:
        """Start ``work`` in a thread that no process waits for at its end, since a remote store may hang."""
        thread = threading.Thread(target=work, name="kvfusion-remote", daemon=True)
        thread.start()
        return thread


def _age(facts: dict[str, Any]) -> str:
    """When a file was written, in a form that sorts within one file system."""
    return next((str(facts[name]) for name in _AGES if name in facts), "")
