"""Reads the body of a request up to a limit, or discards it when the request is rejected."""

from __future__ import annotations

import asyncio
from contextlib import suppress

from starlette.datastructures import Headers
from starlette.types import Message, Receive, Scope, Send

from .errors import ApiError, error_reply

DRAIN_SECONDS = 1.0  # most clients read a reply only after they have sent their whole body


class Incoming:
    """The body of one request. Nothing else may call ``receive`` before the body has ended."""

    def __init__(self, scope: Scope, receive: Receive) -> None:
        self._headers = Headers(scope=scope)
        self._receive = receive
        self._has_ended = False

    async def read(self, max_bytes: int) -> bytes | None:
        """Return the whole body, or ``None`` if the client has disconnected.

        Raises:
            ApiError: the body, or its content-length header, is longer than ``max_bytes``. The rest is not read.
        """
        length = self._headers.get("content-length", "")
        if length.isdecimal() and (len(length) > 20 or int(length) > max_bytes):
            raise _too_large(max_bytes)
        parts, size = [], 0
        while not self._has_ended:
            part = await self._next()
            if part is None:
                return None
            parts.append(part)
            size += len(part)
            if size > max_bytes:
                raise _too_large(max_bytes)
        return b"".join(parts)

    async def reject(self, error: ApiError, scope: Scope, send: Send) -> None:
        """Send ``error`` to the client. Closes the connection if its body does not end soon."""
        with suppress(TimeoutError):
            async with asyncio.timeout(DRAIN_SECONDS):
                while not self._has_ended and await self._next() is not None:
                    pass
        reply = error_reply(error)
        if not self._has_ended:
            reply.headers["connection"] = "close"
        await reply(scope, self._receive, send)

    async def wait_for_disconnect(self) -> None:
        """Return when the client has disconnected or the response has been sent."""
        while (await self._receive())["type"] != "http.disconnect":
            pass

    async def _next(self) -> bytes | None:
        message = await self._receive()
        if message["type"] == "http.disconnect":
            return None
        self._has_ended = not message.get("more_body", False)
        return message.get("body", b"")


class Replay:
    """An ASGI ``receive`` that returns a body read earlier, and then waits forever."""

    def __init__(self, body: bytes) -> None:
        self._body: bytes | None = body

    async def __call__(self) -> Message:
        body, self._body = self._body, None
        if body is None:
            await asyncio.Event().wait()
        return {"type": "http.request", "body": body, "more_body": False}


def _too_large(max_bytes: int) -> ApiError:
    return ApiError(413, f"the body is longer than {max_bytes} bytes, the limit of this server.", "body_too_large")
