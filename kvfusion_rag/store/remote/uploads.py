"""Background work of a remote store, which may hang: a bounded queue of uploads, and calls with a time limit.

All threads are daemons, so that a process does not wait for them when it exits.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")

MAX_QUEUED, MAX_QUEUED_BYTES = 64, 512 << 20
WORKERS = 4


@dataclass(frozen=True, slots=True)
class Upload:
    """A file to upload.

    Attributes:
        key: store key of the document.
        path: path of the file.
        size: bytes that the upload holds in memory while it waits.
        read: returns the file's contents, or None if they are gone. Called only if the file is not there yet.
        on_stored: called with the size in bytes once the file is stored.
        insists: upload it even while uploads are paused after an error.
    """

    key: str
    path: str
    size: int
    read: Callable[[], bytes | None]
    on_stored: Callable[[int], None]
    insists: bool = False


class UploadQueue:
    """Files that wait for upload or are being uploaded.

    Args:
        write: uploads one file and handles all errors.
    """

    def __init__(self, write: Callable[[Upload], None]) -> None:
        self._write = write
        self._changed = threading.Condition()
        self._queue: deque[Upload] = deque()
        self._workers = self._unfinished = self._unfinished_bytes = self._ended = 0
        self._threads: deque[threading.Thread] = deque(maxlen=WORKERS)  # the latest ones

    def add(self, upload: Upload, patience: float = 0.0) -> bool:
        """Queue a file and return True, or return False if the queue is full.

        Args:
            patience: seconds to wait for room. They begin again whenever an upload ends.
        """
        with self._changed:
            while not self._has_room(upload.size):
                ended = self._ended
                if not self._changed.wait_for(lambda: self._ended != ended, patience):  # noqa: B023
                    return False
            self._queue.append(upload)
            self._unfinished += 1
            self._unfinished_bytes += upload.size
            if self._workers < WORKERS:
                self._workers += 1
                self._threads.append(start_daemon(self._work))
            return True

    def flush(self, timeout: float) -> int:
        """Wait at most ``timeout`` seconds for all uploads. Return the number of unfinished ones."""
        with self._changed:
            self._changed.wait_for(lambda: not self._unfinished, timeout)
            return self._unfinished

    def drain(self, patience: float) -> int:
        """Wait for all uploads as long as one ends every ``patience`` seconds. Return how many are unfinished."""
        with self._changed:
            while self._unfinished:
                ended = self._ended
                if not self._changed.wait_for(lambda: self._ended != ended, patience):  # noqa: B023
                    break
            return self._unfinished

    def cancel(self) -> list[Upload]:
        """Drop the files whose upload has not begun, and return them."""
        with self._changed:
            cancelled = list(self._queue)
            while self._queue:
                self._end(self._queue.popleft())
            return cancelled

    def join(self, timeout: float) -> None:
        """Wait at most ``timeout`` seconds for each thread to end."""
        for thread in list(self._threads):
            thread.join(timeout)

    def _work(self) -> None:
        """Upload files until the queue is empty."""
        while True:
            with self._changed:
                if not self._queue:
                    self._workers -= 1
                    return
                upload = self._queue.popleft()
            self._write(upload)
            with self._changed:
                self._end(upload)

    def _has_room(self, size: int) -> bool:
        is_full = self._unfinished and self._unfinished_bytes + size > MAX_QUEUED_BYTES
        return self._unfinished < MAX_QUEUED and not is_full

    def _end(self, upload: Upload) -> None:
        self._ended += 1
        self._unfinished -= 1
        self._unfinished_bytes -= upload.size
        self._changed.notify_all()


def start_daemon(work: Callable[[], None]) -> threading.Thread:
    """Start ``work`` in a daemon thread."""
    thread = threading.Thread(target=work, name="kvfusion-remote", daemon=True)
    thread.start()
    return thread


def call(work: Callable[[], T], timeout: float) -> T:
    """Return the result of ``work`` or raise its error. Raise TimeoutError if it takes ``timeout`` seconds."""
    result: Future[T] = Future()

    def run() -> None:
        try:
            result.set_result(work())
        except BaseException as error:
            result.set_exception(error)

    start_daemon(run)
    return result.result(timeout)
