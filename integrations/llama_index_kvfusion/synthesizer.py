"""`KVFusionSynthesizer`: a LlamaIndex response synthesizer that hands each node over as a separate document.

It overrides as little as it can, so that LlamaIndex's events, callbacks and empty responses stay as they are.
It decides what is asked; how the model is called is the LLM's business, how a node is read `documents`'.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Generator, Sequence
from contextlib import aclosing, closing
from typing import Any, cast

from llama_index.core.base.base_retriever import BaseRetriever
from llama_index.core.base.llms.types import ChatMessage, ChatResponse, CompletionResponse
from llama_index.core.base.response.schema import RESPONSE_TYPE
from llama_index.core.callbacks.base import CallbackManager
from llama_index.core.indices.base import BaseIndex
from llama_index.core.postprocessor.types import BaseNodePostprocessor
from llama_index.core.prompts import BasePromptTemplate, PromptTemplate
from llama_index.core.prompts.mixin import PromptDictType
from llama_index.core.query_engine import RetrieverQueryEngine
from llama_index.core.response_synthesizers import BaseSynthesizer
from llama_index.core.schema import MetadataMode, NodeWithScore, QueryType
from llama_index.core.settings import Settings
from llama_index.core.types import RESPONSE_TEXT_TYPE

from kvfusion_rag import Document, InvalidInputError

from .documents import to_documents
from .llm import KVFusionLlamaIndexLLM

METADATA_KEY = "kvfusion"
"""Where `response.metadata` holds the answer's record, beside LlamaIndex's node ids."""

_DEFAULT_QUERY_TEMPLATE = "{query_str}"


class KVFusionSynthesizer(BaseSynthesizer):
    """Answers a query from nodes that are read apart, whatever order they come in.

    ``response.metadata["kvfusion"]`` holds mode, sources, citations, usage and timings; documents are named
    by node id. In streams it is empty until the last piece was read.
    """

    def __init__(
        self,
        llm: KVFusionLlamaIndexLLM,
        *,
        query_template: BasePromptTemplate | str = _DEFAULT_QUERY_TEMPLATE,
        chat_history: Sequence[ChatMessage] = (),
        metadata_mode: MetadataMode = MetadataMode.NONE,
        streaming: bool = False,
        callback_manager: CallbackManager | None = None,
        empty_response: str | None = None,
    ) -> None:
        """`llm` is required and has to be ours: another one would read no separate documents.

        query_template: the complete wording around ``{query_str}``, without the documents. The default adds
            nothing, so that the model's own question template (the one it was tuned with) is used. A
            ChatPromptTemplate gives several messages.
        chat_history: what was said before the query, as turns; a system message says how to answer. The chat
            engines of this package fill it in.
        metadata_mode: NONE gives the model the bare passage, plus ``metadata["title"]`` where its template
            has a place for a title. That is what KV-Fusion models are trained on; citations are then offsets
            into the node's text, and equal passages share one stored KV. LLM puts LlamaIndex's "key: value"
            header before each passage, for models that follow instructions and need dates or authors.
        callback_manager: also set on the LLM. None: the LLM keeps its own if it has handlers, else both take
            the one in `Settings`, as LlamaIndex's own synthesizers do.
        """
        require_own_llm(llm, type(self).__name__)
        shared = None if llm.callback_manager.handlers else Settings.callback_manager
        super().__init__(
            llm=llm, callback_manager=callback_manager or shared, streaming=streaming, empty_response=empty_response
        )
        self._fusion_llm = llm
        self._chat_history = chat_history
        self._metadata_mode = metadata_mode
        self._query_template = PromptTemplate(query_template) if isinstance(query_template, str) else query_template

    @property
    def llm(self) -> KVFusionLlamaIndexLLM:
        """The LLM, for ``index.as_query_engine(response_synthesizer=s, llm=s.llm)``."""
        return self._fusion_llm

    @property
    def metadata_mode(self) -> MetadataMode:
        """What is read of a node; `KVFusionPrefill` has to be given the same."""
        return self._metadata_mode

    def as_query_engine(
        self,
        index_or_retriever: BaseIndex[Any] | BaseRetriever,
        *,
        node_postprocessors: list[BaseNodePostprocessor] | None = None,
        callback_manager: CallbackManager | None = None,
        **retriever_options: Any,
    ) -> RetrieverQueryEngine:
        """A query engine over an index (`retriever_options` such as similarity_top_k go to as_retriever) or a
        ready retriever (which takes none). Unlike ``index.as_query_engine`` it asks for no default LLM. Streaming is
        the synthesizer's: ``KVFusionSynthesizer(llm, streaming=True)``."""
        if "streaming" in retriever_options:
            raise InvalidInputError(
                "'streaming' belongs to the synthesizer, not to its engine: KVFusionSynthesizer(llm, streaming=True)."
            )
        if isinstance(index_or_retriever, BaseIndex):
            retriever = index_or_retriever.as_retriever(**retriever_options)
        elif retriever_options:
            raise InvalidInputError(
                f"Option {min(retriever_options)!r} is for an index; set it on the retriever itself."
            )
        else:
            retriever = index_or_retriever
        return RetrieverQueryEngine(
            retriever,
            response_synthesizer=self,
            node_postprocessors=node_postprocessors,
            callback_manager=callback_manager,
        )

    def synthesize(
        self,
        query: QueryType,
        nodes: list[NodeWithScore],
        additional_source_nodes: Sequence[NodeWithScore] | None = None,
        **response_kwargs: Any,
    ) -> RESPONSE_TYPE:
        """LlamaIndex's synthesize, with the nodes' ids, titles and scores kept for the answer's record."""
        record = self._new_record()
        documents = to_documents(nodes, self._metadata_mode)
        response = super().synthesize(
            query, nodes, additional_source_nodes, documents=documents, record=record, **response_kwargs
        )
        return _with_record(response, nodes, record)

    async def asynthesize(
        self,
        query: QueryType,
        nodes: list[NodeWithScore],
        additional_source_nodes: Sequence[NodeWithScore] | None = None,
        **response_kwargs: Any,
    ) -> RESPONSE_TYPE:
        """Like `synthesize`, without blocking the event loop."""
        record = self._new_record()
        documents = to_documents(nodes, self._metadata_mode)
        response = await super().asynthesize(
            query, nodes, additional_source_nodes, documents=documents, record=record, **response_kwargs
        )
        return _with_record(response, nodes, record)

    def get_response(
        self,
        query_str: str,
        text_chunks: Sequence[str],
        *,
        documents: Sequence[Document] | None = None,
        record: dict[str, Any] | None = None,
        **response_kwargs: Any,
    ) -> RESPONSE_TEXT_TYPE:
        """The answer's text, or a generator of its pieces when streaming.

        `documents` stand in for `text_chunks` where given; `record` is filled when the answer is complete;
        `response_kwargs` are further variables of the query template.
        """
        call = self._call(query_str, text_chunks if documents is None else documents, response_kwargs)
        record = {} if record is None else record
        # Chat engines flip this attribute between two calls, so it is read here and not kept.
        llm, chats = self._fusion_llm, "messages" in call
        if self._streaming:
            return _pieces(llm.stream_chat(**call) if chats else llm.stream_complete(**call), record)
        return _text(llm.chat(**call) if chats else llm.complete(**call), record)

    async def aget_response(
        self,
        query_str: str,
        text_chunks: Sequence[str],
        *,
        documents: Sequence[Document] | None = None,
        record: dict[str, Any] | None = None,
        **response_kwargs: Any,
    ) -> RESPONSE_TEXT_TYPE:
        """Like `get_response`; when streaming, an async generator."""
        call = self._call(query_str, text_chunks if documents is None else documents, response_kwargs)
        record = {} if record is None else record
        llm, chats = self._fusion_llm, "messages" in call
        if self._streaming:
            return _apieces(await (llm.astream_chat(**call) if chats else llm.astream_complete(**call)), record)
        return _text(await (llm.achat(**call) if chats else llm.acomplete(**call)), record)

    def _call(
        self, query_str: str, documents: Sequence[Document | str], template_values: dict[str, Any]
    ) -> dict[str, Any]:
        """Arguments of the LLM's chat where there are messages to send, else of its complete."""
        llm, template, values = self._fusion_llm, self._query_template, {"query_str": query_str, **template_values}
        call = {"question": self._standalone(query_str), "documents": list(documents)}
        if self._chat_history or len(template.format_messages(llm=llm, **values)) > 1:
            return {"messages": llm.fill_messages(template, self._chat_history, **values), **call}
        return {"prompt": llm.fill(template, **values), "formatted": True, **call}

    def _standalone(self, query_str: str) -> str:
        """The question for models that read nothing of a conversation."""
        return query_str

    def _new_record(self) -> dict[str, Any]:
        """What the next answer fills in."""
        return {}

    def _get_prompts(self) -> PromptDictType:
        return {"query_template": self._query_template}

    def _update_prompts(self, prompts: PromptDictType) -> None:
        self._query_template = prompts.get("query_template", self._query_template)


def require_own_llm(llm: object, user: str) -> None:
    """Raise InvalidInputError for an LLM that would read all documents as one text."""
    if not isinstance(llm, KVFusionLlamaIndexLLM):
        raise InvalidInputError(
            f"llm is a {type(llm).__name__}; {user} needs a KVFusionLlamaIndexLLM, because only that reads "
            "separate documents."
        )


def _text(response: CompletionResponse | ChatResponse, record: dict[str, Any]) -> str:
    _fill(record, response)
    return response.text if isinstance(response, CompletionResponse) else response.message.content or ""


def _pieces(
    chunks: Generator[CompletionResponse | ChatResponse, None, None], record: dict[str, Any]
) -> Generator[str, None, None]:
    with closing(chunks):
        for chunk in chunks:
            _fill(record, chunk)
            if chunk.delta:
                yield chunk.delta


async def _apieces(
    chunks: AsyncGenerator[CompletionResponse | ChatResponse, None], record: dict[str, Any]
) -> AsyncGenerator[str, None]:
    async with aclosing(chunks):
        async for chunk in chunks:
            _fill(record, chunk)
            if chunk.delta:
                yield chunk.delta


def _fill(record: dict[str, Any], response: CompletionResponse | ChatResponse) -> None:
    """Take over what the last (or only) response says of the answer; earlier chunks say nothing."""
    record.update(cast("dict[str, Any] | None", response.raw) or {})


def _with_record(response: RESPONSE_TYPE, nodes: list[NodeWithScore], record: dict[str, Any]) -> RESPONSE_TYPE:
    if nodes:
        response.metadata = {**(response.metadata or {}), METADATA_KEY: record}
    return response
