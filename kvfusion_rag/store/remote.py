"""The cold tier: whole document files in a shared folder or bucket, by fsspec URL, with a local disk in front.

Nothing of a remote store is trusted: what comes is written to the local disk tier and checked there. One that is
slow, down or full costs a bounded wait and is then left alone for a while; it never costs an answer.
"""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as LateError
from typing import Any

from ..errors import InvalidInputError, MissingDependencyError, StoreError
from .files import SUFFIX, Miss
from .format import CODECS, FORMAT_VERSION, Buffer, Codec
from .keys import document_part

logger = logging.getLogger(__name__)

WAIT_SECONDS = 2.0  # for one document, before it is computed instead
PAUSE_SECONDS = 60.0  # without asking, after a fault
_QUEUED = 64  # uploads that may wait
_CHECKED_EVERY = 64  # uploads between two looks at the cap


class RemoteStore:
    """Document files behind an fsspec URL (``s3://...``, ``gs://...``, ``file:///mnt/shared``).

    Args:
        url: of a folder of its own.
        max_bytes: cap on all files, kept approximately: looked at after every 64 uploads of a process, the oldest
            files leaving first; ``None`` leaves it to the bucket's own rules.
        wait: seconds that one document may take to come.
        read_only: never write or remove anything.
        options: passed on to fsspec (credentials, endpoints).
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
        if codec not in CODECS:
            raise InvalidInputError(f"codec is {codec!r}, but it must be one of {list(CODECS)}.")
        try:
            from fsspec.core import url_to_fs
        except ImportError as error:
            raise MissingDependencyError("a remote store needs fsspec: pip install fsspec.") from error
        try:
            self._system, self._root = url_to_fs(url, **options)
        except (ImportError, ValueError) as error:
            raise StoreError(f"the remote store {url!r} cannot be opened: {error}") from error
        self.url = url
        self.codec: Codec = codec
        self._max_bytes, self._wait, self._read_only = max_bytes, wait, read_only
        self._pool = ThreadPoolExecutor(8, thread_name_prefix="kvfusion-remote")
        self._room = threading.BoundedSemaphore(_QUEUED)
        self._uploads = itertools.count(1)
        self._paused_until = 0.0
        self._warned = False
        self.evictions = self.dropped = 0

    def __repr__(self) -> str:
        return f"RemoteStore({self.url!r})"

    def start(self, key: str) -> Future[bytes | Miss] | None:
        """Begin to fetch the file of ``key``; ``None`` while the store is left alone."""
        if time.monotonic() < self._paused_until:
            return None
        return self._pool.submit(self._download, key)

    def finish(self, fetching: Future[bytes | Miss], began: float) -> bytes | Miss:
        """The file, or why it is not there."""
        try:
            return fetching.result(max(0.0, began + self._wait - time.monotonic()))
        except LateError:
            fetching.cancel()
            self._pause(f"takes more than {self._wait:g} s a document")
            return Miss.LATE

    def upload(self, key: str, buffers: Sequence[Buffer], done: Callable[[int], None]) -> None:
        """Write a file in the background; dropped where too many wait already."""
        if self._read_only or time.monotonic() < self._paused_until:
            return
        if not self._room.acquire(blocking=False):
            self.dropped += 1
            return
        data = b"".join(buffers)
        self._pool.submit(self._store, key, data, done).add_done_callback(lambda _: self._room.release())

    def forget(self, key: str) -> int:
        """Remove the document of ``key`` under every model; how many files that were."""
        namespace, document = document_part(key).split("-")
        return sum(
            self._remove(f"{self._root}/v{FORMAT_VERSION}-{codec}/{namespace}/{document[:2]}/{document}-*")
            for codec in CODECS
        )

    def clear(self, namespace: str | None = None) -> int:
        """Remove all documents of a namespace, or of all; how many files that were."""
        return self._remove(f"{self._root}/v{FORMAT_VERSION}-*/{namespace or '*'}/*/*{SUFFIX}")

    def totals(self) -> dict[str, tuple[int, int]]:
        """Bytes and number of documents by namespace."""
        found: dict[str, tuple[int, int]] = {}
        for name, facts in self._list().items():
            namespace = name.split("/")[-3]
            size, count = found.get(namespace, (0, 0))
            found[namespace] = (size + facts["size"], count + 1)
        return found

    def flush(self) -> None:
        """Wait for uploads under way."""
        for _ in range(_QUEUED):
            self._room.acquire()
        for _ in range(_QUEUED):
            self._room.release()

    def close(self) -> None:
        """Finish writing."""
        self.flush()

    def _path(self, key: str) -> str:
        namespace, rest = key.split("-", 1)
        return f"{self._root}/v{FORMAT_VERSION}-{self.codec}/{namespace}/{rest[:2]}/{rest}{SUFFIX}"

    def _download(self, key: str) -> bytes | Miss:
        try:
            return self._system.cat_file(self._path(key))
        except FileNotFoundError:
            return Miss.ABSENT
        except Exception as error:  # every file system has its own
            self._pause(f"cannot be read ({type(error).__name__}: {error})")
            return Miss.UNREADABLE

    def _store(self, key: str, data: bytes, done: Callable[[int], None]) -> None:
        path = self._path(key)
        try:
            if self._system.exists(path):
                return
            self._system.makedirs(path.rsplit("/", 1)[0], exist_ok=True)
            temporary = f"{path}.{id(self):x}.{next(self._uploads)}.tmp"
            if self._system.protocol in ("file", ("file", "local")):  # a bucket's files appear at once and whole
                self._system.pipe_file(temporary, data)
                self._system.mv(temporary, path)
            else:
                self._system.pipe_file(path, data)
            done(len(data))
            if self._max_bytes is not None and next(self._uploads) % _CHECKED_EVERY == 0:
                self._make_room(self._max_bytes)
        except Exception as error:
            self._pause(f"cannot be written ({type(error).__name__}: {error})")

    def _make_room(self, cap: int) -> None:
        files = sorted(self._list().items(), key=lambda item: str(item[1].get("mtime") or item[1].get("LastModified")))
        used = sum(facts["size"] for _, facts in files)
        for name, facts in files:
            if used <= cap * 0.9:
                break
            self._system.rm_file(name)
            used -= facts["size"]
            self.evictions += 1

    def _list(self) -> dict[str, dict[str, Any]]:
        return self._system.glob(f"{self._root}/v{FORMAT_VERSION}-*/*/*/*{SUFFIX}", detail=True)

    def _remove(self, pattern: str) -> int:
        names = self._system.glob(pattern)
        for name in names:
            self._system.rm_file(name)
        return len(names)

    def _pause(self, what: str) -> None:
        self._paused_until = time.monotonic() + PAUSE_SECONDS
        if not self._warned:
            self._warned = True
            logger.warning(
                "the remote store %s %s; it is left alone for %g s at a time", self.url, what, PAUSE_SECONDS
            )
