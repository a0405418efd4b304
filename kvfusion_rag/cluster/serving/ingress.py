"""The ingress: checks access and limits like the single server, and forwards each request to a replica."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Protocol

from fastapi import FastAPI, Response
from starlette.datastructures import Headers
from starlette.routing import Route
from starlette.types import Message, Receive, Scope, Send

from ...errors import ClusterError
from ...serving import Access, ServingOptions
from ...serving.admission import Load
from ...serving.app import add_limits, add_origins, new_app
from ...serving.errors import RETRY_AFTER, ApiError, Reply
from ...serving.replies import LAST_EVENT, event
from .replica import Forwarded

if TYPE_CHECKING:
    from .metrics import Family

logger = logging.getLogger(__name__)

FORGET = "/v1/documents/forget"
ATTEMPTS = 3  # a request that kills replicas must not kill all of them


class ReplicaLostError(ClusterError):
    """A replica stopped while it was answering."""


class Replicas(Protocol):
    """All replicas of a server."""

    def respond(self, request: Forwarded, session: str) -> AsyncGenerator[Message, None]:
        """Yield the response of a replica. Requests of one session reach the same replica as long as it runs.

        Raises:
            ReplicaLostError: the replica ended. Another one may answer.
        """
        ...

    async def reply_everywhere(self, request: Forwarded) -> list[list[Message]]:
        """Return the whole response of every replica.

        Raises:
            ReplicaLostError: no replica runs, or one did not answer.
        """
        ...

    async def metrics(self) -> Mapping[str, Sequence[Family]]:
        """Return the metrics of all replicas that answer, by id.

        Raises:
            ReplicaLostError: no replica runs.
        """
        ...


def create_ingress(
    model: dict[str, Any],
    schema: dict[str, Any],
    replicas: Replicas,
    *,
    access: Access,
    options: ServingOptions,
    most_replicas: int,
) -> FastAPI:
    """Create an ASGI app with the API of ``serving.create_app`` that forwards the work to replicas.

    Args:
        model: shown by the pages, see :meth:`Replica.facts`. A later change of the mapping is shown too.
        schema: OpenAPI document of the single server. All its paths with a body are forwarded.
        replicas: receive the requests that have access and are within the limits.
        access: which clients may send requests.
        options: limits; ``max_concurrency`` is that of one replica.
        most_replicas: the ingress admits as many requests as this number of replicas can take.
    """
    app = new_app(model, options)
    app.openapi = lambda: schema
    forward = Forward(replicas)
    for path, operations in schema["paths"].items():
        if "post" in operations:
            app.router.routes.append(Route(path, forward, methods=["POST"]))
    limits = replace(options, max_concurrency=options.max_concurrency * most_replicas)
    add_limits(app, access, limits, Load())
    if options.metrics:
        _add_metrics(app, replicas)
    add_origins(app, access)
    return app


def session_of(request: Forwarded) -> str:
    """Return what requests with the same documents share, or "" for a request without documents.

    It is the smallest hash of a document, so that requests with many common documents often share it too, whatever
    the order.
    """
    try:
        documents = json.loads(request.body)["documents"]
        texts = [one if isinstance(one, str) else one["text"] for one in documents]
        smallest = min(hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest() for text in texts)
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):  # the replica answers with the error
        return ""
    return f"{request.namespace or ''}/{smallest}"


class Forward:
    """ASGI app that sends a request to its replica, and to another one if that ends before the first piece."""

    def __init__(self, replicas: Replicas) -> None:
        self._replicas = replicas

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        body = (await receive())["body"]  # whole, because AdmissionControl has read it
        content_type = Headers(scope=scope).get("content-type", "")
        request = Forwarded(scope["path"], content_type, body, scope["state"]["namespace"])
        if request.path == FORGET:
            await (await self._forget(request))(scope, receive, send)
            return
        session = session_of(request)
        for attempt in range(1, ATTEMPTS + 1):
            response = _Response(send)
            try:
                async with aclosing(self._replicas.respond(request, session)) as messages:
                    async for message in messages:
                        await response.forward(message)
                return
            except ReplicaLostError as error:
                logger.warning("attempt %d of a request failed: %s", attempt, error)
                if response.has_begun:
                    return await response.end_early()
        raise _lost()

    async def _forget(self, request: Forwarded) -> Response:
        """Remove documents from every replica, since any of them can have copies."""
        try:
            responses = await self._replicas.reply_everywhere(request)
        except ReplicaLostError as error:
            logger.warning("documents were not removed from every replica: %s", error)
            raise _lost() from error
        replies = [_whole(messages) for messages in responses]
        failed = [reply for reply in replies if reply.status_code != 200]
        if failed:
            return failed[0]
        removed = sum(json.loads(bytes(reply.body))["removed"] for reply in replies)
        return Reply(json.loads(bytes(replies[0].body)) | {"removed": removed})


class _Response:
    """A response that begins with its first piece, so that another replica can answer until then."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self._start: Message | None = None
        self._is_stream = False
        self.has_begun = False

    async def forward(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._start = message
            return
        if not self.has_begun:
            assert self._start is not None  # ASGI apps send it first
            self._is_stream = (
                Headers(raw=self._start["headers"]).get("content-type", "").startswith("text/event-stream")
            )
            self.has_begun = True
            await self._send(self._start)
        await self._send(message)

    async def end_early(self) -> None:
        """End a stream with an error as its last event."""
        body = event(_lost().to_dict()) + LAST_EVENT if self._is_stream else b""
        await self._send({"type": "http.response.body", "body": body, "more_body": False})


def _lost() -> ApiError:
    return ApiError(
        503, "the replica stopped while it was answering; retry later.", "replica_lost", headers=RETRY_AFTER
    )


def _whole(messages: Sequence[Message]) -> Response:
    start, *bodies = messages
    response = Response(b"".join(message.get("body", b"") for message in bodies), start["status"])
    response.raw_headers = list(start["headers"])
    return response


def _add_metrics(app: FastAPI, replicas: Replicas) -> None:
    from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry

    from ...serving.metrics import count_requests
    from .metrics import page_of

    registry = CollectorRegistry()

    @app.get("/metrics")
    async def metrics() -> Response:
        try:
            found = await replicas.metrics()
        except ReplicaLostError as error:
            logger.warning("the metrics of the replicas are missing: %s", error)
            found = {}
        return Response(page_of(registry, found), media_type=CONTENT_TYPE_LATEST)

    count_requests(app, registry)
