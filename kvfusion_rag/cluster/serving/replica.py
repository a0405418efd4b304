"""One replica: the app of the single server over its own generator, called with requests that the ingress has read."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Collection
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from starlette.types import Message, Scope

from ...generator import KVFusionGenerator
from ...serving import ServingOptions, create_app
from ...serving.admission import AdmissionControl, Load
from ...serving.app import add_answering, model_facts, new_app

if TYPE_CHECKING:
    from .metrics import Family


@dataclass(frozen=True, slots=True)
class Forwarded:
    """A request that the ingress has allowed and read. It has no keys, cookies or other headers of its client."""

    path: str
    content_type: str
    body: bytes
    namespace: str | None = None

    def scope(self) -> Scope:
        """Return the ASGI scope of this request."""
        return {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "method": "POST",
            "scheme": "http",
            "path": self.path,
            "raw_path": self.path.encode(),
            "root_path": "",
            "query_string": b"",
            "headers": [
                (b"content-type", self.content_type.encode("latin-1")),
                (b"content-length", str(len(self.body)).encode()),
            ],
            "client": None,
            "server": None,
            "state": {"namespace": self.namespace},
        }


class Replica:
    """Answers forwarded requests.

    Args:
        generator: answers for its own namespace and for ``namespaces``.
        namespaces: those of all API keys. The keys themselves stay with the ingress.
        options: limits of one replica.
    """

    def __init__(self, generator: KVFusionGenerator, namespaces: Collection[str], options: ServingOptions) -> None:
        self._generator, self._options = generator, options
        self._load = load = Load()
        self._app = new_app(model_facts(generator, options), options)
        add_answering(self._app, generator, namespaces, options, load)
        # A request that waits for its tenant would block others here, so the ingress limits tenants.
        self._app.add_middleware(AdmissionControl, options=options, load=load, max_of_tenant=options.max_concurrency)
        self._lifespan: AsyncExitStack | None = None

    def facts(self) -> dict[str, Any]:
        """Return ``model`` as ``/v1/models`` lists it, and the ``schema`` of the single server."""
        single = create_app(self._generator, options=self._options)
        return {"model": model_facts(self._generator, self._options), "schema": single.openapi()}

    async def respond(self, request: Forwarded) -> AsyncGenerator[Message, None]:
        """Yield the ASGI messages of the response. If the caller disconnects, the work ends as for any client."""
        await self._start()
        messages: asyncio.Queue[Message | None] = asyncio.Queue()
        left = asyncio.Event()
        unread: list[Message] = [{"type": "http.request", "body": request.body, "more_body": False}]

        async def receive() -> Message:
            if unread:
                return unread.pop()
            await left.wait()
            return {"type": "http.disconnect"}

        work = asyncio.ensure_future(self._app(request.scope(), receive, messages.put))
        work.add_done_callback(lambda _: messages.put_nowait(None))
        try:
            while (message := await messages.get()) is not None:
                yield message
        finally:
            left.set()
            while not work.done():  # the replica's slot must stay occupied until then, even if this is cancelled again
                with suppress(asyncio.CancelledError):
                    await asyncio.wait({work})
        work.result()

    async def reply(self, request: Forwarded) -> list[Message]:
        """Return the whole response."""
        return [message async for message in self.respond(request)]

    def metrics(self) -> list[Family]:
        """Return the number of requests in progress, and the counts of the store."""
        from .metrics import replica_families

        return replica_families(self._load.total, self._generator.store)

    def close(self) -> None:
        """Finish uploads to the store, and release its files."""
        if self._generator.store is not None:
            self._generator.store.close()

    async def _start(self) -> None:
        """Start the app in the event loop of the first request."""
        if self._lifespan is None:
            self._lifespan = AsyncExitStack()
            await self._lifespan.enter_async_context(self._app.router.lifespan_context(self._app))
