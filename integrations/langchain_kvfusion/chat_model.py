"""ChatKVFusion: a KVFusionGenerator as a LangChain chat model that takes separate documents."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

from langchain_core.callbacks import AsyncCallbackManagerForLLMRun, CallbackManagerForLLMRun
from langchain_core.language_models.base import LangSmithParams, LanguageModelInput
from langchain_core.language_models.llms import create_base_retry_decorator
from langchain_core.language_models.model_profile import ModelProfile
from langchain_core.messages import BaseMessage
from langchain_core.outputs import ChatGenerationChunk, ChatResult
from langchain_core.runnables.config import ensure_config
from pydantic import Field

from kvfusion_rag import Answer, InvalidInputError, OverloadError

from .backed import STRICT_FIELDS, GeneratorBacked
from .chat_inputs import DocumentChatModel, gathered
from .chat_results import chat_result, last_chunk, piece_chunk
from .conversations import Conversation, gather, read
from .deadlines import aanswer_within, answer_within, apieces_within, pieces_within
from .documents import DocumentsArgument, to_documents
from .errors import UnsupportedFeatureError

if TYPE_CHECKING:
    from kvfusion_rag import AnswerStream


class ChatKVFusion(GeneratorBacked, DocumentChatModel):
    """A chat model that keeps documents separate. Create it with :meth:`from_model_id` or from a loaded ``generator``.

    Pass documents in exactly one of these ways, otherwise InvalidInputError is raised:

    - ``documents=`` in a call or in ``bind``.
    - A ``KVFusionPrompt``, or a ``KVFusionDocumentPrompt`` in standard chains.
    - In messages, including those of earlier turns: ``additional_kwargs["documents"]``, text-plain content blocks, and
      artifacts of tools created by ``create_retriever_tool(response_format="content_and_artifact")``.

    All other messages are the conversation. Its last human message is answered. An untuned model reads the
    conversation in its own chat template, with the documents in their place. :meth:`show_prompt` returns the prompt.

    Every call also takes ``stop``, ``temperature``, ``max_tokens`` (or ``max_new_tokens``), ``max_reasoning_tokens``,
    ``top_p``, ``top_k``, ``seed``, ``mode``, ``focus``, ``attribution`` and ``chat_template_kwargs``. None keeps the
    value set here, except that ``focus=None`` keeps all documents. An unknown name raises InvalidInputError.

    ``usage_metadata`` contains token counts, and ``response_metadata`` mode, sources and citations. Streams have both
    on the last chunk. What a reasoning model writes in front of its answer is
    ``additional_kwargs["reasoning_content"]`` and the first of the ``content_blocks``. Concurrent calls and calls of a
    batch are computed together.
    """

    timeout: float | None = Field(
        default=None,
        gt=0,
        description="Seconds after which an answer is stopped at the next token, with an AnswerTimeoutError. "
        "A synchronous stream checks the time between two pieces.",
    )
    max_retries: int = Field(
        default=0,
        ge=0,
        description="How often a call is retried after an OverloadError, which means that the queue was full. Other "
        "errors of a local model are not retried. Streams do not use the queue.",
    )

    model_config = STRICT_FIELDS

    @property
    def _llm_type(self) -> str:
        return "kvfusion-chat"

    @property
    def model_name(self) -> str:
        """The model id, under the name that other chat models use."""
        return self.model_id

    def _get_ls_params(self, stop: list[str] | None = None, **kwargs: Any) -> LangSmithParams:
        return self._add_model_params(super()._get_ls_params(stop=stop or self.stop, **kwargs), kwargs)

    def _resolve_model_profile(self) -> ModelProfile:
        """Return the capabilities that agents check before they bind tools or request structured output."""
        profile = ModelProfile(
            text_inputs=True, text_outputs=True, image_inputs=False, tool_calling=False, structured_output=False
        )
        window = self._engine().context_window
        return profile if window is None else {**profile, "max_input_tokens": window}

    def bind_tools(self, tools: Sequence[Any], *, tool_choice: str | None = None, **kwargs: Any) -> NoReturn:
        """Not supported.

        Raises:
            UnsupportedFeatureError: always.
        """
        raise UnsupportedFeatureError(
            f"bind_tools was called with {len(tools)} tools, but {self.model_id} cannot call tools; let another model "
            'call create_retriever_tool(..., response_format="content_and_artifact"), and this one answer from the '
            "messages."
        )

    def with_structured_output(self, schema: Any, *, include_raw: bool = False, **kwargs: Any) -> NoReturn:
        """Not supported.

        Raises:
            UnsupportedFeatureError: always.
        """
        raise UnsupportedFeatureError(
            f"with_structured_output was called, but {self.model_id} cannot decode by a schema; append an output "
            "parser that checks the text, or read sources and citations from response_metadata."
        )

    def _request(self, input: LanguageModelInput, documents: DocumentsArgument | None) -> dict[str, Any]:
        return read(self._carrying(input, documents, ensure_config().get("callbacks"))).arguments()

    def _generate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        arguments = self._batch_arguments(messages, stop, kwargs)

        def ask() -> list[Answer]:
            if self.timeout is None:
                return self._engine().answer_batch(**arguments)
            return answer_within(self.timeout, lambda: self._engine().aanswer_batch(**arguments))

        [answer] = self._retrying(run_manager)(ask)()
        return chat_result(answer, self.model_id)

    async def _agenerate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        arguments = self._batch_arguments(messages, stop, kwargs)

        async def ask() -> list[Answer]:
            return await aanswer_within(self.timeout, self._engine().aanswer_batch(**arguments))

        [answer] = await self._retrying(run_manager)(ask)()
        return chat_result(answer, self.model_id)

    def _retrying(
        self, run_manager: CallbackManagerForLLMRun | AsyncCallbackManagerForLLMRun | None
    ) -> Callable[[Any], Any]:
        return create_base_retry_decorator([OverloadError], self.max_retries + 1, run_manager)

    def _stream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> Iterator[ChatGenerationChunk]:
        with self._open(messages, stop, kwargs) as stream:
            for piece in pieces_within(self.timeout, stream.pieces):
                chunk = piece_chunk(piece)
                if run_manager is not None:
                    run_manager.on_llm_new_token(chunk.text, chunk=chunk)
                yield chunk
            last = last_chunk(stream.answer, self.model_id)
            if run_manager is not None:
                run_manager.on_llm_new_token("", chunk=last)
            yield last

    async def _astream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> AsyncIterator[ChatGenerationChunk]:
        async with await asyncio.to_thread(self._open, messages, stop, kwargs) as stream:
            async for piece in apieces_within(self.timeout, stream.pieces):
                chunk = piece_chunk(piece)
                if run_manager is not None:
                    await run_manager.on_llm_new_token(chunk.text, chunk=chunk)
                yield chunk
            last = last_chunk(stream.answer, self.model_id)
            if run_manager is not None:
                await run_manager.on_llm_new_token("", chunk=last)
            yield last

    def _open(self, messages: list[BaseMessage], stop: list[str] | None, given: dict[str, Any]) -> AnswerStream:
        conversation, options = self._read(messages, stop, given)
        return self._engine().stream(**conversation.arguments(), **options)

    def _batch_arguments(
        self, messages: list[BaseMessage], stop: list[str] | None, given: dict[str, Any]
    ) -> dict[str, Any]:
        """Return the arguments of ``answer_batch``."""
        conversation, options = self._read(messages, stop, given)
        questions, documents = [conversation.question], [conversation.documents]
        return {"questions": questions, "documents": documents, "prompts": [conversation.prompt], **options}

    def _read(
        self, messages: list[BaseMessage], stop: list[str] | None, given: dict[str, Any]
    ) -> tuple[Conversation, dict[str, Any]]:
        options = dict(given)
        model = options.pop("model", None)
        if model not in (None, self.model_id):
            raise InvalidInputError(
                f"model is {model!r}, but this ChatKVFusion has loaded {self.model_id!r}; load another model with "
                "ChatKVFusion.from_model_id."
            )
        documents = options.pop("documents", None)  # astream_events in version 3 bypasses generate and stream
        if any("question" in message.additional_kwargs for message in messages):  # generate has called gather
            conversation = read(gather(messages, to_documents(documents or ())))
        else:
            conversation = read(gathered([messages], documents)[0])
        has_documents = bool(conversation.documents)
        self._check_documents(all_have_documents=has_documents)
        self._warn_of_missing_documents(all_have_documents=has_documents)
        return conversation, self._generator_options(stop, options)
