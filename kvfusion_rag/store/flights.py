"""One prefill a document, however many threads ask: who brings which, and what the others wait for."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from concurrent.futures import Future

from ..model.kv import DocumentKV

Flight = Future[DocumentKV | None]  # ``None``: it was not brought, and whoever waited tries for itself


class Flights:
    """The documents that threads of this process are bringing at the moment, by key."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._under_way: dict[str, Flight] = {}

    def claim(self, keys: Iterable[str]) -> tuple[list[str], dict[str, Flight]]:
        """The keys that the caller is to bring from now on, and those that another one is bringing.

        Whoever claims a key lands or abandons it, whatever happens.
        """
        mine: list[str] = []
        others: dict[str, Flight] = {}
        with self._lock:
            for key in keys:
                flight = self._under_way.get(key)
                if flight is None:
                    self._under_way[key] = Future()
                    mine.append(key)
                else:
                    others[key] = flight
        return mine, others

    def land(self, key: str, document: DocumentKV) -> None:
        """Hand ``document`` to all who wait for it."""
        with self._lock:
            flight = self._under_way.pop(key, None)
        if flight is not None:
            flight.set_result(document)

    def abandon(self, keys: Iterable[str]) -> None:
        """Let others try for themselves what has not landed."""
        with self._lock:
            left = [flight for key in keys if (flight := self._under_way.pop(key, None)) is not None]
        for flight in left:
            flight.set_result(None)
