"""An answer as a stream of pieces, that may be read and closed in different threads."""

from __future__ import annotations

import threading
from collections.abc import Generator, Iterator
from typing import Self

from ..schema import Answer


class AnswerStream(Iterator[str]):
    """Pieces of one answer as they become certain; joined they are ``answer.text``.

    ``answer`` is ``None`` until the stream is exhausted. Closing it early stops decoding, also from another thread.
    """

    def __init__(self, pieces: Generator[str | Answer, None, None], cancelled: threading.Event) -> None:
        self._pieces, self._cancelled = pieces, cancelled
        self._lock = threading.RLock()  # of the generator, which one thread alone may run
        self.answer: Answer | None = None

    def __next__(self) -> str:
        with self._lock:
            for piece in self._pieces:
                if isinstance(piece, str):
                    return piece
                self.answer = piece
        raise StopIteration

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop decoding and let its memory go; waits for the token that another thread may be decoding."""
        self._cancelled.set()
        with self._lock:
            self._pieces.close()
