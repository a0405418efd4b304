"""The FastAPI app and its routes."""

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
from .admission import AdmissionControl
from .bodies import ChatRequest, DocumentsRequest, PrefillRequest
from .errors import ApiError, Reply, error_reply, is_server_error, of_validation
from .options import ServingOptions
from .replies import Completion, source_list
from .streams import answer_events, in_thread

logger = logging.getLogger(__name__)

PREFILL_BATCH = 16  # documents; a prefill request can be cancelled between two batches


def create_app(
    generator: KVFusionGenerator, *, access: Access | None = None, options: ServingOptions | None = None
) -> FastAPI:
    """Create an ASGI app with OpenAI's chat completions API that answers from the documents in each request.

    Args:
        generator: answers for all namespaces with the same weights and store. The app does not close it.
        access: which clients may send requests. By default all clients that reach the server, but no web pages.
        options: limits, by default those of ``ServingOptions``.

    Raises:
        MissingDependencyError: metrics are enabled, but prometheus-client is not installed.
    """
    access, options = access or Access(), options or ServingOptions()
    app = FastAPI(title="kvfusion-rag", docs_url=None, redoc_url=None)
    app.add_exception_handler(RequestValidationError, _on_error)
    app.add_exception_handler(HTTPException, _on_error)
    app.add_exception_handler(KVFusionError, _on_error)
    app.add_exception_handler(Exception, _on_error)
    _add_models(app, generator, options)
    _add_answers(app, _Tenants(generator, access), options)
    app.add_middleware(AdmissionControl, options=options)
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
    """One generator per namespace, all with the same weights and store."""

    def __init__(self, generator: KVFusionGenerator, access: Access) -> None:
        self._own = generator
        self._others = {name: generator.with_namespace(name) for name in sorted(access.namespaces)}

    def of(self, request: Request) -> KVFusionGenerator:
        """Return the generator for the request's namespace."""
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
    def check_count(documents: list[Any]) -> None:
        if len(documents) > options.max_documents:
            raise ApiError(
                400,
                f"the request has {len(documents)} documents, but at most {options.max_documents} are allowed.",
                "too_many_documents",
                "documents",
            )

    @app.post("/v1/chat/completions")
    async def chat_completions(body: ChatRequest, request: Request) -> Response:
        generator = tenants.of(request)
        _require_model(body.model, generator.model_id)
        check_count(body.documents)
        focus = body.focus if "focus" in body.model_fields_set else options.focus
        arguments = {**body.to_arguments(), "mode": body.mode or options.mode, "focus": focus}
        if body.stream:
            return await answer_events(generator, arguments, include_usage=body.stream_options.include_usage)
        answer = await generator.aanswer(**arguments)
        return Reply(Completion(generator.model_id).whole(answer))

    @app.post("/v1/documents")
    async def prefill(body: PrefillRequest, request: Request) -> Response:
        check_count(body.documents)
        sources = await _prefill(tenants.of(request), _numbered(body.to_documents()), body.prefill_arguments())
        return Reply({"object": "list", "data": source_list(sources)})

    @app.post("/v1/documents/forget")
    async def forget(body: DocumentsRequest, request: Request) -> Response:
        check_count(body.documents)
        removed = await in_thread(tenants.of(request).forget, body.to_documents())
        return Reply({"object": "documents.forgotten", "removed": removed})


async def _prefill(generator: KVFusionGenerator, documents: list[Document], arguments: dict[str, Any]) -> list[Source]:
    prefill = partial(generator.prefill, **arguments)
    sources: list[Source] = []
    for start in range(0, len(documents), PREFILL_BATCH):
        sources += await in_thread(prefill, documents[start : start + PREFILL_BATCH])
    return sources


def _numbered(documents: list[Document]) -> list[Document]:
    """Give documents without an id their position in the request, as a single call of ``prefill`` would."""
    return [replace(d, id=str(n)) if d.id is None else d for n, d in enumerate(documents, start=1)]


def _require_model(name: str, served: str) -> None:
    if name != served:
        raise ApiError(
            404, f"model is {name[:100]!r}, but this server has only {served!r}.", "model_not_found", "model"
        )


async def _on_error(request: Request, error: Exception) -> Response:
    if isinstance(error, RequestValidationError):
        return error_reply(of_validation(error.errors()))
    if isinstance(error, KVFusionError) and is_server_error(error):  # AdmissionControl logs all other exceptions
        logger.error("a request failed", exc_info=error)
    return error_reply(error)
