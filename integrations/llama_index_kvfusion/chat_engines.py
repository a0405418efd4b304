"""LlamaIndex's two context chat engines with the retrieved nodes as separate documents.

Only the synthesizer is replaced. Retrieval, condensing, memory and responses are LlamaIndex's.
"""

from __future__ import annotations

import inspect
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Self

from llama_index.core.base.base_retriever import BaseRetriever
from llama_index.core.base.llms.types import ChatMessage, MessageRole
from llama_index.core.callbacks import CallbackManager
from llama_index.core.chat_engine import CondensePlusContextChatEngine, ContextChatEngine
from llama_index.core.chat_engine.condense_plus_context import DEFAULT_CONTEXT_PROMPT_TEMPLATE
from llama_index.core.chat_engine.context import DEFAULT_CONTEXT_TEMPLATE
from llama_index.core.chat_engine.types import AgentChatResponse, BaseChatEngine, StreamingAgentChatResponse
from llama_index.core.prompts import BasePromptTemplate, PromptTemplate
from llama_index.core.schema import MetadataMode
from llama_index.core.tools import ToolOutput

from kvfusion_rag import InvalidInputError

from .llm import KVFusionLlamaIndexLLM
from .synthesizer import METADATA_KEY, KVFusionSynthesizer, require_own_llm

_DOCUMENTS = "(the documents above)"  # replaces the documents in the context template if the model reads them first
_MESSAGE = PromptTemplate("{query_str}")

# The parent creates synthesizer and response in one method, so the record passes between them in this variable.
_record: ContextVar[dict[str, Any]] = ContextVar("kvfusion_chat_record")


class _TurnSynthesizer(KVFusionSynthesizer):
    """Answers one turn of a conversation.

    A model that reads prompts unchanged gets LlamaIndex's messages: a system message with the context template, the
    documents and the system prompt, then `turns` and the message. For other models the context template is omitted if
    it is LlamaIndex's `default`, which only introduces the documents.
    """

    def __init__(
        self,
        llm: KVFusionLlamaIndexLLM,
        context: BasePromptTemplate,
        default: str,
        system_prompt: str,
        turns: Sequence[ChatMessage],
        **options: Any,
    ) -> None:
        own = "" if context.get_template() == default else context.format(context_str=_DOCUMENTS)
        instruction = "\n\n".join(part.strip() for part in (own, system_prompt) if part.strip())
        system = [ChatMessage(role=llm.metadata.system_role, content=instruction)] if instruction else []
        super().__init__(llm, chat_history=[*system, *turns], **options)
        self._context, self._system_prompt, self._turns = context, system_prompt.strip(), turns
        self.condensed: str | None = None

    def _format(self, **values: Any) -> list[ChatMessage] | str:
        llm = self._fusion_llm
        system = ChatMessage(
            role=llm.metadata.system_role, content=self._context.format(**values) + self._system_prompt
        )
        return llm.format_prompt(_MESSAGE, [system, *self._turns], **values)

    def _standalone(self, query_str: str) -> str:
        return query_str if self._joins_as_llama_index else self.condensed or query_str

    def _new_record(self) -> dict[str, Any]:
        return _record.get({})


class _SeparateDocuments(BaseChatEngine):
    """The base class of both engines, which precedes LlamaIndex's class in the method resolution order.

    ``response.sources[-1].raw_output`` contains mode, sources, citations, usage and timings of the answer. In streams
    it is filled after the last piece. Other responses have it in ``response.metadata["kvfusion"]`` too.
    """

    _llm: KVFusionLlamaIndexLLM
    callback_manager: CallbackManager

    def __init__(
        self,
        retriever: BaseRetriever,
        llm: KVFusionLlamaIndexLLM,
        *arguments: Any,
        metadata_mode: MetadataMode | None = None,
        **options: Any,
    ) -> None:
        """Takes the parent's arguments, and `metadata_mode` as in `KVFusionSynthesizer`."""
        require_own_llm(llm, type(self).__name__)
        parent: Any = super()  # LlamaIndex's engine, which type checkers cannot infer
        parent.__init__(retriever, llm, *arguments, **options)
        self._metadata_mode = metadata_mode

    @classmethod
    def from_defaults(
        cls,
        retriever: BaseRetriever,
        llm: KVFusionLlamaIndexLLM,
        *,
        metadata_mode: MetadataMode | None = None,
        **options: Any,
    ) -> Self:
        """Call the parent's from_defaults with its `options`. An unknown option raises InvalidInputError."""
        parent: Any = super()
        allowed = [name for name in inspect.signature(parent.from_defaults).parameters if name != "kwargs"]
        if unknown := sorted(options.keys() - set(allowed)):
            raise InvalidInputError(
                f"{unknown[0]!r} is not an option of {cls.__name__}; allowed are metadata_mode, {', '.join(allowed)}."
            )
        require_own_llm(llm, cls.__name__)
        engine = parent.from_defaults(retriever=retriever, llm=llm, **options)
        engine._metadata_mode = metadata_mode
        return engine

    def chat(self, message: str, chat_history: list[ChatMessage] | None = None, **options: Any) -> AgentChatResponse:
        """Answer `message`. The last of `response.sources` is the record of the answer."""
        with _fresh_record() as record:
            return _recorded(super().chat(message, chat_history, **options), message, record)

    async def achat(
        self, message: str, chat_history: list[ChatMessage] | None = None, **options: Any
    ) -> AgentChatResponse:
        """Like `chat`, without blocking the event loop."""
        with _fresh_record() as record:
            return _recorded(await super().achat(message, chat_history, **options), message, record)

    def stream_chat(
        self, message: str, chat_history: list[ChatMessage] | None = None, **options: Any
    ) -> StreamingAgentChatResponse:
        """Like `chat`, in pieces. The record is filled after the last piece."""
        with _fresh_record() as record:
            return _recorded(super().stream_chat(message, chat_history, **options), message, record)

    async def astream_chat(
        self, message: str, chat_history: list[ChatMessage] | None = None, **options: Any
    ) -> StreamingAgentChatResponse:
        """Like `stream_chat`, without blocking the event loop."""
        with _fresh_record() as record:
            return _recorded(await super().astream_chat(message, chat_history, **options), message, record)

    @property
    def synthesizer(self) -> KVFusionSynthesizer:
        """The synthesizer for a first message, for `KVFusionPrefill` and `show_prompt`."""
        engine: Any = self  # the method belongs to the subclasses
        return engine._get_response_synthesizer([])

    def _turn(
        self,
        context: BasePromptTemplate,
        default: str,
        system_prompt: str,
        turns: Sequence[ChatMessage],
        streaming: bool,
    ) -> _TurnSynthesizer:
        shared = self.callback_manager
        return _TurnSynthesizer(
            self._llm,
            context,
            default,
            system_prompt,
            turns,
            metadata_mode=self._metadata_mode,
            streaming=streaming,
            callback_manager=shared if shared.handlers else None,
        )


class KVFusionContextChatEngine(_SeparateDocuments, ContextChatEngine):
    """`ContextChatEngine` with separate documents.

    ``KVFusionContextChatEngine.from_defaults(index.as_retriever(), llm)``. An untuned model reads the parent's
    messages: `context_template` with the documents and the system prompt, other prefix messages, the history, and the
    message. `context_refine_template` is not used, because all documents are read at once.

    A tuned model with fixed templates reads the documents first, then system prompt, history and message. A custom
    `context_template` refers to the documents instead of containing them. A model trained on bare questions reads only
    the message.
    """

    def _get_response_synthesizer(self, chat_history: list[ChatMessage], streaming: bool = False) -> _TurnSynthesizer:
        prefix, system_prompt = list(self._prefix_messages), ""
        if prefix and prefix[0].role == MessageRole.SYSTEM:
            system_prompt = prefix.pop(0).content or ""
        turns = [*prefix, *chat_history]
        return self._turn(self._context_template, DEFAULT_CONTEXT_TEMPLATE, system_prompt, turns, streaming)


class KVFusionCondensePlusContextChatEngine(_SeparateDocuments, CondensePlusContextChatEngine):
    """`CondensePlusContextChatEngine` with separate documents.

    The condensed question is used to retrieve. The model reads history and message as in `KVFusionContextChatEngine`.
    """

    def __init__(self, retriever: BaseRetriever, llm: KVFusionLlamaIndexLLM, *arguments: Any, **options: Any) -> None:
        """Raises InvalidInputError if the model reads only bare questions and `skip_condense` is not set."""
        super().__init__(retriever, llm, *arguments, **options)
        if not self._skip_condense and not llm.generator.follows_instructions:
            raise InvalidInputError(
                f"{llm.generator.model_id!r} reads only bare questions and cannot condense a conversation; pass "
                "skip_condense=True to retrieve with the unchanged message."
            )

    def _get_response_synthesizer(self, chat_history: list[ChatMessage], streaming: bool = False) -> _TurnSynthesizer:
        context, system_prompt = self._context_prompt_template, self._system_prompt or ""
        return self._turn(context, DEFAULT_CONTEXT_PROMPT_TEMPLATE, system_prompt, chat_history, streaming)

    def _run_c3(self, *arguments: Any, **options: Any) -> Any:
        return _with_question(super()._run_c3(*arguments, **options))

    async def _arun_c3(self, *arguments: Any, **options: Any) -> Any:
        return _with_question(await super()._arun_c3(*arguments, **options))


@contextmanager
def _fresh_record() -> Generator[dict[str, Any], None, None]:
    record: dict[str, Any] = {}
    token = _record.set(record)
    try:
        yield record
    finally:
        _record.reset(token)


def _recorded(response: Any, message: str, record: dict[str, Any]) -> Any:
    """Add the record to the sources of the parent's response."""
    if response.source_nodes:
        response.sources.append(
            ToolOutput(tool_name=METADATA_KEY, content="", raw_input={"message": message}, raw_output=record)
        )
    if isinstance(response, AgentChatResponse):
        response.metadata = {METADATA_KEY: record}
    return response


def _with_question(prepared: tuple[Any, ToolOutput, Any]) -> tuple[Any, ToolOutput, Any]:
    """Give the synthesizer the condensed question, which a model without the history can understand."""
    synthesizer, retrieved, _ = prepared
    synthesizer.condensed = retrieved.raw_input["message"].strip()
    return prepared
