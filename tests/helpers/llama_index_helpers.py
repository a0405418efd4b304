"""Helpers for LlamaIndex tests: a retriever with fixed nodes, and a log of events."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llama_index.core.base.base_retriever import BaseRetriever
from llama_index.core.bridge.pydantic import Field
from llama_index.core.instrumentation.event_handlers import BaseEventHandler
from llama_index.core.schema import NodeWithScore, QueryBundle


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
