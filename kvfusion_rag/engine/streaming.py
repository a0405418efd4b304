"""One answer as a stream of pieces, for threads and for event loops."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Generator, Iterator
from typing import Self

from ..schema import Answer, AnswerPiece


class AnswerStream(Iterator[str], AsyncIterator[str]):
    """Iterate over the pieces of one answer with ``for`` or ``async for``. Joined, they are ``answer.text``.

    ``pieces`` iterates over the pieces of the reasoning and of calls of tools too. ``answer`` is ``None`` until the
    stream is exhausted. Different threads may read and close a stream. Use it as a context manager, or close it, to
    stop decoding early.
    """

    def __init__(self, pieces: Generator[AnswerPiece | Answer, None, None], cancelled: threading.Event) -> None:
        self._pieces, self._cancelled = pieces, cancelled
        self._lock = threading.RLock()  # only one thread at a time may run the generator
        self.answer: Answer | None = None

    @property
    def pieces(self) -> AnswerPieces:
        """The rest of the stream, with each piece marked as part of the reasoning, the answer or a call."""
        return AnswerPieces(self._next_piece, self._anext_piece)

    def __next__(self) -> str:
        return next(piece.text for piece in self.pieces if _is_text(piece))

    async def __anext__(self) -> str:
        """Compute the next piece in a worker thread. Cancelling the task that waits for it closes the stream."""
        async for piece in self.pieces:
            if _is_text(piece):
                return piece.text
        raise StopAsyncIteration

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.aclose()

    def close(self) -> None:
        """Stop decoding and release its memory. Waits for the token that another thread may be decoding."""
        self._cancelled.set()
        with self._lock:
            self._pieces.close()

    async def aclose(self) -> None:
        """Stop decoding without waiting: if a thread is computing a piece, it releases the memory afterwards."""
        self._cancelled.set()
        if self._lock.acquire(blocking=False):
            try:
                self._pieces.close()
            finally:
                self._lock.release()

    def _next_piece(self) -> AnswerPiece | None:
        with self._lock:
            for piece in self._pieces:
                if isinstance(piece, AnswerPiece):
                    return piece
                self.answer = piece
        return None

    async def _anext_piece(self) -> AnswerPiece | None:
        try:
            return await asyncio.to_thread(self._next_unless_closed)
        except asyncio.CancelledError:
            await self.aclose()  # the piece is lost, so the rest must not be read as if it were there
            raise

    def _next_unless_closed(self) -> AnswerPiece | None:
        try:
            return self._next_piece()
        finally:
            if self._cancelled.is_set():  # aclose was called while this thread held the lock
                self.close()


def _is_text(piece: AnswerPiece) -> bool:
    return not piece.is_reasoning and piece.call_index is None


class AnswerPieces(Iterator[AnswerPiece], AsyncIterator[AnswerPiece]):
    """The pieces of a stream; see ``AnswerStream.pieces``."""

    def __init__(
        self, read: Callable[[], AnswerPiece | None], aread: Callable[[], Awaitable[AnswerPiece | None]]
    ) -> None:
        self._read, self._aread = read, aread

    def __next__(self) -> AnswerPiece:
        if (piece := self._read()) is None:
            raise StopIteration
        return piece

    async def __anext__(self) -> AnswerPiece:
        if (piece := await self._aread()) is None:
            raise StopAsyncIteration
        return piece
