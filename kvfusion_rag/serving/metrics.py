"""Prometheus metrics of requests and of the document store at ``GET /metrics``."""

from __future__ import annotations

import time

from fastapi import FastAPI, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ..errors import MissingDependencyError
from ..store import DocumentStore
from .api_schema import METRICS_REPLIES

try:
    from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Summary, generate_latest
except ImportError as error:
    raise MissingDependencyError.of_extra("the metrics page", "prometheus-client", "metrics") from error

from ..store.prometheus import register

OTHER = "other"  # label of unknown paths, so that clients cannot create any number of labels


def add_metrics(app: FastAPI, store: DocumentStore | None) -> None:
    """Add ``GET /metrics`` with the requests of ``app`` and the counters of ``store``, in a separate registry."""
    registry = CollectorRegistry()
    if store is not None:
        register(store, registry)

    @app.get("/metrics", responses=METRICS_REPLIES)
    def metrics() -> Response:
        """Return counts of the whole server for Prometheus."""
        return Response(generate_latest(registry), media_type=CONTENT_TYPE_LATEST)

    count_requests(app, registry)


def count_requests(app: FastAPI, registry: CollectorRegistry) -> None:
    """Count the requests of ``app`` in ``registry``, by the paths that it has now."""
    paths = frozenset(path for route in app.routes if (path := getattr(route, "path", None)))
    app.add_middleware(_RequestCounter, registry=registry, paths=paths)


class _RequestCounter:
    """ASGI middleware that counts each request when its response has ended."""

    def __init__(self, app: ASGIApp, registry: CollectorRegistry, paths: frozenset[str]) -> None:
        self._app = app
        self._paths = paths
        self._requests = Counter(
            "kvfusion_server_requests", "Requests, by path and status.", ["path", "status"], registry=registry
        )
        self._seconds = Summary("kvfusion_server_request_seconds", "Seconds, by path.", ["path"], registry=registry)
        self._running = Gauge("kvfusion_server_requests_under_way", "Requests in progress.", registry=registry)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        path = scope["path"] if scope["path"] in self._paths else OTHER
        began, status = time.perf_counter(), "none"  # remains if the client disconnects before the response begins

        async def send_and_note_status(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = str(message["status"])
            await send(message)

        with self._running.track_inprogress():
            try:
                await self._app(scope, receive, send_and_note_status)
            except Exception:
                status = "500"
                raise
            finally:
                self._requests.labels(path, status).inc()
                self._seconds.labels(path).observe(time.perf_counter() - began)
