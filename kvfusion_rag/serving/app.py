"""The app: which path is answered by what. ``bodies.py`` checks requests, ``replies.py`` writes answers."""

from __future__ import annotations

import logging
import time
from dataclasses import replace
from functools import partial
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware

from ..errors import KVFusionError
from ..generator import KVFusionGenerator
from ..schema import Document, Source
from .access import Access, Guard
from .bodies import ChatRequest, DocumentsRequest, PrefillRequest
from .errors import ApiError, Reply, error_reply, is_own_fault, of_validation
from .flights import Flights
from .options import ServingOptions
from .replies import Completion, sources
from .streams import answer_events, in_thread

logger = logging.getLogger(__name__)

PREFILLED_AT_ONCE = 16  # documents; between two such parts a request can be given up


def create_app(
    generator: KVFusionGenerator, *, access: Access | None = None, options: ServingOptions | None = None
) -> FastAPI:
    """An ASGI app that answers as OpenAI's chat completions do, from the documents of each request.

    Args:
        generator: its weights and store serve all namespaces; it is not closed in the end.
        access: who may ask; by default everyone who reaches the server, but no web page.
        options: limits; by default those of ``ServingOptions``.

    Raises:
        MissingDependencyError: metrics are wanted, and prometheus-client is not there.
    """
    access, options = access or Access(), options or ServingOptions()
    app = FastAPI(title="kvfusion-rag", docs_url=None, redoc_url=None)
    app.add_exception_handler(RequestValidationError, _on_error)
    app.add_exception_handler(HTTPException, _on_error)
    app.add_exception_handler(KVFusionError, _on_error)
    app.add_exception_handler(Exception, _on_error)
    _add_models(app, generator, options)
    _add_answers(app, _Tenants(generator, access), options)
    app.add_middleware(Flights, options=options)
    app.add_middleware(Guard, access=access)
    if options.metrics:
        from .metrics import add_metrics

        add_metrics(app, generator.store)
    if access.origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=access.origins,
            allow_methods=["GET", "POST"],
            allow_headers=["authorization", "content-type"],
        )
    return app


class _Tenants:
    """One generator a namespace, all of them over the same weights and the same store."""

    def __init__(self, generator: KVFusionGenerator, access: Access) -> None:
        self._own = generator
        self._others = {name: generator.with_namespace(name) for name in sorted(access.namespaces)}

    def of(self, request: Request) -> KVFusionGenerator:
        """The generator that may answer ``request``."""
        namespace = request.state.namespace
        return self._own if namespace is None else self._others[namespace]


def _add_models(app: FastAPI, generator: KVFusionGenerator, options: ServingOptions) -> None:
    mode = generator.mode if options.mode in (None, "auto") else options.mode
    model = {
        "id": generator.model_id,
        "object": "model",
        "created": int(time.time()),
        "owned_by": "kvfusion-rag",
        "kvfusion": {
            "mode": mode,
            "focus": generator.focus_of(options.focus, mode),
            "context_window": generator.context_window,
            "follows_instructions": generator.follows_instructions,
        },
    }

    @app.get("/health")
    async def health() -> Response:
        return Reply({"status": "ok"})

    @app.get("/v1/models")
    async def models() -> Response:
        return Reply({"object": "list", "data": [model]})

    @app.get("/v1/models/{name:path}")
    async def model_named(name: str) -> Response:
        _require_model(name, generator.model_id)
        return Reply(model)


def _add_answers(app: FastAPI, tenants: _Tenants, options: ServingOptions) -> None:
    def require_few(documents: list[Any]) -> None:
        if len(documents) > options.max_documents:
            raise ApiError(
                400,
                f"there are {len(documents)} documents, but a request may have {options.max_documents} at most.",
                "too_many_documents",
                "documents",
            )

    @app.post("/v1/chat/completions")
    async def chat_completions(body: ChatRequest, request: Request) -> Response:
        generator = tenants.of(request)
        _require_model(body.model, generator.model_id)
        require_few(body.documents)
        focus = body.focus if "focus" in body.model_fields_set else options.focus
        arguments = {**body.to_arguments(), "mode": body.mode or options.mode, "focus": focus}
        if body.stream:
            return await answer_events(generator, arguments, include_usage=body.stream_options.include_usage)
        answer = await generator.aanswer(**arguments)
        return Reply(Completion(generator.model_id).whole(answer))

    @app.post("/v1/documents")
    async def prefill(body: PrefillRequest, request: Request) -> Response:
        require_few(body.documents)
        found = await _prefill(tenants.of(request), _numbered(body.to_documents()), body.to_wording())
        return Reply({"object": "list", "data": sources(found)})

    @app.post("/v1/documents/forget")
    async def forget(body: DocumentsRequest, request: Request) -> Response:
        require_few(body.documents)
        removed = await in_thread(tenants.of(request).forget, body.to_documents())
        return Reply({"object": "documents.forgotten", "removed": removed})


async def _prefill(generator: KVFusionGenerator, documents: list[Document], wording: dict[str, Any]) -> list[Source]:
    prefill = partial(generator.prefill, **wording)
    found: list[Source] = []
    for start in range(0, len(documents), PREFILLED_AT_ONCE):
        found += await in_thread(prefill, documents[start : start + PREFILLED_AT_ONCE])
    return found


def _numbered(documents: list[Document]) -> list[Document]:
    """Documents without an id have their order number, as in one call of ``prefill``."""
    return [replace(d, id=str(n)) if d.id is None else d for n, d in enumerate(documents, start=1)]


def _require_model(name: str, served: str) -> None:
    if name != served:
        raise ApiError(
            404, f"the model {name[:100]!r} is not served here, but {served!r} is.", "model_not_found", "model"
        )


async def _on_error(request: Request, error: Exception) -> Response:
    if isinstance(error, RequestValidationError):
        return error_reply(of_validation(error.errors()))
    if isinstance(error, KVFusionError) and is_own_fault(error):  # others are logged where they are caught last
        logger.error("a request failed", exc_info=error)
    return error_reply(error)
