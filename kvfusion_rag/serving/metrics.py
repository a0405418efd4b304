"""Counts of requests and of the document store for Prometheus, at ``GET /metrics``."""

from __future__ import annotations

import time

from fastapi import FastAPI, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ..errors import MissingDependencyError
from ..store import DocumentStore

try:
    from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Summary, generate_latest
except ImportError as error:
    raise MissingDependencyError('metrics need prometheus-client: pip install "kvfusion-rag[metrics]".') from error

from ..store.prometheus import register

OTHER = "other"  # paths that are none of the app's: a client must not fill the registry with names


def add_metrics(app: FastAPI, store: DocumentStore | None) -> None:
    """Count requests of ``app`` in a registry of its own, and show it together with the store's counts."""
    registry = CollectorRegistry()
    if store is not None:
        register(store, registry)

    @app.get("/metrics")
    def metrics() -> Response:
        return Response(generate_latest(registry), media_type=CONTENT_TYPE_LATEST)

    paths = frozenset(path for route in app.routes if (path := getattr(route, "path", None)))
    app.add_middleware(_Counting, registry=registry, paths=paths)


class _Counting:
    """ASGI middleware that counts each request once its response has ended."""

    def __init__(self, app: ASGIApp, registry: CollectorRegistry, paths: frozenset[str]) -> None:
        self._app = app
        self._paths = paths
        self._requests = Counter(
            "kvfusion_server_requests", "Requests, by path and status.", ["path", "status"], registry=registry
        )
        self._seconds = Summary("kvfusion_server_request_seconds", "Time taken, by path.", ["path"], registry=registry)
        self._under_way = Gauge("kvfusion_server_requests_under_way", "Requests under way.", registry=registry)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        path = scope["path"] if scope["path"] in self._paths else OTHER
        began, status = time.perf_counter(), "none"  # a client that left before the response began

        async def noted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = str(message["status"])
            await send(message)

        with self._under_way.track_inprogress():
            try:
                await self._app(scope, receive, noted)
            except Exception:
                status = "500"
                raise
            finally:
                self._requests.labels(path, status).inc()
                self._seconds.labels(path).observe(time.perf_counter() - began)
