"""The FastAPI app and its routes."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware

from ..errors import KVFusionError
from ..generator import KVFusionGenerator
from ..schema import Document
from .access import Access, Guard
from .admission import AdmissionControl, Load
from .api_schema import REPLIES, set_schema
from .bodies import ChatRequest, DocumentsRequest, PrefillRequest
from .document_work import DocumentWork
from .errors import ApiError, Reply, error_reply, is_server_error, of_validation
from .library import Library
from .library.routes import add_library
from .options import ServingOptions
from .pages import add_pages
from .replies import Completion, source_list
from .streams import answer_events, in_thread

logger = logging.getLogger(__name__)


def create_app(
    generator: KVFusionGenerator,
    *,
    access: Access | None = None,
    options: ServingOptions | None = None,
    library: Library | None = None,
) -> FastAPI:
    """Create an ASGI app with OpenAI's chat completions API that answers from the documents in each request.

    Args:
        generator: answers for all namespaces with the same weights and store. The app does not close it.
        access: which clients may send requests. By default all clients that reach the server, but no web pages.
        options: limits, by default those of ``ServingOptions``.
        library: files in which documents are found for requests that have none. By default these are answered
            without documents. The app does not close it.

    Raises:
        MissingDependencyError: metrics are enabled, but prometheus-client is not installed.
    """
    access, options = access or Access(), options or ServingOptions()
    app, load = new_app(model_facts(generator, options), options), Load()
    add_answering(app, generator, access.namespaces, options, load, library)
    add_limits(app, access, options, load)
    if options.metrics:
        from .metrics import add_metrics

        add_metrics(app, generator.store)
    add_origins(app, access)
    set_schema(app)
    return app


def new_app(model: dict[str, Any], options: ServingOptions) -> FastAPI:
    """Return an app with our errors, the pages and ``model``, which does not answer yet."""
    app = bare_app(options)
    add_pages(app)
    _add_models(app, model, options)
    return app


def bare_app(options: ServingOptions) -> FastAPI:
    """Return an app with our errors and a thread for each request, which has only the path ``/health``."""
    lifespan = _with_threads(options.max_concurrency)
    app = FastAPI(title="kvfusion-rag", docs_url=None, redoc_url=None, lifespan=lifespan)
    app.add_exception_handler(RequestValidationError, _on_error)
    app.add_exception_handler(HTTPException, _on_error)
    app.add_exception_handler(KVFusionError, _on_error)
    app.add_exception_handler(Exception, _on_error)

    @app.get("/health", responses=REPLIES["health"])
    async def health() -> Response:
        """Return that the server runs."""
        return Reply({"status": "ok"})

    return app


def add_answering(
    app: FastAPI,
    generator: KVFusionGenerator,
    namespaces: Iterable[str],
    options: ServingOptions,
    load: Load,
    library: Library | None = None,
) -> None:
    """Add the paths that need the generator, for its own namespace and for others."""
    tenants, work = Tenants(generator, namespaces), DocumentWork(load)
    _add_answers(app, tenants, options, library)
    _add_documents(app, tenants, options, work)
    if library is not None:
        add_library(app, library, work, tenants.of, options.max_body_bytes)


def add_limits(app: FastAPI, access: Access, options: ServingOptions, load: Load) -> None:
    """Reject requests without access first, and then those above the limits."""
    app.add_middleware(AdmissionControl, options=options, load=load, max_of_tenant=_max_of_tenant(access, options))
    app.add_middleware(Guard, access=access)


def add_origins(app: FastAPI, access: Access) -> None:
    """Answer the preflight requests of browsers about the allowed origins (CORS). Nothing may be added around this."""
    if access.origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=access.origins,
            allow_methods=["GET", "POST"],
            allow_headers=["authorization", "content-type"],
        )


def _with_threads(number: int) -> Any:
    """Return a lifespan in which every request in progress can have a thread, so that none waits for the others."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncGenerator[None, None]:
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(number, thread_name_prefix="kvfusion-http"))
        yield

    return lifespan


def _max_of_tenant(access: Access, options: ServingOptions) -> int:
    if options.tenant_concurrency is not None:
        return options.tenant_concurrency
    is_shared = len(set(access.keys.values())) > 1
    return max(1, options.max_concurrency // 2) if is_shared else options.max_concurrency


class Tenants:
    """One generator per namespace, all with the same weights and store."""

    def __init__(self, generator: KVFusionGenerator, namespaces: Iterable[str]) -> None:
        self._own = generator
        self._others = {name: generator.with_namespace(name) for name in sorted(namespaces)}

    def of(self, request: Request) -> KVFusionGenerator:
        """Return the generator for the request's namespace."""
        namespace = request.state.namespace
        return self._own if namespace is None else self._others[namespace]


def model_facts(generator: KVFusionGenerator, options: ServingOptions) -> dict[str, Any]:
    """Return the model as ``/v1/models`` lists it."""
    mode = generator.mode if options.mode in (None, "auto") else options.mode
    return {
        "id": options.names_of(generator.model_id)[0],
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


def _add_models(app: FastAPI, model: dict[str, Any], options: ServingOptions) -> None:
    def names() -> tuple[str, ...]:
        return options.names_of(model["id"])  # the replicas of a server can be given another model

    @app.get("/v1/models", responses=REPLIES["models"])
    async def models() -> Response:
        """Return the model under each of its names, its mode, and whether it follows instructions."""
        return Reply({"object": "list", "data": [model | {"id": name} for name in names()]})

    @app.get("/v1/models/{name:path}", responses=REPLIES["model"])
    async def model_named(name: str) -> Response:
        """Return the model if it has this name."""
        _require_model(name, names())
        return Reply(model | {"id": name})


def _add_answers(app: FastAPI, tenants: Tenants, options: ServingOptions, library: Library | None) -> None:
    @app.post("/v1/chat/completions", responses=REPLIES["answer"])
    async def chat_completions(body: ChatRequest, request: Request) -> Response:
        """Answer the last message from the documents of the request, or from those that the server finds."""
        generator = tenants.of(request)
        names = options.names_of(generator.model_id)
        _require_model(body.model, names)
        _require_count(body.documents, options)
        focus = body.focus if "focus" in body.model_fields_set else options.focus
        arguments = {**body.to_arguments(), "mode": body.mode or options.mode, "focus": focus}
        found = await _find(library, generator.namespace, body, options)
        if found is not None:
            arguments["documents"] = found
        completion = Completion(names[0], found, include_usage=body.stream_options.include_usage)
        if body.stream:
            return await answer_events(generator, arguments, completion)
        return Reply(completion.whole(await generator.aanswer(**arguments)))


def _add_documents(app: FastAPI, tenants: Tenants, options: ServingOptions, work: DocumentWork) -> None:
    @app.post("/v1/documents", responses=REPLIES["work"])
    async def prefill(body: PrefillRequest, request: Request) -> Response:
        """Compute the KV of documents and keep it in the store."""
        _require_count(body.documents, options)
        steps = tenants.of(request).prefill_steps(body.to_documents(), **body.prefill_arguments())
        sources = await work.run(request.state.namespace, steps)
        return Reply({"object": "list", "data": source_list(sources)})

    @app.post("/v1/documents/forget", responses=REPLIES["work"])
    async def forget(body: DocumentsRequest, request: Request) -> Response:
        """Remove documents from every tier of the store."""
        _require_count(body.documents, options)
        removed = await work.run(request.state.namespace, tenants.of(request).forget_steps(body.to_documents()))
        return Reply({"object": "documents.forgotten", "removed": removed})


async def _find(
    library: Library | None, namespace: str, body: ChatRequest, options: ServingOptions
) -> list[Document] | None:
    """Return the documents that the library has for a request without documents, or ``None`` if it is not asked."""
    wanted = body.retrieve
    if "documents" in body.model_fields_set or wanted == 0:
        return None
    if wanted is not None and library is None:
        raise ApiError(400, "this server has no files; start it with --docs.", "no_library", "retrieve")
    if wanted is not None and wanted > options.max_documents:
        most = options.max_documents
        raise ApiError(400, f"retrieve is {wanted}, but at most {most} is allowed.", "too_many_documents", "retrieve")
    if library is None:
        return None
    return await in_thread(library.search, namespace, body.messages[-1].content, wanted)


def _require_count(documents: list[Any], options: ServingOptions) -> None:
    if len(documents) > options.max_documents:
        raise ApiError(
            400,
            f"the request has {len(documents)} documents, but at most {options.max_documents} are allowed.",
            "too_many_documents",
            "documents",
        )


def _require_model(name: str, served: Sequence[str]) -> None:
    if name not in served:
        known = " and ".join(map(repr, served))
        raise ApiError(404, f"model is {name[:100]!r}, but this server has only {known}.", "model_not_found", "model")


async def _on_error(request: Request, error: Exception) -> Response:
    if isinstance(error, RequestValidationError):
        return error_reply(of_validation(error.errors()))
    if isinstance(error, KVFusionError) and is_server_error(error):  # AdmissionControl logs all other exceptions
        logger.error("a request failed", exc_info=error)
    return error_reply(error)
