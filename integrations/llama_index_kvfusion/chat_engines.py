"""LlamaIndex's two context chat engines, with retrieved nodes as separate documents and earlier turns as turns.

The stock engines join all nodes into the system prompt. These exchange the synthesizer alone: retrieval, condensing,
memory and responses stay LlamaIndex's. What a turn reads is decided here; how it is asked, by the synthesizer.
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
from llama_index.core.prompts import BasePromptTemplate
from llama_index.core.schema import MetadataMode
from llama_index.core.tools import ToolOutput

from kvfusion_rag import InvalidInputError

from .llm import KVFusionLlamaIndexLLM
from .synthesizer import METADATA_KEY, KVFusionSynthesizer, require_own_llm

_DOCUMENTS = "(the documents above)"  # what a caller's context template says in the place of their texts

# The parents build synthesizer and response inside one method; this is how the record of the first reaches the second.
_record: ContextVar[dict[str, Any]] = ContextVar("kvfusion_chat_record")


class _TurnSynthesizer(KVFusionSynthesizer):
    """Answers one turn, in its conversation."""

    def __init__(self, llm: KVFusionLlamaIndexLLM, **options: Any) -> None:
        super().__init__(llm, **options)
        self.condensed: str | None = None

    def _standalone(self, query_str: str) -> str:
        return self.condensed or query_str

    def _new_record(self) -> dict[str, Any]:
        return _record.get()


class _SeparateDocuments(BaseChatEngine):
    """What both engines have in common; stands before LlamaIndex's class.

    ``response.sources[-1].raw_output`` holds mode, sources, citations, usage and timings of the answer (in streams
    from the last piece on), and so does ``response.metadata["kvfusion"]`` where it does not stream.
    """

    _llm: KVFusionLlamaIndexLLM
    callback_manager: CallbackManager

    def __init__(
        self,
        retriever: BaseRetriever,
        llm: KVFusionLlamaIndexLLM,
        *arguments: Any,
        metadata_mode: MetadataMode = MetadataMode.NONE,
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
        metadata_mode: MetadataMode = MetadataMode.NONE,
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

    def _synthesizer(self, said: Sequence[ChatMessage], streaming: bool) -> _TurnSynthesizer:
        shared = self.callback_manager
        return _TurnSynthesizer(
            self._llm,
            chat_history=said,
            metadata_mode=self._metadata_mode,
            streaming=streaming,
            callback_manager=shared if shared.handlers else None,
        )

    def _system(self, template: BasePromptTemplate, default: str, system_prompt: str) -> list[ChatMessage]:
        """What the system says: the caller's own context template and the system prompt. LlamaIndex's default
        template only announces the documents' texts, so it is left out."""
        own = "" if template.get_template() == default else template.format(context_str=_DOCUMENTS)
        text = "\n\n".join(part.strip() for part in (own, system_prompt) if part.strip())
        return [ChatMessage(role=self._llm.metadata.system_role, content=text)] if text else []


class KVFusionContextChatEngine(_SeparateDocuments, ContextChatEngine):
    """`ContextChatEngine` whose nodes are separate documents and whose history reaches the model as turns.

    Use it as the parent: ``KVFusionContextChatEngine.from_defaults(index.as_retriever(), llm)``. The system prompt and
    other prefix messages come first, then the history, then the message. A caller's `context_template` is read with a
    reference to the documents in the place of ``{context_str}``; `context_refine_template` is not needed, since all
    documents are read at once. A model trained on bare questions reads the message alone.
    """

    def _get_response_synthesizer(self, chat_history: list[ChatMessage], streaming: bool = False) -> _TurnSynthesizer:
        prefix, system_prompt = list(self._prefix_messages), ""
        if prefix and prefix[0].role == MessageRole.SYSTEM:
            system_prompt = prefix.pop(0).content or ""
        system = self._system(self._context_template, DEFAULT_CONTEXT_TEMPLATE, system_prompt)
        return self._synthesizer([*system, *prefix, *chat_history], streaming)


class KVFusionCondensePlusContextChatEngine(_SeparateDocuments, CondensePlusContextChatEngine):
    """`CondensePlusContextChatEngine` whose nodes are separate documents and whose history reaches the model as turns.

    The condensed question retrieves; the model reads history and message. The rest is as in
    `KVFusionContextChatEngine`.
    """

    def __init__(self, retriever: BaseRetriever, llm: KVFusionLlamaIndexLLM, *arguments: Any, **options: Any) -> None:
        """Raises InvalidInputError for a model that reads bare questions alone, unless `skip_condense` is set: it
        would answer the instruction to condense with something else."""
        super().__init__(retriever, llm, *arguments, **options)
        if not self._skip_condense and not llm.generator.follows_instructions:
            raise InvalidInputError(
                f"{llm.generator.model_id!r} reads bare questions and cannot condense a conversation into one; pass "
                "skip_condense=True, which retrieves with the message as it stands."
            )

    def _get_response_synthesizer(self, chat_history: list[ChatMessage], streaming: bool = False) -> _TurnSynthesizer:
        system = self._system(
            self._context_prompt_template, DEFAULT_CONTEXT_PROMPT_TEMPLATE, self._system_prompt or ""
        )
        return self._synthesizer([*system, *chat_history], streaming)

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
