"""Limits on requests with a body: how many at once, how large, how long, and until when a client is connected.

A request occupies its slot until its work has ended, even if the client has disconnected or received a timeout.
Otherwise a client that retries could start more work than the limit allows.
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

FINAL_EVENT_TIMEOUT = 5.0  # seconds to deliver the final event of a stream


class AdmissionControl:
    """ASGI middleware that allows at most ``max_concurrency`` requests with a body at once.

    Requests without a body are not limited.
    """

    def __init__(self, app: ASGIApp, options: ServingOptions) -> None:
        self._app = app
        self._options = options
        self._running = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] in ("GET", "HEAD", "OPTIONS"):
            return await self._app(scope, receive, send)
        if self._running >= self._options.max_concurrency:
            error = ApiError(
                429,
                f"the server is already answering {self._running} requests, its limit; retry later.",
                "overloaded",
                headers=RETRY_AFTER,
            )
            return await Incoming(scope, receive).reject(error, scope, send)
        self._running += 1
        with ExitStack() as slot:
            slot.callback(self._release)
            await self._answer(scope, Incoming(scope, receive), send, slot.close)

    def _release(self) -> None:
        self._running -= 1

    async def _answer(self, scope: Scope, incoming: Incoming, send: Send, release: Callable[[], None]) -> None:
        began = asyncio.get_running_loop().time()
        try:
            async with asyncio.timeout(self._options.timeout):
                body = await incoming.read(self._options.max_body_bytes)
        except (TimeoutError, ApiError) as error:
            release()  # the rest of the body is discarded, so it needs no slot
            return await incoming.reject(error if isinstance(error, ApiError) else self._timeout(), scope, send)
        if body is None:
            return
        response = _Response(send, release)
        work = asyncio.ensure_future(self._app(scope, Replay(body), response.send))
        disconnect = asyncio.create_task(incoming.wait_for_disconnect())
        seconds_left = self._options.timeout - (asyncio.get_running_loop().time() - began)
        try:
            await asyncio.wait({work, disconnect}, timeout=max(0.0, seconds_left), return_when=asyncio.FIRST_COMPLETED)
            if not work.done() and not (disconnect.done() and response.is_complete):
                response.close()
                work.cancel()
                if not disconnect.done():
                    await self._send_timeout(response, scope, send)
            await asyncio.wait({work})
        finally:  # also reached when the server stops
            disconnect.cancel()
            if not work.done():
                work.cancel()
                await asyncio.wait({work})
        if work.cancelled() or (error := work.exception()) is None:
            return
        if response.has_begun or not isinstance(error, Exception):
            raise error
        logger.error("a request failed", exc_info=error)  # raising it would close the connection without a reply
        await error_reply(error)(scope, Replay(b""), send)

    async def _send_timeout(self, response: _Response, scope: Scope, send: Send) -> None:
        error = self._timeout()
        with suppress(TimeoutError):  # the client does not read
            async with asyncio.timeout(FINAL_EVENT_TIMEOUT):
                if not response.has_begun:
                    await error_reply(error)(scope, Replay(b""), send)
                elif response.is_stream and not response.is_complete:
                    await send({"type": "http.response.body", "body": event(error.to_dict())})

    def _timeout(self) -> ApiError:
        return ApiError(504, f"the request took more than {self._options.timeout:g} s and was cancelled.", "timeout")


class _Response:
    """The state of a response. Once it is closed, nothing more is sent.

    Args:
        on_end: called before the end of the response is sent, so that a client can send its next request at once.
    """

    def __init__(self, send: Send, on_end: Callable[[], None]) -> None:
        self._send, self._on_end = send, on_end
        self._closed = False
        self.has_begun = self.is_stream = self.is_complete = False

    async def send(self, message: Message) -> None:
        if self._closed:
            return
        if message["type"] == "http.response.start":
            self.has_begun = True
            self.is_stream = Headers(raw=message["headers"]).get("content-type", "").startswith("text/event-stream")
        elif not message.get("more_body", False):
            self.is_complete = True
            self._on_end()
        await self._send(message)

    def close(self) -> None:
        self._closed = True
