"""Limits on requests with a body: how many at once, how large, how long, and until when a client is connected.

A request occupies its slot until its work has ended, even if the client has disconnected or received a timeout.
Otherwise a client that retries could start more work than the limit allows.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack, suppress

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .errors import RETRY_AFTER, ApiError, error_reply
from .incoming import Incoming, Replay
from .options import ServingOptions
from .replies import LAST_EVENT, event

logger = logging.getLogger(__name__)

FINAL_EVENT_TIMEOUT = 5.0  # seconds to deliver the final event of a stream
STOPPING_TIMEOUT = 1.0  # the same, while the server is stopping


class Load:
    """The requests with a body that are in progress, by namespace."""

    def __init__(self) -> None:
        self.total = 0
        self.of_tenant: Counter[str | None] = Counter()

    def add(self, tenant: str | None) -> Callable[[], None]:
        """Count one more request. Return a function that undoes it."""
        self.total += 1
        self.of_tenant[tenant] += 1

        def remove() -> None:
            self.total -= 1
            self.of_tenant[tenant] -= 1

        return remove


class AdmissionControl:
    """ASGI middleware that limits the requests with a body that are in progress at once.

    Requests without a body are not limited.

    Args:
        load: shared with others who need to know how busy the server is.
        max_of_tenant: limit for one namespace.
    """

    def __init__(self, app: ASGIApp, options: ServingOptions, load: Load, max_of_tenant: int) -> None:
        self._app = app
        self._options = options
        self._load, self._max_of_tenant = load, max_of_tenant

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] in ("GET", "HEAD", "OPTIONS"):
            return await self._app(scope, receive, send)
        tenant = scope["state"]["namespace"]
        load, most = self._load, self._options.max_concurrency
        of_server = load.total >= most
        if of_server or load.of_tenant[tenant] >= self._max_of_tenant:
            who, count = ("server", load.total) if of_server else ("tenant", load.of_tenant[tenant])
            error = ApiError(
                429, f"{count} requests of this {who} are in progress, which is the limit; retry later.", "overloaded",
                headers=RETRY_AFTER,
            )  # fmt: skip
            return await Incoming(scope, receive).reject(error, scope, send)
        began = asyncio.get_running_loop().time()
        with ExitStack() as slot:
            slot.callback(load.add(tenant))
            await self._answer(scope, Incoming(scope, receive), send, slot.close)
        logger.info("POST %r took %.2f s", scope["path"], asyncio.get_running_loop().time() - began)

    async def _answer(self, scope: Scope, incoming: Incoming, send: Send, release: Callable[[], None]) -> None:
        began = asyncio.get_running_loop().time()
        response = _Response(send, release)
        try:
            async with asyncio.timeout(self._options.timeout):
                body = await incoming.read(self._options.max_body_bytes, self._options.max_parts)
        except (TimeoutError, ApiError) as error:
            release()  # the rest of the body is discarded, so it needs no slot
            return await incoming.reject(error if isinstance(error, ApiError) else self._timeout(), scope, send)
        except asyncio.CancelledError:
            return await self._end(response, _stopping(), scope, send, STOPPING_TIMEOUT)
        if body is None:
            return
        work = asyncio.ensure_future(self._app(scope, Replay(body), response.send))
        disconnect = asyncio.create_task(incoming.wait_for_disconnect())
        seconds_left = self._options.timeout - (asyncio.get_running_loop().time() - began)
        try:
            await asyncio.wait({work, disconnect}, timeout=max(0.0, seconds_left), return_when=asyncio.FIRST_COMPLETED)
            if not work.done() and not (disconnect.done() and response.is_complete):
                response.close()
                work.cancel()
                if not disconnect.done():
                    await self._end(response, self._timeout(), scope, send, FINAL_EVENT_TIMEOUT)
            await asyncio.wait({work})
        except asyncio.CancelledError:
            response.close()
            await self._end(response, _stopping(), scope, send, STOPPING_TIMEOUT)
        finally:
            disconnect.cancel()
            await _ended(work)
        if response.is_closed or work.cancelled() or (error := work.exception()) is None:
            return
        if response.has_begun or not isinstance(error, Exception):
            raise error
        logger.error("a request failed", exc_info=error)  # raising it would close the connection without a reply
        await error_reply(error)(scope, Replay(b""), send)

    async def _end(self, response: _Response, error: ApiError, scope: Scope, send: Send, seconds: float) -> None:
        """Send the error, in a stream as its last event."""
        with suppress(TimeoutError, asyncio.CancelledError):  # the client does not read
            async with asyncio.timeout(seconds):
                if not response.has_begun:
                    await error_reply(error)(scope, Replay(b""), send)
                elif response.is_stream and not response.is_complete:
                    await send({"type": "http.response.body", "body": event(error.to_dict()) + LAST_EVENT})

    def _timeout(self) -> ApiError:
        return ApiError(504, f"the request took more than {self._options.timeout:g} s and was cancelled.", "timeout")


def _stopping() -> ApiError:
    return ApiError(503, "the server is stopping.", "stopping", headers=RETRY_AFTER)


async def _ended(work: asyncio.Future[None]) -> None:
    """Cancel ``work`` and wait until it ends, even if the waiting task is cancelled too.

    A request stays in progress until then.
    """
    while not work.done():
        work.cancel()
        with suppress(asyncio.CancelledError):
            await asyncio.wait({work})


class _Response:
    """The state of a response. Once it is closed, nothing more is sent.

    Args:
        on_end: called before the end of the response is sent, so that a client can send its next request at once.
    """

    def __init__(self, send: Send, on_end: Callable[[], None]) -> None:
        self._send, self._on_end = send, on_end
        self.is_closed = False
        self.has_begun = self.is_stream = self.is_complete = False

    async def send(self, message: Message) -> None:
        if self.is_closed:
            return
        if message["type"] == "http.response.start":
            self.has_begun = True
            self.is_stream = Headers(raw=message["headers"]).get("content-type", "").startswith("text/event-stream")
        elif not message.get("more_body", False):
            self.is_complete = True
            self._on_end()
        await self._send(message)

    def close(self) -> None:
        self.is_closed = True
