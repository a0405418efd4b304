"""`KVFusionSynthesizer`: a LlamaIndex response synthesizer that passes on each node as a separate document.

It overrides as little as possible, so that LlamaIndex's events, callbacks and empty responses are unchanged.
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

from kvfusion_rag import Document, InvalidInputError, ShownPrompt, check_option_names

from .documents import stripped, to_documents
from .llm import KVFusionLlamaIndexLLM
from .marks import QUESTION_MARK, ContextMarks

METADATA_KEY = "kvfusion"
"""Key of the answer's record in `response.metadata`."""

_BARE_QUESTION = PromptTemplate("{query_str}")


class KVFusionSynthesizer(BaseSynthesizer):
    """Answers a query from nodes, each as a separate document, with LlamaIndex's templates.

    In mode "concat", the default of untuned models, the model reads the same tokens as with LlamaIndex's `compact`
    synthesizer if the nodes fit into one prompt. Otherwise a ContextLimitError is raised, because answers are not
    refined in several calls. In modes "fusion" and "ape" the order of the nodes does not change the answer.

    ``response.metadata["kvfusion"]`` contains mode, sources, citations, usage and timings. Node ids are the document
    ids. In streams it is empty until the last piece has been read.
    """

    @check_option_names()
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
        """Takes a KVFusionLlamaIndexLLM, because other LLMs do not read separate documents.

        text_qa_template: a template with ``{context_str}`` and ``{query_str}``. The documents replace
            ``{context_str}``. The default is LlamaIndex's template, or the question template of a tuned model with
            fixed templates.
        query_template: a template with ``{query_str}`` and without the documents, instead of `text_qa_template`. The
            documents are appended to the system message. A ChatPromptTemplate gives several messages.
        chat_history: messages before the query, which the chat engines of this package set.
        metadata_mode: LLM adds LlamaIndex's "key: value" header to each text, as LlamaIndex's synthesizers do. NONE
            gives the bare text, and ``metadata["title"]`` if the model's template has a title; citations are then
            offsets into the node's text, and equal texts share one stored KV. The default is LLM for a model that
            reads prompts unchanged, and NONE for a tuned model with fixed templates.
        callback_manager: set on the LLM too. With None, the LLM keeps its own if it has handlers. Otherwise both use
            the one in `Settings`, as LlamaIndex's synthesizers do.

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
        """The metadata that the model reads with a node's text."""
        if self._metadata_mode is not None:
            return self._metadata_mode
        return MetadataMode.LLM if self._fusion_llm.reads_prompt else MetadataMode.NONE

    def to_documents(self, nodes: Sequence[BaseNode | NodeWithScore]) -> list[Document]:
        """Convert `nodes` into the documents of a query."""
        if not self._joins_as_llama_index:
            return to_documents(nodes, self.metadata_mode)
        # The template does not contain titles, so they only appear in the answer's record.
        return [stripped(document) for document in to_documents(nodes, self.metadata_mode, titles=True)]

    def prefill_arguments(self) -> dict[str, Any]:
        """Return the arguments of the generator's `prefill` and `prefetch` for documents of later queries."""
        call = self._call(QUESTION_MARK, [], {})
        request = self._fusion_llm.request(call.pop("messages", None) or call.pop("prompt"), **call)
        return {name: request[name] for name in ("prompt", "question", "chat_template_kwargs")}

    def show_prompt(self, query: str, nodes: Sequence[BaseNode | NodeWithScore]) -> ShownPrompt:
        """Return the complete prompt for `query` over `nodes`."""
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
        """Return a query engine over an index or a retriever.

        `retriever_options`, such as similarity_top_k, are passed to as_retriever of an index. Unlike
        ``index.as_query_engine`` this does not need a default LLM. For streaming use
        ``KVFusionSynthesizer(llm, streaming=True)``.
        """
        if "streaming" in retriever_options:
            raise InvalidInputError(
                "'streaming' is an option of the synthesizer: KVFusionSynthesizer(llm, streaming=True)."
            )
        if isinstance(index_or_retriever, BaseIndex):
            retriever = index_or_retriever.as_retriever(**retriever_options)
        elif retriever_options:
            raise InvalidInputError(
                f"{min(retriever_options)!r} is only an option for an index; set it on the retriever itself."
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
        """Answer `query` from `nodes`, and add the answer's record to the response."""
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
        """Return the answer's text, or a generator of its pieces when streaming.

        `documents` replace `text_chunks` if they are given. `record` is filled when the answer is complete.
        `response_kwargs` are further variables of the template.
        """
        call = self._call(query_str, text_chunks if documents is None else documents, response_kwargs)
        record = {} if record is None else record
        # Chat engines change `_streaming` between two calls.
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
        """Like `get_response`, with an async generator when streaming."""
        call = self._call(query_str, text_chunks if documents is None else documents, response_kwargs)
        record = {} if record is None else record
        llm, chats = self._fusion_llm, "messages" in call
        if self._streaming:
            return _apieces(await (llm.astream_chat(**call) if chats else llm.astream_complete(**call)), record)
        return _text(await (llm.achat(**call) if chats else llm.acomplete(**call)), record)

    def _call(
        self, query_str: str, documents: Sequence[Document | str], template_values: dict[str, Any]
    ) -> dict[str, Any]:
        """Return the arguments of the LLM's `chat` if the prompt consists of messages, or else of its `complete`."""
        values = {"query_str": query_str, **template_values}
        if self._joins_as_llama_index:
            documents = [stripped(document) for document in to_documents(documents)]
        prompt = self._around_documents(values) if self._shows_documents else self._without_documents(values)
        return {"question": self._standalone(query_str), "documents": list(documents), **prompt}

    def _around_documents(self, values: dict[str, Any]) -> dict[str, Any]:
        """Format a template that contains the documents, and find their place in it."""
        marks = ContextMarks()
        prompt = self._format(**values, context_str=marks.text)
        if isinstance(prompt, str):
            text, place = marks.remove(prompt)
            return {"prompt": text, "formatted": True, "documents_place": place}
        messages, message_place = marks.remove_from_messages(prompt)
        return {"messages": messages, "documents_place": message_place}

    def _without_documents(self, values: dict[str, Any]) -> dict[str, Any]:
        """Format a query template."""
        llm, template, history = self._fusion_llm, self._query_template or _BARE_QUESTION, self._chat_history
        if llm.reads_prompt:
            prompt = llm.format_prompt(template, history, **values)
        elif history or len(template.format_messages(llm=llm, **values)) > 1:
            prompt = llm.format_messages(template, history, **values)
        else:
            prompt = llm.format_text(template, **values)
        return {"prompt": prompt, "formatted": True} if isinstance(prompt, str) else {"messages": prompt}

    def _format(self, **values: Any) -> list[ChatMessage] | str:
        """Return the prompt that LlamaIndex's own synthesizer would send to the LLM."""
        template = self._text_qa_template or DEFAULT_TEXT_QA_PROMPT_SEL
        return self._fusion_llm.format_prompt(template, self._chat_history, **values)

    @property
    def _shows_documents(self) -> bool:
        """Whether the template contains the documents."""
        return self._query_template is None and (self._text_qa_template is not None or self._fusion_llm.reads_prompt)

    @property
    def _joins_as_llama_index(self) -> bool:
        """Whether the prompt contains the documents' texts joined as in LlamaIndex."""
        return self._shows_documents and self._fusion_llm.reads_prompt

    def _standalone(self, query_str: str) -> str:
        """Return the question for models that do not read the conversation."""
        return query_str

    def _new_record(self) -> dict[str, Any]:
        """Return the dictionary that receives the next answer's record."""
        return {}

    def _get_prompts(self) -> PromptDictType:
        """Return the template in use."""
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
            "text_qa_template and query_template are both given, but only one is used; pass text_qa_template if it "
            "contains the documents."
        )


def require_own_llm(llm: object, user: str) -> None:
    """Raise InvalidInputError for an LLM that does not take separate documents."""
    if not isinstance(llm, KVFusionLlamaIndexLLM):
        raise InvalidInputError(
            f"llm is a {type(llm).__name__}, but {user} needs a KVFusionLlamaIndexLLM, which takes separate documents."
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
    """Copy the record of a response. Only the last chunk of a stream has one."""
    record.update(cast("dict[str, Any] | None", response.raw) or {})


def _with_record(response: RESPONSE_TYPE, nodes: list[NodeWithScore], record: dict[str, Any]) -> RESPONSE_TYPE:
    if nodes:
        response.metadata = {**(response.metadata or {}), METADATA_KEY: record}
    return response
