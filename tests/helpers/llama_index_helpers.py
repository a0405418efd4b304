"""Helpers for LlamaIndex tests: a retriever with fixed nodes, and a log of events."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

from fakes import RecordingGenerator
from llama_index.core.base.base_retriever import BaseRetriever
from llama_index.core.base.llms.types import ChatMessage, MessageRole
from llama_index.core.bridge.pydantic import Field
from llama_index.core.instrumentation.event_handlers import BaseEventHandler
from llama_index.core.schema import NodeWithScore, QueryBundle

from llama_index_kvfusion import KVFusionLlamaIndexLLM


class FixedRetriever(BaseRetriever):
    """Returns ``nodes`` for every query, and records the queries."""

    def __init__(self, nodes: Sequence[NodeWithScore]) -> None:
        self.nodes, self.queries = list(nodes), list[str]()
        super().__init__()

    def _retrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
        self.queries.append(query_bundle.query_str)
        return list(self.nodes)


class EventLog(BaseEventHandler):
    """Records all instrumentation events."""

    seen: list[Any] = Field(default_factory=list)

    def handle(self, event: Any, **_: Any) -> None:
        self.seen.append(event)

    def names(self) -> list[str]:
        return [type(event).__name__.removesuffix("Event") for event in self.seen]


async def ask(engine: Any, way: str, question: str) -> tuple[str, Any]:
    """Return text and response of a query engine: "sync", "async", "stream" or "async stream"."""
    engine._response_synthesizer._streaming = "stream" in way
    response = await engine.aquery(question) if way.startswith("async") else engine.query(question)
    if way == "stream":
        assert inspect.isgenerator(response.response_gen)
        return "".join(response.response_gen), response
    if way == "async stream":
        assert inspect.isasyncgen(response.response_gen)
        return "".join([piece async for piece in response.response_gen]), response
    return str(response), response


# Calls of KVFusionLlamaIndexLLM


COMPLETE = ["complete", "acomplete", "stream_complete", "astream_complete"]
CHAT = ["chat", "achat", "stream_chat", "astream_chat"]
USER = [ChatMessage(role=MessageRole.USER, content="Where?")]


def make(**fields: Any) -> tuple[KVFusionLlamaIndexLLM, RecordingGenerator]:
    generator = RecordingGenerator()
    return KVFusionLlamaIndexLLM(generator, **fields), generator


async def drain(chunks: Any) -> list[Any]:
    return [chunk async for chunk in chunks]


async def call(llm: KVFusionLlamaIndexLLM, way: str, given: Any, **kwargs: Any) -> list[Any]:
    """Return the response of one method in a list, or all chunks of a stream."""
    result = getattr(llm, way)(given, **kwargs)
    if way.startswith("a"):
        result = await result
    if "stream" not in way:
        return [result]
    return await drain(result) if way.startswith("a") else list(result)
