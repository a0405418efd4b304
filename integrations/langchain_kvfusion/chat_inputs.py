"""What callers give a chat model: prompts, messages and documents, brought into messages that carry their documents.

Every way of calling (generate, batch, stream, each sync and async) takes ``documents=``. So traces, callbacks and
LangChain's response cache see one form of them. How a model answers is its subclass's business.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing
from typing import Any

from langchain_core.callbacks import Callbacks
from langchain_core.language_models import LanguageModelInput
from langchain_core.language_models.chat_models import BaseChatModel
from langchain_core.messages import AIMessage, AIMessageChunk, BaseMessage
from langchain_core.outputs import LLMResult
from langchain_core.prompt_values import ChatPromptValue, PromptValue
from langchain_core.runnables import RunnableConfig
from langchain_core.runnables.config import ensure_config

from kvfusion_rag import InvalidInputError

from .capture import retrieved_for_each
from .conversations import carry, gather
from .documents import DocumentsArgument, documents_per_prompt, is_nested
from .fused import FusedPrompt, FusedPromptValue
from .prompts import KVFusionPromptValue


class DocumentChatModel(BaseChatModel):
    """A BaseChatModel whose calls take ``documents=``; ``_generate`` and ``_stream`` get them inside the messages."""

    def _convert_input(self, model_input: LanguageModelInput) -> PromptValue:
        if isinstance(model_input, KVFusionPromptValue):
            return ChatPromptValue(messages=model_input.conversation())
        if isinstance(model_input, FusedPromptValue):
            model_input = model_input.fused
        if isinstance(model_input, FusedPrompt):
            return ChatPromptValue(messages=carry(model_input.messages, model_input.documents, model_input.question))
        return super()._convert_input(model_input)

    def _carrying(
        self, model_input: LanguageModelInput, documents: DocumentsArgument | None, callbacks: Any = None
    ) -> list[BaseMessage]:
        return gathered([self._convert_input(model_input).to_messages()], documents, callbacks)[0]

    def generate_prompt(
        self, prompts: list[PromptValue], stop: list[str] | None = None, callbacks: Callbacks = None, **kwargs: Any
    ) -> LLMResult:
        return super().generate_prompt([self._convert_input(p) for p in prompts], stop, callbacks, **kwargs)

    async def agenerate_prompt(
        self, prompts: list[PromptValue], stop: list[str] | None = None, callbacks: Callbacks = None, **kwargs: Any
    ) -> LLMResult:
        return await super().agenerate_prompt([self._convert_input(p) for p in prompts], stop, callbacks, **kwargs)

    def generate(
        self,
        messages: list[list[BaseMessage]],
        stop: list[str] | None = None,
        callbacks: Callbacks = None,
        *,
        documents: DocumentsArgument | None = None,
        **kwargs: Any,
    ) -> LLMResult:
        """As BaseChatModel's, with ``documents``: one list for every prompt, or a list of lists, one for each."""
        return super().generate(gathered(messages, documents, callbacks), stop, callbacks, **kwargs)

    async def agenerate(
        self,
        messages: list[list[BaseMessage]],
        stop: list[str] | None = None,
        callbacks: Callbacks = None,
        *,
        documents: DocumentsArgument | None = None,
        **kwargs: Any,
    ) -> LLMResult:
        """As :meth:`generate`; the event loop stays free."""
        return await super().agenerate(gathered(messages, documents, callbacks), stop, callbacks, **kwargs)

    def batch(
        self,
        inputs: list[LanguageModelInput],
        config: RunnableConfig | list[RunnableConfig] | None = None,
        *,
        return_exceptions: bool = False,
        documents: DocumentsArgument | None = None,
        **kwargs: Any,
    ) -> list[AIMessage]:
        """As BaseChatModel's, with ``documents``: one list for every input, or a list of lists, one for each."""
        try:
            dealt, rest = self._deal(inputs, documents, kwargs)
        except InvalidInputError as error:
            if return_exceptions:
                return [error for _ in inputs]  # pyright: ignore[reportReturnType]
            raise
        return super().batch(dealt, config, return_exceptions=return_exceptions, **rest)

    async def abatch(
        self,
        inputs: list[LanguageModelInput],
        config: RunnableConfig | list[RunnableConfig] | None = None,
        *,
        return_exceptions: bool = False,
        documents: DocumentsArgument | None = None,
        **kwargs: Any,
    ) -> list[AIMessage]:
        """As :meth:`batch`; the event loop stays free."""
        try:
            dealt, rest = self._deal(inputs, documents, kwargs)
        except InvalidInputError as error:
            if return_exceptions:
                return [error for _ in inputs]  # pyright: ignore[reportReturnType]
            raise
        return await super().abatch(dealt, config, return_exceptions=return_exceptions, **rest)

    def _deal(
        self, inputs: list[LanguageModelInput], documents: DocumentsArgument | None, given: dict[str, Any]
    ) -> tuple[list[Any], dict[str, Any]]:
        if not is_nested(documents):
            return inputs, given if documents is None else {**given, "documents": documents}
        shares = documents_per_prompt(documents, len(inputs))
        return [self._carrying(each, [*share]) for each, share in zip(inputs, shares, strict=True)], given

    def stream(
        self,
        input: LanguageModelInput,
        config: RunnableConfig | None = None,
        *,
        stop: list[str] | None = None,
        documents: DocumentsArgument | None = None,
        **kwargs: Any,
    ) -> Iterator[AIMessageChunk]:
        """Pieces of the answer; added up they are the answer, and the last one has all that is known of it."""
        carrying = self._carrying(input, documents, ensure_config(config).get("callbacks"))
        yield from super().stream(carrying, config, stop=stop, **kwargs)

    async def astream(
        self,
        input: LanguageModelInput,
        config: RunnableConfig | None = None,
        *,
        stop: list[str] | None = None,
        documents: DocumentsArgument | None = None,
        **kwargs: Any,
    ) -> AsyncIterator[AIMessageChunk]:
        """As :meth:`stream`; the event loop stays free."""
        carrying = self._carrying(input, documents, ensure_config(config).get("callbacks"))
        pieces: Any = super().astream(carrying, config, stop=stop, **kwargs)
        async with aclosing(pieces):
            async for piece in pieces:
                yield piece


def gathered(
    prompts: list[list[BaseMessage]], documents: DocumentsArgument | None, callbacks: Any = None
) -> list[list[BaseMessage]]:
    """Each prompt's messages with its share of ``documents``, or with what an open capture knows; see ``gather``."""
    shares = documents_per_prompt(documents, len(prompts))
    retrieved = retrieved_for_each(callbacks, len(prompts))
    return [gather(*each) for each in zip(prompts, shares, retrieved, strict=True)]
