"""LlamaIndex's two context chat engines, with the retrieved nodes as separate documents.

They replace the synthesizer only. Retrieval, condensing, memory and responses stay LlamaIndex's.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
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

_DOCUMENTS = "(the documents above)"  # in a caller's context template, for models that do not read it in place
_MESSAGE = PromptTemplate("{query_str}")

# The parents build synthesizer and response inside one method; this is how the record of the first reaches the second.
_record: ContextVar[dict[str, Any]] = ContextVar("kvfusion_chat_record")


class _TurnSynthesizer(KVFusionSynthesizer):
    """Answers one turn of a conversation.

    A model that reads prompts unchanged reads what LlamaIndex's engine sends: the context template with the documents
    and the system prompt in one system message, then `turns` and the message. For other models, `default` names the
    context template that only announces the documents, which is left out.
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

    def _word(self, **values: Any) -> list[ChatMessage] | str:
        llm = self._fusion_llm
        system = ChatMessage(
            role=llm.metadata.system_role, content=self._context.format(**values) + self._system_prompt
        )
        return llm.word(_MESSAGE, [system, *self._turns], **values)

    def _standalone(self, query_str: str) -> str:
        return query_str if self._joins_as_llama_index else self.condensed or query_str

    def _new_record(self) -> dict[str, Any]:
        return _record.get({})


class _SeparateDocuments(BaseChatEngine):
    """The common part of both engines, which comes before LlamaIndex's class.

    ``response.sources[-1].raw_output`` holds mode, sources, citations, usage and timings of the answer; in streams it
    is filled with the last piece. Responses that do not stream have it in ``response.metadata["kvfusion"]`` too.
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
        """Everything but `metadata_mode` (see `KVFusionSynthesizer`) is the parent's."""
        require_own_llm(llm, type(self).__name__)
        parent: Any = super()  # LlamaIndex's engine, which the types cannot know
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
        """The parent's from_defaults, which knows the `options`; an unknown one raises InvalidInputError."""
        parent: Any = super()
        allowed = [name for name in inspect.signature(parent.from_defaults).parameters if name != "kwargs"]
        if unknown := sorted(options.keys() - set(allowed)):
            raise InvalidInputError(
                f"Unknown option {unknown[0]!r} for {cls.__name__}; allowed are metadata_mode, {', '.join(allowed)}."
            )
        require_own_llm(llm, cls.__name__)
        engine = parent.from_defaults(retriever=retriever, llm=llm, **options)
        engine._metadata_mode = metadata_mode
        return engine

    def chat(self, message: str, chat_history: list[ChatMessage] | None = None, **options: Any) -> AgentChatResponse:
        """The parent's chat; the record of the answer is the last of `response.sources`."""
        with _fresh_record() as record:
            return _recorded(super().chat(message, chat_history, **options), message, record)

    async def achat(
        self, message: str, chat_history: list[ChatMessage] | None = None, **options: Any
    ) -> AgentChatResponse:
        """Like `chat`, while the event loop stays free."""
        with _fresh_record() as record:
            return _recorded(await super().achat(message, chat_history, **options), message, record)

    def stream_chat(
        self, message: str, chat_history: list[ChatMessage] | None = None, **options: Any
    ) -> StreamingAgentChatResponse:
        """Like `chat`, piece by piece; the record is filled when the last piece was read."""
        with _fresh_record() as record:
            return _recorded(super().stream_chat(message, chat_history, **options), message, record)

    async def astream_chat(
        self, message: str, chat_history: list[ChatMessage] | None = None, **options: Any
    ) -> StreamingAgentChatResponse:
        """Like `stream_chat`; each piece is computed in a worker thread."""
        with _fresh_record() as record:
            return _recorded(await super().astream_chat(message, chat_history, **options), message, record)

    @property
    def synthesizer(self) -> KVFusionSynthesizer:
        """The synthesizer of a first message, for `KVFusionPrefill` and `show_prompt`."""
        engine: Any = self  # the parent's hook, which the types cannot know
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

    Use it as the parent: ``KVFusionContextChatEngine.from_defaults(index.as_retriever(), llm)``. An untuned model
    reads the messages that the parent sends: `context_template` with the documents and the system prompt, other prefix
    messages, the history, and the message. `context_refine_template` is not used, because all documents are read at
    once.

    A tuned model with fixed templates reads documents first, then system prompt, history and message. A caller's
    `context_template` then has a reference to the documents in place of ``{context_str}``. A model trained on bare
    questions reads the message only.
    """

    def _get_response_synthesizer(self, chat_history: list[ChatMessage], streaming: bool = False) -> _TurnSynthesizer:
        prefix, system_prompt = list(self._prefix_messages), ""
        if prefix and prefix[0].role == MessageRole.SYSTEM:
            system_prompt = prefix.pop(0).content or ""
        turns = [*prefix, *chat_history]
        return self._turn(self._context_template, DEFAULT_CONTEXT_TEMPLATE, system_prompt, turns, streaming)


class KVFusionCondensePlusContextChatEngine(_SeparateDocuments, CondensePlusContextChatEngine):
    """`CondensePlusContextChatEngine` with separate documents.

    The condensed question retrieves. The model reads history and message, as in `KVFusionContextChatEngine`.
    """

    def __init__(self, retriever: BaseRetriever, llm: KVFusionLlamaIndexLLM, *arguments: Any, **options: Any) -> None:
        """Raises InvalidInputError for a model that reads bare questions only, unless `skip_condense` is set, because
        such a model cannot condense a conversation."""
        super().__init__(retriever, llm, *arguments, **options)
        if not self._skip_condense and not llm.generator.follows_instructions:
            raise InvalidInputError(
                f"{llm.generator.model_id!r} reads bare questions and cannot condense a conversation into one; pass "
                "skip_condense=True, which retrieves with the message as it stands."
            )

    def _get_response_synthesizer(self, chat_history: list[ChatMessage], streaming: bool = False) -> _TurnSynthesizer:
        context, system_prompt = self._context_prompt_template, self._system_prompt or ""
        return self._turn(context, DEFAULT_CONTEXT_PROMPT_TEMPLATE, system_prompt, chat_history, streaming)

    def _run_c3(self, *arguments: Any, **options: Any) -> Any:
        return _with_question(super()._run_c3(*arguments, **options))

    async def _arun_c3(self, *arguments: Any, **options: Any) -> Any:
        return _with_question(await super()._arun_c3(*arguments, **options))


@contextmanager
def _fresh_record() -> Iterator[dict[str, Any]]:
    record: dict[str, Any] = {}
    token = _record.set(record)
    try:
        yield record
    finally:
        _record.reset(token)


def _recorded(response: Any, message: str, record: dict[str, Any]) -> Any:
    """The parent's response, whole or a stream, with the record among its sources."""
    if response.source_nodes:
        response.sources.append(
            ToolOutput(tool_name=METADATA_KEY, content="", raw_input={"message": message}, raw_output=record)
        )
    if isinstance(response, AgentChatResponse):
        response.metadata = {METADATA_KEY: record}
    return response


def _with_question(prepared: tuple[Any, ToolOutput, Any]) -> tuple[Any, ToolOutput, Any]:
    """Bare-question models and the record are given the condensed question, which stands without its history."""
    synthesizer, retrieved, _ = prepared
    synthesizer.condensed = retrieved.raw_input["message"].strip()
    return prepared
