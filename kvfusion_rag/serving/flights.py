"""Requests under way: how many at once, how long, how large, and given up once nobody waits for them.

ASGI middleware for requests with a body. A request has its place until its work has really ended, also when its
client has gone or was told that it took too long: whoever comes back at once finds no more room than there is.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .errors import RETRY_AFTER, ApiError, error_reply
from .options import ServingOptions
from .replies import event

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
            return await error_reply(error)(scope, receive, send)
        self._under_way += 1
        try:
            await self._answer(scope, receive, send)
        finally:
            self._under_way -= 1

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        began = asyncio.get_running_loop().time()
        try:
            async with asyncio.timeout(self._options.timeout):
                body = await _read_body(Headers(scope=scope), receive, self._options.max_body_bytes)
        except TimeoutError:
            return await error_reply(self._too_late())(scope, receive, send)
        except ApiError as error:
            return await error_reply(error)(scope, receive, send)
        if body is None:
            return
        response = _Response(send)
        work = asyncio.ensure_future(self._app(scope, _Replay(body), response.send))
        gone = asyncio.create_task(_until_gone(receive))
        left = self._options.timeout - (asyncio.get_running_loop().time() - began)
        try:
            await asyncio.wait({work, gone}, timeout=max(0.0, left), return_when=asyncio.FIRST_COMPLETED)
            if not work.done() and not response.is_whole:
                response.close()
                work.cancel()
                if not gone.done():
                    await self._say_too_late(response, scope, receive, send)
            await asyncio.wait({work})
        finally:  # the server itself may be stopping
            gone.cancel()
            if not work.done():
                work.cancel()
                await asyncio.wait({work})
        if not work.cancelled():
            work.result()  # raises what the app raised

    async def _say_too_late(self, response: _Response, scope: Scope, receive: Receive, send: Send) -> None:
        error = self._too_late()
        with suppress(TimeoutError):  # a client that reads nothing is left
            async with asyncio.timeout(LAST_WORDS):
                if not response.has_begun:
                    await error_reply(error)(scope, receive, send)
                elif response.is_stream:
                    await send({"type": "http.response.body", "body": event(error.to_dict())})

    def _too_late(self) -> ApiError:
        return ApiError(504, f"the request took longer than {self._options.timeout:g} s and was given up.", "timeout")


class _Response:
    """What was sent of a response; once closed, nothing more is."""

    def __init__(self, send: Send) -> None:
        self._send = send
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
        await self._send(message)

    def close(self) -> None:
        self._closed = True


class _Replay:
    """``receive`` of a body that was read already; after it, nothing ever comes."""

    def __init__(self, body: bytes) -> None:
        self._body: bytes | None = body

    async def __call__(self) -> Message:
        body, self._body = self._body, None
        if body is None:
            await asyncio.Event().wait()
        return {"type": "http.request", "body": body, "more_body": False}


async def _read_body(headers: Headers, receive: Receive, most: int) -> bytes | None:
    """A whole body; ``None`` where the client went away.

    Raises:
        ApiError: it is longer than ``most`` bytes, by its header or by what came; the rest is not read.
    """
    announced = headers.get("content-length", "")
    if announced.isdecimal() and (len(announced) > 20 or int(announced) > most):
        raise _too_large(most)
    parts, size = [], 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        parts.append(message.get("body", b""))
        size += len(parts[-1])
        if size > most:
            raise _too_large(most)
        if not message.get("more_body", False):
            return b"".join(parts)


def _too_large(most: int) -> ApiError:
    return ApiError(413, f"the body is longer than {most} bytes, which is the most.", "body_too_large")


async def _until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
