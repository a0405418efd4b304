"""Reads the body of a request up to its limits, or discards it when the request is rejected."""

from __future__ import annotations

import asyncio
import re
from contextlib import suppress

from starlette.datastructures import Headers
from starlette.types import Message, Receive, Scope, Send

from .errors import ApiError, error_reply

DRAIN_SECONDS = 1.0  # most clients read a reply only after they have sent their whole body

_STRING = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"?', re.DOTALL)  # also one that does not end, so time is linear


class Incoming:
    """The body of one request. Nothing else may call ``receive`` before the body has ended."""

    def __init__(self, scope: Scope, receive: Receive) -> None:
        self._headers = Headers(scope=scope)
        self._receive = receive
        self._has_ended = False

    async def read(self, max_bytes: int, max_parts: int) -> bytes | None:
        """Return the whole body, or ``None`` if the client has disconnected.

        Args:
            max_bytes: limit on the body.
            max_parts: limit on the strings, list items, fields and objects of its JSON together. Each takes much more
                memory and time than its bytes.

        Raises:
            ApiError: the body, or its content-length header, exceeds a limit. The rest is not read.
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
        body = b"".join(parts)
        if has_more_parts(body, max_parts):
            raise ApiError(
                400,
                f"the body has more than {max_parts} strings, list items, fields and objects, which is the limit of "
                "this server; send fewer documents or less metadata.",
                "body_too_complex",
            )
        return body

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


def has_more_parts(body: bytes, limit: int) -> bool:
    """Return whether JSON has more than ``limit`` strings, commas and openings of objects and lists.

    It is counted without parsing the JSON, in time that grows in step with its length.
    """
    if sum(body.count(sign) for sign in (b'"', b",", b"[", b"{")) <= limit:
        return False
    count = at = 0
    for string in _STRING.finditer(body):
        count += 1 + sum(body.count(sign, at, string.start()) for sign in (b",", b"[", b"{"))
        if count > limit:
            return True
        at = string.end()
    return count + sum(body.count(sign, at) for sign in (b",", b"[", b"{")) > limit


def _too_large(max_bytes: int) -> ApiError:
    return ApiError(413, f"the body is longer than this server's limit of {max_bytes} bytes.", "body_too_large")
