"""Compute each document once: the first thread that asks for a key computes it, and the others wait for the result."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from concurrent.futures import Future

from ..model.kv import DocumentKV

Pending = Future[DocumentKV | None]  # None if the document was released without a result: try again


class SingleFlight:
    """The keys that threads of this process are fetching right now."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._pending: dict[str, Pending] = {}

    def claim(self, keys: Iterable[str]) -> tuple[list[str], dict[str, Pending]]:
        """Divide ``keys`` into those that the caller must fetch now and those that another thread is fetching.

        The caller must resolve or release every claimed key, even after an error.
        """
        claimed: list[str] = []
        pending: dict[str, Pending] = {}
        with self._lock:
            for key in keys:
                if key in self._pending:
                    pending[key] = self._pending[key]
                else:
                    self._pending[key] = Future()
                    claimed.append(key)
        return claimed, pending

    def resolve(self, key: str, document: DocumentKV) -> None:
        """Pass ``document`` to all threads that wait for ``key``."""
        self._end(key, document)

    def release(self, keys: Iterable[str]) -> None:
        """Give up the keys that are not resolved, so that waiting threads fetch them themselves."""
        for key in keys:
            self._end(key, None)

    def _end(self, key: str, document: DocumentKV | None) -> None:
        with self._lock:
            pending = self._pending.pop(key, None)
        if pending is not None:
            pending.set_result(document)
