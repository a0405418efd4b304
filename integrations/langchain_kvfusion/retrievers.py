"""PrefetchingRetriever: loads stored documents into memory while a reranker runs."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, Any

from langchain_core.callbacks import AsyncCallbackManagerForRetrieverRun, CallbackManagerForRetrieverRun
from langchain_core.documents import Document
from langchain_core.retrievers import BaseRetriever, RetrieverLike
from pydantic import Field

from kvfusion_rag import KVFusionError

from .documents import to_documents

if TYPE_CHECKING:
    from .backed import GeneratorBacked

logger = logging.getLogger(__name__)


class PrefetchingRetriever(BaseRetriever):
    """Returns the documents of ``retriever`` unchanged, and starts to load their stored KV into memory.

    Use it before a slow step: ``ContextualCompressionRetriever(base_compressor=reranker,
    base_retriever=PrefetchingRetriever(retriever=retriever, llm=llm))``. Documents that are not stored are not
    computed.

    Attributes:
        retriever: any retriever, or a runnable from a question to documents.
        llm: the KVFusionLLM or ChatKVFusion that will answer.
    """

    retriever: Any
    llm: Any = Field(repr=False, exclude=True)

    def __init__(self, *, retriever: RetrieverLike, llm: GeneratorBacked, **fields: Any) -> None:
        everything: dict[str, Any] = {**fields, "retriever": retriever, "llm": llm}
        super().__init__(**everything)

    def _get_relevant_documents(
        self, query: str, *, run_manager: CallbackManagerForRetrieverRun, **kwargs: Any
    ) -> list[Document]:
        found = self.retriever.invoke(query, {"callbacks": run_manager.get_child()}, **kwargs)
        self._prefetch(found)
        return found

    async def _aget_relevant_documents(
        self, query: str, *, run_manager: AsyncCallbackManagerForRetrieverRun, **kwargs: Any
    ) -> list[Document]:
        found = await self.retriever.ainvoke(query, {"callbacks": run_manager.get_child()}, **kwargs)
        await asyncio.to_thread(self._prefetch, found)  # it tokenizes the documents before it returns
        return found

    def _prefetch(self, found: list[Document]) -> None:
        try:
            self.llm.generator.prefetch(to_documents(found))
        except KVFusionError as error:  # prefetching is optional, and a reranker may drop a document that is too long
            logger.info("%d documents were not prefetched: %s", len(found), error)
