"""The body of a request while it comes: measured, read whole, or let go by when the request is refused."""

from __future__ import annotations

import asyncio
from contextlib import suppress

from starlette.datastructures import Headers
from starlette.types import Message, Receive, Scope, Send

from .errors import ApiError, error_reply

DRAIN_SECONDS = 1.0  # that a refused client has to send the rest, since most read no answer before


class Incoming:
    """One request's body, read from ``receive``, which nobody else calls before it has ended."""

    def __init__(self, scope: Scope, receive: Receive) -> None:
        self._headers = Headers(scope=scope)
        self._receive = receive
        self._has_ended = False

    async def read(self, most: int) -> bytes | None:
        """The whole body; ``None`` where the client went away.

        Raises:
            ApiError: it is longer than ``most`` bytes, by its header or by what came; the rest is not read.
        """
        announced = self._headers.get("content-length", "")
        if announced.isdecimal() and (len(announced) > 20 or int(announced) > most):
            raise _too_large(most)
        parts, size = [], 0
        while not self._has_ended:
            part = await self._next()
            if part is None:
                return None
            parts.append(part)
            size += len(part)
            if size > most:
                raise _too_large(most)
        return b"".join(parts)

    async def refuse(self, error: ApiError, scope: Scope, send: Send) -> None:
        """Tell the client of ``error``, and end the connection where it does not end its body soon."""
        with suppress(TimeoutError):
            async with asyncio.timeout(DRAIN_SECONDS):
                while not self._has_ended and await self._next() is not None:
                    pass
        reply = error_reply(error)
        if not self._has_ended:
            reply.headers["connection"] = "close"
        await reply(scope, self._receive, send)

    async def until_gone(self) -> None:
        """Return once the client has left."""
        while (await self._receive())["type"] != "http.disconnect":
            pass

    async def _next(self) -> bytes | None:
        message = await self._receive()
        if message["type"] == "http.disconnect":
            return None
        self._has_ended = not message.get("more_body", False)
        return message.get("body", b"")


class Replay:
    """``receive`` of a body that was read already; after it, nothing ever comes."""

    def __init__(self, body: bytes) -> None:
        self._body: bytes | None = body

    async def __call__(self) -> Message:
        body, self._body = self._body, None
        if body is None:
            await asyncio.Event().wait()
        return {"type": "http.request", "body": body, "more_body": False}


def _too_large(most: int) -> ApiError:
    return ApiError(413, f"the body is longer than {most} bytes, which is the most.", "body_too_large")
