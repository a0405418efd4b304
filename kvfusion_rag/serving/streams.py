"""Streamed answers: each piece of an answer becomes one server-sent event."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable, Iterable
from concurrent.futures import Executor
from contextlib import aclosing, suppress
from functools import partial
from typing import Any, Protocol, TypeVar

from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from ..engine.streaming import AnswerStream
from ..generator import KVFusionGenerator
from ..schema import Answer, AnswerPiece
from .errors import as_api_error, is_server_error
from .replies import LAST_EVENT, event

logger = logging.getLogger(__name__)
T = TypeVar("T")


async def in_thread(function: Callable[..., T], *args: Any, pool: Executor | None = None) -> T:
    """Call ``function`` in a thread of ``pool`` or of the event loop. A cancelled call still waits for its end.

    A request must occupy its slot until its work has ended.
    """
    work = asyncio.get_running_loop().run_in_executor(pool, partial(function, *args))
    try:
        return await asyncio.shield(work)
    except asyncio.CancelledError:
        while not work.done():  # the thread cannot be stopped, so further cancellations must wait too
            with suppress(asyncio.CancelledError):
                await asyncio.wait({work})
        if not work.cancelled():
            work.exception()  # mark it as retrieved, so that asyncio does not log it
        raise


class Chunks(Protocol):
    """The JSON objects of which a streamed answer consists."""

    def first(self) -> dict[str, Any]:
        """Return the object before the first piece."""
        ...

    def piece(self, piece: AnswerPiece) -> dict[str, Any]:
        """Return the object of one piece."""
        ...

    def last(self, answer: Answer) -> Iterable[dict[str, Any]]:
        """Return the objects after the last piece."""
        ...


class EventStream(StreamingResponse):
    """A response that sends ``events`` and closes ``stream`` when it ends or fails."""

    def __init__(self, events: AsyncGenerator[bytes, None], stream: AnswerStream) -> None:
        headers = {"cache-control": "no-store", "x-accel-buffering": "no"}  # proxies must not buffer events
        super().__init__(events, media_type="text/event-stream", headers=headers)
        self._events, self._stream = events, stream

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            async with aclosing(self._events):
                await self.stream_response(send)
        finally:
            await in_thread(self._stream.close)


async def answer_events(generator: KVFusionGenerator, arguments: dict[str, Any], chunks: Chunks) -> EventStream:
    """Return the response that streams one answer in the objects of ``chunks``.

    The first piece is computed before the response begins, so that an error until then gets its own HTTP status.

    Raises:
        KVFusionError: see ``KVFusionGenerator.stream``.
    """
    stream = await in_thread(partial(generator.stream, **arguments))
    try:
        first = await anext(stream.pieces, None)
    except BaseException:  # including cancellation
        await in_thread(stream.close)
        raise
    return EventStream(_events(stream, first, chunks), stream)


async def _events(stream: AnswerStream, piece: AnswerPiece | None, chunks: Chunks) -> AsyncGenerator[bytes, None]:
    try:
        yield event(chunks.first())
        while piece is not None:
            yield event(chunks.piece(piece))
            piece = await anext(stream.pieces, None)
        assert stream.answer is not None  # the stream is exhausted
        for data in chunks.last(stream.answer):
            yield event(data)
        yield LAST_EVENT
    except Exception as error:
        if is_server_error(error):
            logger.exception("a stream failed")
        yield event(as_api_error(error).to_dict())
        yield LAST_EVENT
