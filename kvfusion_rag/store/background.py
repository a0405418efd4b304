"""Background work of a remote store, which may hang: a bounded queue of uploads, and calls with a time limit.

All threads are daemons, so that a process does not wait for them when it exits.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import NamedTuple, TypeVar

T = TypeVar("T")

MAX_QUEUED, MAX_QUEUED_BYTES = 64, 512 << 20
WORKERS = 4


class Upload(NamedTuple):
    """A file to upload.

    Attributes:
        path: path of the file.
        data: contents of the file.
        on_stored: called with the size in bytes once the file is stored.
    """

    path: str
    data: bytes
    on_stored: Callable[[int], None]


class UploadQueue:
    """Files that wait for upload or are being uploaded.

    Args:
        write: uploads one file and handles all errors.
    """

    def __init__(self, write: Callable[[Upload], None]) -> None:
        self._write = write
        self._changed = threading.Condition()
        self._queue: deque[Upload] = deque()
        self._workers = self._unfinished = self._unfinished_bytes = 0
        self._threads: deque[threading.Thread] = deque(maxlen=WORKERS)  # the latest ones

    def add(self, upload: Upload) -> bool:
        """Queue a file and return True, or return False if the queue is full."""
        with self._changed:
            size = self._unfinished_bytes + len(upload.data)
            if self._unfinished == MAX_QUEUED or (self._unfinished and size > MAX_QUEUED_BYTES):
                return False
            self._queue.append(upload)
            self._unfinished += 1
            self._unfinished_bytes = size
            if self._workers < WORKERS:
                self._workers += 1
                self._threads.append(start_daemon(self._work))
            return True

    def flush(self, timeout: float) -> bool:
        """Wait at most ``timeout`` seconds for all uploads. Return whether all have ended."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._unfinished, timeout)

    def cancel(self) -> int:
        """Drop the files whose upload has not begun. Return their number."""
        with self._changed:
            cancelled = len(self._queue)
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

    def _end(self, upload: Upload) -> None:
        self._unfinished -= 1
        self._unfinished_bytes -= len(upload.data)
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
