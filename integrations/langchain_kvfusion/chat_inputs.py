"""DocumentChatModel: a chat model whose calls take ``documents=``.

All calls (generate, batch, stream, each sync and async) attach the documents to the messages, so that traces,
callbacks and LangChain's response cache see the same form.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing
from typing import Any

from langchain_core.callbacks import Callbacks
from langchain_core.language_models import LanguageModelInput
from langchain_core.language_models.chat_models import BaseChatModel
from langchain_core.messages import AIMessageChunk, BaseMessage
from langchain_core.outputs import LLMResult
from langchain_core.prompt_values import ChatPromptValue, PromptValue
from langchain_core.runnables import RunnableConfig
from langchain_core.runnables.config import ensure_config

from .batches import DocumentBatches
from .capture import retrieved_for_each
from .conversations import carry, gather
from .documents import DocumentsArgument, documents_per_prompt, is_nested
from .fused import FusedPrompt, FusedPromptValue
from .prompts import KVFusionPromptValue


class DocumentChatModel(DocumentBatches, BaseChatModel):
    """A BaseChatModel whose calls take ``documents=``. ``_generate`` and ``_stream`` receive them in the messages."""

    def _convert_input(self, model_input: LanguageModelInput) -> PromptValue:
        if isinstance(model_input, KVFusionPromptValue):
            return ChatPromptValue(messages=model_input.conversation())
        if isinstance(model_input, FusedPromptValue):
            model_input = model_input.fused
        if isinstance(model_input, FusedPrompt):
            return ChatPromptValue(messages=carry(model_input.messages, model_input.documents, model_input.question))
        return super()._convert_input(model_input)

    def _carrying(
        self,
        model_input: LanguageModelInput,
        documents: DocumentsArgument | None,
        callbacks: Any = None,
        *,
        keeps_calls: bool = False,
    ) -> list[BaseMessage]:
        messages = self._convert_input(model_input).to_messages()
        return gathered([messages], documents, callbacks, keeps_calls=keeps_calls)[0]

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
        """Like BaseChatModel.generate. ``documents`` is one list for all prompts, or one list per prompt."""
        gathered_messages = gathered(messages, documents, callbacks, keeps_calls=bool(kwargs.get("tools")))
        return super().generate(gathered_messages, stop, callbacks, **kwargs)

    async def agenerate(
        self,
        messages: list[list[BaseMessage]],
        stop: list[str] | None = None,
        callbacks: Callbacks = None,
        *,
        documents: DocumentsArgument | None = None,
        **kwargs: Any,
    ) -> LLMResult:
        """Like :meth:`generate`, without blocking the event loop."""
        gathered_messages = gathered(messages, documents, callbacks, keeps_calls=bool(kwargs.get("tools")))
        return await super().agenerate(gathered_messages, stop, callbacks, **kwargs)

    def _distribute(
        self, inputs: list[Any], config: Any, documents: DocumentsArgument | None, options: dict[str, Any]
    ) -> tuple[list[Any], dict[str, Any]]:
        """Attach nested documents to their inputs, or pass a flat list on as an option."""
        if not is_nested(documents):
            return inputs, options if documents is None else {**options, "documents": documents}
        shares = documents_per_prompt(documents, len(inputs))
        keeps_calls = bool(options.get("tools"))
        return [
            self._carrying(each, [*share], keeps_calls=keeps_calls) for each, share in zip(inputs, shares, strict=True)
        ], options

    def stream(
        self,
        input: LanguageModelInput,
        config: RunnableConfig | None = None,
        *,
        stop: list[str] | None = None,
        documents: DocumentsArgument | None = None,
        **kwargs: Any,
    ) -> Iterator[AIMessageChunk]:
        """Yield the answer in chunks. The last one has the metadata. The sum of all chunks is the whole message."""
        callbacks, keeps_calls = ensure_config(config).get("callbacks"), bool(kwargs.get("tools"))
        carrying = self._carrying(input, documents, callbacks, keeps_calls=keeps_calls)
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
        """Like :meth:`stream`, without blocking the event loop."""
        callbacks, keeps_calls = ensure_config(config).get("callbacks"), bool(kwargs.get("tools"))
        carrying = self._carrying(input, documents, callbacks, keeps_calls=keeps_calls)
        pieces: Any = super().astream(carrying, config, stop=stop, **kwargs)
        async with aclosing(pieces):
            async for piece in pieces:
                yield piece


def gathered(
    prompts: list[list[BaseMessage]],
    documents: DocumentsArgument | None,
    callbacks: Any = None,
    *,
    keeps_calls: bool = False,
) -> list[list[BaseMessage]]:
    """Return each prompt's messages with its ``documents``, or with those of an active capture; see ``gather``."""
    shares = documents_per_prompt(documents, len(prompts))
    retrieved = retrieved_for_each(callbacks, len(prompts))
    return [gather(*each, keeps_calls=keeps_calls) for each in zip(prompts, shares, retrieved, strict=True)]
