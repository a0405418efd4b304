"""Reading an AnswerStream from an event loop: each piece is computed in a worker thread.

Knows only that a stream is an iterator that must not be closed while it computes. No LangChain, no model.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kvfusion_rag import AnswerStream


class StreamReader:
    """Async iterator over the pieces of ``stream``. Close it from any thread, also while a piece is computed."""

    def __init__(self, stream: AnswerStream) -> None:
        self._stream = stream
        self._reading = threading.Lock()
        self._closed = False

    async def __aiter__(self) -> AsyncIterator[str]:
        while (piece := await asyncio.to_thread(self._read)) is not None:
            yield piece

    def close(self) -> None:
        """Stop the stream now, or as soon as the piece being computed is done."""
        self._closed = True
        if self._reading.acquire(blocking=False):
            try:
                self._stream.close()
            finally:
                self._reading.release()

    def _read(self) -> str | None:
        try:
            with self._reading:
                return None if self._closed else next(self._stream, None)
        finally:
            if self._closed:  # close() came while this thread was computing and left the closing to it
                self.close()
