"""KVFusionLLM: a KVFusionGenerator as a LangChain LLM that takes separate documents."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import aclosing
from typing import TYPE_CHECKING, Any

from langchain_core.caches import BaseCache
from langchain_core.callbacks import AsyncCallbackManagerForLLMRun, CallbackManagerForLLMRun, Callbacks
from langchain_core.documents import Document
from langchain_core.globals import get_llm_cache
from langchain_core.language_models import LanguageModelInput
from langchain_core.language_models.base import LangSmithParams
from langchain_core.language_models.llms import BaseLLM
from langchain_core.messages import convert_to_messages
from langchain_core.outputs import Generation, GenerationChunk, LLMResult
from langchain_core.prompt_values import ChatPromptValue, PromptValue
from langchain_core.runnables import RunnableConfig
from langchain_core.runnables.config import ensure_config, get_config_list
from pydantic import PrivateAttr

from kvfusion_rag import Answer

from .backed import STRICT_FIELDS, GeneratorBacked
from .batches import DocumentBatches
from .cache import DocumentAwareCache
from .capture import retrieved_for, retrieved_for_each
from .conversations import fuse_messages
from .documents import DocumentsArgument, documents_per_prompt, is_nested
from .fused import FusedPrompt, FusedPromptValue, fuse_prompt
from .options import call_options, generation_info, total_usage

if TYPE_CHECKING:
    from kvfusion_rag import AnswerStream

_RUN_ARGUMENTS = ("tags", "metadata", "run_name", "run_id")  # arguments of BaseLLM.generate that are not options


class KVFusionLLM(GeneratorBacked, DocumentBatches, BaseLLM):
    """An LLM that keeps documents separate. Create it with :meth:`from_model_id` or from a loaded ``generator``.

    Documents are part of the prompt (``KVFusionPrompt``, ``create_kvfusion_documents_chain``, chat messages, or
    ``KVFusionDocumentPrompt`` in standard chains) or of the call: ``llm.invoke("Who ...?", documents=[...])``. A list
    of lists has the documents of each prompt in a batch.

    An untuned model reads the prompt unchanged, with the documents in their place. A string is one user message of the
    chat template, or plain text if the model has no chat template. Chat messages remain messages. :meth:`show_prompt`
    returns the prompt.

    Every call also takes ``stop``, ``temperature``, ``max_tokens`` (or ``max_new_tokens``), ``max_reasoning_tokens``,
    ``top_p``, ``top_k``, ``seed``, ``mode``, ``focus``, ``attribution``, ``min_support`` and
    ``chat_template_kwargs``. None keeps the value set here, except that ``focus=None`` keeps all documents. An unknown
    name raises InvalidInputError.

    ``generation_info`` contains token counts, sources, citations and reasoning. Streams have it on the last chunk.
    Traces and callbacks show the prompt with the documents, as for any other model.
    """

    model_config = STRICT_FIELDS

    _call_options: dict[str, Any] = PrivateAttr(default_factory=dict)

    @property
    def _llm_type(self) -> str:
        return "kvfusion"

    @property
    def _identifying_params(self) -> dict[str, Any]:
        return {**super()._identifying_params, **self._call_options}

    def _get_ls_params(self, stop: list[str] | None = None, **kwargs: Any) -> LangSmithParams:
        return self._add_model_params(super()._get_ls_params(stop=stop or self.stop, **kwargs), kwargs)

    def _convert_input(self, model_input: LanguageModelInput) -> PromptValue:
        return self._convert(model_input, retrieved_for(ensure_config().get("callbacks")))

    def _convert(self, model_input: LanguageModelInput, retrieved: Sequence[Document]) -> PromptValue:
        if isinstance(model_input, FusedPrompt):
            return FusedPromptValue(fused=model_input)
        if isinstance(model_input, ChatPromptValue):
            return FusedPromptValue(fused=fuse_messages(model_input.messages, retrieved))
        if isinstance(model_input, Sequence) and not isinstance(model_input, str):
            messages = convert_to_messages(model_input)
            return FusedPromptValue(fused=fuse_messages(messages, retrieved))
        return super()._convert_input(model_input)

    def _convert_all(self, inputs: Sequence[Any], callbacks: Any) -> list[PromptValue]:
        retrieved = retrieved_for_each(callbacks, len(inputs))
        return [self._convert(model_input, found) for model_input, found in zip(inputs, retrieved, strict=True)]

    def _with_documents(
        self, inputs: Sequence[LanguageModelInput], documents: DocumentsArgument | None, callbacks: Any = None
    ) -> list[FusedPromptValue]:
        texts = [value.to_string() for value in self._convert_all(inputs, callbacks)]
        return [FusedPromptValue(fused=fused) for fused in self._fuse(texts, documents, callbacks)]

    def _fuse(
        self, prompts: Sequence[str], documents: DocumentsArgument | None = None, callbacks: Any = None
    ) -> list[FusedPrompt]:
        shares = documents_per_prompt(documents, len(prompts))
        retrieved = retrieved_for_each(callbacks, len(prompts))
        fused = [fuse_prompt(*each) for each in zip(prompts, shares, retrieved, strict=True)]
        self._check_documents(all_have_documents=all(prompt.documents for prompt in fused))
        return fused

    def generate_prompt(
        self,
        prompts: list[PromptValue],
        stop: list[str] | None = None,
        callbacks: Callbacks | list[Callbacks] | None = None,
        **kwargs: Any,
    ) -> LLMResult:
        return super().generate_prompt(self._convert_all(prompts, callbacks), stop, callbacks, **kwargs)

    async def agenerate_prompt(
        self,
        prompts: list[PromptValue],
        stop: list[str] | None = None,
        callbacks: Callbacks | list[Callbacks] | None = None,
        **kwargs: Any,
    ) -> LLMResult:
        return await super().agenerate_prompt(self._convert_all(prompts, callbacks), stop, callbacks, **kwargs)

    def generate(
        self,
        prompts: list[str],
        stop: list[str] | None = None,
        callbacks: Callbacks | list[Callbacks] | None = None,
        *,
        documents: DocumentsArgument | None = None,
        **kwargs: Any,
    ) -> LLMResult:
        """Like BaseLLM.generate. ``documents`` is one list for all prompts, or one list per prompt."""
        fused: list[Any] = self._fuse(prompts, documents, callbacks)
        return super(KVFusionLLM, self._for_call(kwargs)).generate(fused, stop, callbacks, **kwargs)

    async def agenerate(
        self,
        prompts: list[str],
        stop: list[str] | None = None,
        callbacks: Callbacks | list[Callbacks] | None = None,
        *,
        documents: DocumentsArgument | None = None,
        **kwargs: Any,
    ) -> LLMResult:
        """Like :meth:`generate`, without blocking the event loop."""
        fused: list[Any] = self._fuse(prompts, documents, callbacks)
        return await super(KVFusionLLM, self._for_call(kwargs)).agenerate(fused, stop, callbacks, **kwargs)

    def _for_call(self, given: dict[str, Any]) -> KVFusionLLM:
        """Return a copy for one call, with the call's options in its identity and a cache that considers documents."""
        options = call_options({name: value for name, value in given.items() if name not in _RUN_ARGUMENTS})
        cache = get_llm_cache() if self.cache is None or self.cache is True else self.cache
        update = {"cache": DocumentAwareCache(cache)} if isinstance(cache, BaseCache) else {}
        call = self.model_copy(update=update)
        call._call_options = options
        return call

    def _distribute(
        self,
        inputs: list[LanguageModelInput],
        config: RunnableConfig | list[RunnableConfig] | None,
        documents: DocumentsArgument | None,
        options: dict[str, Any],
    ) -> tuple[list[Any], dict[str, Any]]:
        """Attach nested documents to their inputs, or pass a flat list on as an option."""
        callbacks = [each.get("callbacks") for each in get_config_list(config, len(inputs))]
        if is_nested(documents):  # attached here, because BaseLLM may split the prompts into several batches
            return list(self._with_documents(inputs, documents, callbacks)), options
        converted = self._convert_all(inputs, callbacks)
        return converted, options if documents is None else {**options, "documents": documents}

    def stream(
        self,
        input: LanguageModelInput,
        config: RunnableConfig | None = None,
        *,
        stop: list[str] | None = None,
        documents: DocumentsArgument | None = None,
        **kwargs: Any,
    ) -> Iterator[str]:
        """Yield the answer in pieces."""
        call_options(kwargs)
        [value] = self._with_documents([input], documents, ensure_config(config).get("callbacks"))
        yield from super().stream(value, config, stop=stop, **kwargs)

    async def astream(
        self,
        input: LanguageModelInput,
        config: RunnableConfig | None = None,
        *,
        stop: list[str] | None = None,
        documents: DocumentsArgument | None = None,
        **kwargs: Any,
    ) -> AsyncIterator[str]:
        """Like :meth:`stream`, without blocking the event loop."""
        call_options(kwargs)
        [value] = self._with_documents([input], documents, ensure_config(config).get("callbacks"))
        pieces: Any = super().astream(value, config, stop=stop, **kwargs)
        async with aclosing(pieces):
            async for piece in pieces:
                yield piece

    def _request(self, input: LanguageModelInput, documents: DocumentsArgument | None) -> dict[str, Any]:
        [value] = self._with_documents([input], documents, ensure_config().get("callbacks"))
        return value.fused.arguments()

    def _generate(
        self,
        prompts: list[str],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> LLMResult:
        fused = self._fuse(prompts)
        self._warn_of_missing_documents(all_have_documents=all(prompt.documents for prompt in fused))
        if self.streaming and len(fused) == 1:
            return self._result([_join(list(self._stream(fused[0], stop, run_manager, **kwargs)))])
        return self._result(_generations(self._engine().answer_batch(**self._batch_arguments(fused, stop, kwargs))))

    async def _agenerate(
        self,
        prompts: list[str],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> LLMResult:
        fused = self._fuse(prompts)
        self._warn_of_missing_documents(all_have_documents=all(prompt.documents for prompt in fused))
        if self.streaming and len(fused) == 1:
            chunks = [chunk async for chunk in self._astream(fused[0], stop, run_manager, **kwargs)]
            return self._result([_join(chunks)])
        arguments = self._batch_arguments(fused, stop, kwargs)
        return self._result(_generations(await self._engine().aanswer_batch(**arguments)))

    def _batch_arguments(
        self, fused: Sequence[FusedPrompt], stop: list[str] | None, given: dict[str, Any]
    ) -> dict[str, Any]:
        """Return the arguments of ``answer_batch``."""
        return {
            "questions": [prompt.question for prompt in fused],
            "documents": [prompt.documents for prompt in fused],
            "prompts": [prompt.arguments()["prompt"] for prompt in fused],
            **self._generator_options(stop, given),
        }

    def _stream(
        self,
        prompt: str,
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> Iterator[GenerationChunk]:
        with self._open(prompt, stop, kwargs) as stream:
            for piece in stream:
                chunk = GenerationChunk(text=piece)
                if run_manager is not None:
                    run_manager.on_llm_new_token(chunk.text, chunk=chunk)
                yield chunk
            last = _last_chunk(stream.answer)
            if run_manager is not None:
                run_manager.on_llm_new_token(last.text, chunk=last)
            yield last

    async def _astream(
        self,
        prompt: str,
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> AsyncIterator[GenerationChunk]:
        async with await asyncio.to_thread(self._open, prompt, stop, kwargs) as stream:
            async for piece in stream:
                chunk = GenerationChunk(text=piece)
                if run_manager is not None:
                    await run_manager.on_llm_new_token(chunk.text, chunk=chunk)
                yield chunk
            last = _last_chunk(stream.answer)
            if run_manager is not None:
                await run_manager.on_llm_new_token(last.text, chunk=last)
            yield last

    def _open(self, prompt: str, stop: list[str] | None, given: dict[str, Any]) -> AnswerStream:
        [fused] = self._fuse([prompt])
        self._warn_of_missing_documents(all_have_documents=bool(fused.documents))
        return self._engine().stream(**fused.arguments(), **self._generator_options(stop, given))

    def _result(self, generations: list[Generation]) -> LLMResult:
        usage = total_usage([generation.generation_info or {} for generation in generations])
        return LLMResult(
            generations=[[generation] for generation in generations],
            llm_output={"token_usage": usage, "model_name": self.model_id},
        )


def _last_chunk(answer: Answer | None) -> GenerationChunk:
    assert answer is not None, "an exhausted stream has an answer"
    return GenerationChunk(text="", generation_info=generation_info(answer))


def _generations(answers: Sequence[Answer]) -> list[Generation]:
    return [Generation(text=a.text, generation_info=generation_info(a)) for a in answers]


def _join(chunks: list[GenerationChunk]) -> Generation:
    return Generation(text="".join(chunk.text for chunk in chunks), generation_info=chunks[-1].generation_info)
