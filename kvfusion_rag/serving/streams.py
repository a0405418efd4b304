"""Streams of answers over HTTP: each piece is computed in a worker thread, and sent as a server-sent event.

A stream must not be closed while it computes, so whoever is cancelled waits for the piece that is being computed.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing, suppress
from functools import partial
from typing import Any, TypeVar

from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from ..engine.streaming import AnswerStream
from ..generator import KVFusionGenerator
from .errors import as_api_error, is_own_fault
from .replies import LAST_EVENT, Completion, event

logger = logging.getLogger(__name__)
T = TypeVar("T")


async def in_thread(function: Callable[..., T], *args: Any) -> T:
    """As ``asyncio.to_thread``, but when it is cancelled it ends no earlier than the thread's work."""
    work = asyncio.ensure_future(asyncio.to_thread(function, *args))
    try:
        return await asyncio.shield(work)
    except asyncio.CancelledError:
        while not work.done():  # a second cancellation changes nothing: the thread's work cannot be stopped
            with suppress(asyncio.CancelledError):
                await asyncio.wait({work})
        if not work.cancelled():
            work.exception()  # seen: nobody is left to tell
        raise


class EventStream(StreamingResponse):
    """Sends ``events`` as they come and closes their ``stream`` with the response, however that ends."""

    def __init__(self, events: AsyncGenerator[bytes, None], stream: AnswerStream) -> None:
        headers = {"cache-control": "no-store", "x-accel-buffering": "no"}  # proxies pass each event on at once
        super().__init__(events, media_type="text/event-stream", headers=headers)
        self._events, self._stream = events, stream

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            async with aclosing(self._events):
                await self.stream_response(send)
        finally:  # events that were never begun end nothing
            self._stream.close()


async def answer_events(
    generator: KVFusionGenerator, arguments: dict[str, Any], *, include_usage: bool
) -> EventStream:
    """The response that streams one answer.

    Its first piece is known before the response begins, so that what is wrong until then has a status of its own.

    Raises:
        KVFusionError: as ``KVFusionGenerator.stream`` and its first step.
    """
    stream = await in_thread(partial(generator.stream, **arguments))
    try:
        first = await in_thread(_next_piece, stream)
    except BaseException:  # it was cancelled, too
        stream.close()
        raise
    return EventStream(_events(stream, first, Completion(generator.model_id), include_usage), stream)


def _next_piece(stream: AnswerStream) -> str | None:
    return next(stream, None)


async def _events(
    stream: AnswerStream, piece: str | None, completion: Completion, include_usage: bool
) -> AsyncGenerator[bytes, None]:
    try:
        yield event(completion.first())
        while piece is not None:
            yield event(completion.piece(piece))
            piece = await in_thread(_next_piece, stream)
        assert stream.answer is not None  # it is exhausted
        yield event(completion.last(stream.answer))
        if include_usage:
            yield event(completion.usage(stream.answer))
        yield LAST_EVENT
    except Exception as error:
        if is_own_fault(error):
            logger.exception("a stream ended early")
        yield event(as_api_error(error).to_dict())
