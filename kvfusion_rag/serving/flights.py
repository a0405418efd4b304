"""Requests under way: how many at once, how long, how large, and given up once nobody waits for them.

ASGI middleware for requests with a body. A request has its place until its work has really ended, also when its
client has gone or was told that it took too long: whoever comes back at once finds no more room than there is.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from contextlib import ExitStack, suppress

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .errors import RETRY_AFTER, ApiError, error_reply
from .incoming import Incoming, Replay
from .options import ServingOptions
from .replies import event

logger = logging.getLogger(__name__)

LAST_WORDS = 5.0  # seconds that a client has to take the news of a stream's end


class Flights:
    """Answers at most ``max_concurrency`` requests with a body at once; all others pass by."""

    def __init__(self, app: ASGIApp, options: ServingOptions) -> None:
        self._app = app
        self._options = options
        self._under_way = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] in ("GET", "HEAD", "OPTIONS"):
            return await self._app(scope, receive, send)
        if self._under_way >= self._options.max_concurrency:
            error = ApiError(
                429,
                f"{self._under_way} requests are being answered already, which is the most; ask again later.",
                "overloaded",
                headers=RETRY_AFTER,
            )
            return await Incoming(scope, receive).refuse(error, scope, send)
        self._under_way += 1
        with ExitStack() as place:
            place.callback(self._leave)
            await self._answer(scope, Incoming(scope, receive), send, place.close)

    def _leave(self) -> None:
        self._under_way -= 1

    async def _answer(self, scope: Scope, incoming: Incoming, send: Send, leave: Callable[[], None]) -> None:
        began = asyncio.get_running_loop().time()
        try:
            async with asyncio.timeout(self._options.timeout):
                body = await incoming.read(self._options.max_body_bytes)
        except (TimeoutError, ApiError) as error:
            leave()  # nothing is kept of what is still to come
            return await incoming.refuse(error if isinstance(error, ApiError) else self._too_late(), scope, send)
        if body is None:
            return
        response = _Response(send, leave)
        work = asyncio.ensure_future(self._app(scope, Replay(body), response.send))
        gone = asyncio.create_task(incoming.until_gone())
        left = self._options.timeout - (asyncio.get_running_loop().time() - began)
        try:
            await asyncio.wait({work, gone}, timeout=max(0.0, left), return_when=asyncio.FIRST_COMPLETED)
            if not work.done() and not (gone.done() and response.is_whole):  # the end of a response ends both
                response.close()
                work.cancel()
                if not gone.done():
                    await self._say_too_late(response, scope, send)
            await asyncio.wait({work})
        finally:  # the server itself may be stopping
            gone.cancel()
            if not work.done():
                work.cancel()
                await asyncio.wait({work})
        if work.cancelled() or (error := work.exception()) is None:
            return
        if response.has_begun or not isinstance(error, Exception):
            raise error
        logger.error("a request failed", exc_info=error)  # raised any further, it would end the connection
        await error_reply(error)(scope, Replay(b""), send)

    async def _say_too_late(self, response: _Response, scope: Scope, send: Send) -> None:
        error = self._too_late()
        with suppress(TimeoutError):  # a client that reads nothing is left
            async with asyncio.timeout(LAST_WORDS):
                if not response.has_begun:
                    await error_reply(error)(scope, Replay(b""), send)
                elif response.is_stream and not response.is_whole:
                    await send({"type": "http.response.body", "body": event(error.to_dict())})

    def _too_late(self) -> ApiError:
        return ApiError(504, f"the request took longer than {self._options.timeout:g} s and was given up.", "timeout")


class _Response:
    """What was sent of a response; once closed, nothing more is.

    Args:
        on_end: called before its end is sent, so that a client that asks again at once finds a place.
    """

    def __init__(self, send: Send, on_end: Callable[[], None]) -> None:
        self._send, self._on_end = send, on_end
        self._closed = False
        self.has_begun = self.is_stream = self.is_whole = False

    async def send(self, message: Message) -> None:
        if self._closed:
            return
        if message["type"] == "http.response.start":
            self.has_begun = True
            self.is_stream = Headers(raw=message["headers"]).get("content-type", "").startswith("text/event-stream")
        elif not message.get("more_body", False):
            self.is_whole = True
            self._on_end()
        await self._send(message)

    def close(self) -> None:
        self._closed = True
