"""`KVFusionSynthesizer`: a LlamaIndex response synthesizer that passes each node on as a separate document.

It overrides as little as it can, so that LlamaIndex's events, callbacks and empty responses stay as they are.
It decides what is asked. The LLM decides how the model is called, and `documents` what is read of a node.
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
from llama_index.core.prompts.default_prompt_selectors import DEFAULT_TEXT_QA_PROMPT_SEL
from llama_index.core.prompts.mixin import PromptDictType
from llama_index.core.query_engine import RetrieverQueryEngine
from llama_index.core.response_synthesizers import BaseSynthesizer
from llama_index.core.schema import BaseNode, MetadataMode, NodeWithScore, QueryType
from llama_index.core.settings import Settings
from llama_index.core.types import RESPONSE_TEXT_TYPE

from kvfusion_rag import Document, InvalidInputError, ShownPrompt

from .documents import stripped, to_documents
from .llm import KVFusionLlamaIndexLLM
from .wording import QUESTION_MARK, ContextMarks

METADATA_KEY = "kvfusion"
"""Where `response.metadata` holds the answer's record, beside LlamaIndex's node ids."""

_BARE_QUESTION = PromptTemplate("{query_str}")


class KVFusionSynthesizer(BaseSynthesizer):
    """Answers a query from nodes, each a separate document, in the wording of LlamaIndex's own templates.

    In mode "concat", the default of untuned models, the model reads the same tokens as with LlamaIndex's `compact`
    synthesizer, if the nodes fit into one prompt there. If they do not fit here, a ContextLimitError is raised;
    answers are not refined in several calls. In modes "fusion" and "ape" each node is read apart, so the order of the
    nodes does not matter.

    ``response.metadata["kvfusion"]`` holds mode, sources, citations, usage and timings. Documents are named by node
    id. In streams it is empty until the last piece is read.
    """

    def __init__(
        self,
        llm: KVFusionLlamaIndexLLM,
        *,
        text_qa_template: BasePromptTemplate | str | None = None,
        query_template: BasePromptTemplate | str | None = None,
        chat_history: Sequence[ChatMessage] = (),
        metadata_mode: MetadataMode | None = None,
        streaming: bool = False,
        callback_manager: CallbackManager | None = None,
        empty_response: str | None = None,
    ) -> None:
        """`llm` has to be ours, because other LLMs do not read separate documents.

        text_qa_template: LlamaIndex's template around ``{context_str}`` and ``{query_str}``. The documents are read
            where ``{context_str}`` is. The default is LlamaIndex's own; a tuned model with fixed templates reads the
            question in its own question template instead.
        query_template: a wording around ``{query_str}`` without the documents, in place of `text_qa_template`. The
            documents end the system message. A ChatPromptTemplate gives several messages.
        chat_history: messages before the query. The chat engines of this package fill it in.
        metadata_mode: LLM puts LlamaIndex's "key: value" header before each text, as LlamaIndex's synthesizers do.
            NONE gives the bare text, and ``metadata["title"]`` if the model's template has a field for a title; then
            citations are offsets into the node's text, and equal texts share one stored KV. The default is LLM for a
            model that reads prompts unchanged, and NONE for a tuned model with fixed templates.
        callback_manager: also set on the LLM. None: the LLM keeps its own if it has handlers, else both take
            the one in `Settings`, as LlamaIndex's own synthesizers do.

        Raises InvalidInputError for another LLM, or if both templates are given.
        """
        require_own_llm(llm, type(self).__name__)
        _require_one_template(text_qa_template, query_template)
        shared = None if llm.callback_manager.handlers else Settings.callback_manager
        super().__init__(
            llm=llm, callback_manager=callback_manager or shared, streaming=streaming, empty_response=empty_response
        )
        self._fusion_llm = llm
        self._chat_history = chat_history
        self._metadata_mode = metadata_mode
        self._text_qa_template, self._query_template = _template(text_qa_template), _template(query_template)

    @property
    def llm(self) -> KVFusionLlamaIndexLLM:
        """The LLM, for ``index.as_query_engine(response_synthesizer=s, llm=s.llm)``."""
        return self._fusion_llm

    @property
    def metadata_mode(self) -> MetadataMode:
        """What is read of a node."""
        if self._metadata_mode is not None:
            return self._metadata_mode
        return MetadataMode.LLM if self._fusion_llm.reads_prompt else MetadataMode.NONE

    def to_documents(self, nodes: Sequence[BaseNode | NodeWithScore]) -> list[Document]:
        """The documents that a query over `nodes` reads."""
        if not self._joins_as_llama_index:
            return to_documents(nodes, self.metadata_mode)
        # The template does not show titles, so they are for the answer's record only.
        return [stripped(document) for document in to_documents(nodes, self.metadata_mode, titles=True)]

    def prefill_arguments(self) -> dict[str, Any]:
        """Arguments of the generator's `prefill` and `prefetch` for the documents of this synthesizer's queries."""
        call = self._call(QUESTION_MARK, [], {})
        request = self._fusion_llm.request(call.pop("messages", None) or call.pop("prompt"), **call)
        return {name: request[name] for name in ("prompt", "question", "chat_template_kwargs")}

    def show_prompt(self, query: str, nodes: Sequence[BaseNode | NodeWithScore]) -> ShownPrompt:
        """The text that the model reads for `query` over `nodes`."""
        call = self._call(query, self.to_documents(nodes), {})
        return self._fusion_llm.show_prompt(call.pop("messages", None) or call.pop("prompt"), **call)

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
        documents = self.to_documents(nodes)
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
        documents = self.to_documents(nodes)
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
        """Arguments of the LLM's `chat` if there are messages to send, else of its `complete`."""
        values = {"query_str": query_str, **template_values}
        if self._joins_as_llama_index:
            documents = [stripped(document) for document in to_documents(documents)]
        wording = self._around_documents(values) if self._shows_documents else self._without_documents(values)
        return {"question": self._standalone(query_str), "documents": list(documents), **wording}

    def _around_documents(self, values: dict[str, Any]) -> dict[str, Any]:
        """The wording of a template that shows the documents, and their place in it."""
        marks = ContextMarks()
        wording = self._word(**values, context_str=marks.text)
        if isinstance(wording, str):
            text, place = marks.remove(wording)
            return {"prompt": text, "formatted": True, "documents_place": place}
        messages, message_place = marks.remove_from_messages(wording)
        return {"messages": messages, "documents_place": message_place}

    def _without_documents(self, values: dict[str, Any]) -> dict[str, Any]:
        """The wording of a query template."""
        llm, template, history = self._fusion_llm, self._query_template or _BARE_QUESTION, self._chat_history
        if llm.reads_prompt:
            wording = llm.word(template, history, **values)
        elif history or len(template.format_messages(llm=llm, **values)) > 1:
            wording = llm.fill_messages(template, history, **values)
        else:
            wording = llm.fill(template, **values)
        return {"prompt": wording, "formatted": True} if isinstance(wording, str) else {"messages": wording}

    def _word(self, **values: Any) -> list[ChatMessage] | str:
        """What LlamaIndex's own synthesizer would send to the LLM."""
        template = self._text_qa_template or DEFAULT_TEXT_QA_PROMPT_SEL
        return self._fusion_llm.word(template, self._chat_history, **values)

    @property
    def _shows_documents(self) -> bool:
        """Whether the wording shows the documents."""
        return self._query_template is None and (self._text_qa_template is not None or self._fusion_llm.reads_prompt)

    @property
    def _joins_as_llama_index(self) -> bool:
        """Whether the documents' texts are joined in the wording as LlamaIndex joins them."""
        return self._shows_documents and self._fusion_llm.reads_prompt

    def _standalone(self, query_str: str) -> str:
        """The question for models that do not read the conversation."""
        return query_str

    def _new_record(self) -> dict[str, Any]:
        """The record that the next answer fills in."""
        return {}

    def _get_prompts(self) -> PromptDictType:
        """The template in use."""
        if self._shows_documents:
            return {"text_qa_template": self._text_qa_template or DEFAULT_TEXT_QA_PROMPT_SEL}
        return {"query_template": self._query_template or _BARE_QUESTION}

    def _update_prompts(self, prompts: PromptDictType) -> None:
        text_qa_template, query_template = prompts.get("text_qa_template"), prompts.get("query_template")
        _require_one_template(text_qa_template, query_template)
        if text_qa_template is not None or query_template is not None:
            self._text_qa_template, self._query_template = text_qa_template, query_template


def _template(given: BasePromptTemplate | str | None) -> BasePromptTemplate | None:
    return PromptTemplate(given) if isinstance(given, str) else given


def _require_one_template(text_qa_template: object, query_template: object) -> None:
    if text_qa_template is not None and query_template is not None:
        raise InvalidInputError(
            "text_qa_template and query_template are both given, but a query has one wording; text_qa_template is "
            "the one that shows the documents."
        )


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
