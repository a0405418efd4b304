"""The ingress of many replicas, with replicas in this process, so that tests of the single server can use it."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Any

from fastapi import FastAPI
from starlette.testclient import TestClient
from starlette.types import Message

from kvfusion_rag.cluster.serving.ingress import create_ingress
from kvfusion_rag.cluster.serving.replica import Forwarded, Replica
from kvfusion_rag.serving import Access, ServingOptions


class LocalReplicas:
    """Replicas in this process. All requests go to the first one."""

    def __init__(self, replicas: Sequence[Replica]) -> None:
        self.replicas = replicas
        self.sessions: list[str] = []

    async def respond(self, request: Forwarded, session: str) -> AsyncGenerator[Message, None]:
        self.sessions.append(session)
        async with aclosing(self.replicas[0].respond(request)) as messages:
            async for message in messages:
                yield message

    async def reply_everywhere(self, request: Forwarded) -> list[list[Message]]:
        return [await replica.reply(request) for replica in self.replicas]

    async def metrics(self) -> dict[str, Any]:
        return {str(number): replica.metrics() for number, replica in enumerate(self.replicas)}


def ingress_app(generator: Any, *, access: Access | None = None, options: ServingOptions | None = None) -> FastAPI:
    """Return what ``serving.create_app`` returns, with one replica behind an ingress."""
    access, options = access or Access(), options or ServingOptions()
    replica = Replica(generator, access.namespaces, options)
    facts = replica.facts()
    return create_ingress(
        facts["model"], facts["schema"], LocalReplicas([replica]), access=access, options=options, most_replicas=1
    )


def ingress_client(generator: Any, access: Access | None = None, **options: Any) -> TestClient:
    """Return what ``serving_client.client_of`` returns, for the ingress."""
    app = ingress_app(generator, access=access, options=ServingOptions(**options))
    return TestClient(app, base_url="http://localhost", raise_server_exceptions=False)
