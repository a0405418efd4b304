"""ChatKVFusion: a KVFusionGenerator as a LangChain chat model that takes separate documents."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, cast

from langchain_core.callbacks import AsyncCallbackManagerForLLMRun, CallbackManagerForLLMRun
from langchain_core.language_models.base import LangSmithParams, LanguageModelInput
from langchain_core.language_models.llms import create_base_retry_decorator
from langchain_core.language_models.model_profile import ModelProfile
from langchain_core.messages import AIMessage, BaseMessage
from langchain_core.outputs import ChatGenerationChunk, ChatResult
from langchain_core.runnables import Runnable
from langchain_core.runnables.config import ensure_config
from langchain_core.tools import BaseTool
from langchain_core.utils.function_calling import convert_to_openai_tool
from pydantic import Field

from kvfusion_rag import Answer, InvalidInputError, OverloadError

from .backed import STRICT_FIELDS, GeneratorBacked
from .chat_inputs import DocumentChatModel, gathered
from .chat_results import chat_result, last_chunk, piece_chunk
from .conversations import Conversation, gather, read
from .deadlines import aanswer_within, answer_within, apieces_within, pieces_within
from .documents import DocumentsArgument, to_documents
from .structured import Method, structured
from .tools import to_choice, to_tools

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
    ``top_p``, ``top_k``, ``seed``, ``mode``, ``focus``, ``attribution``, ``min_support``, ``chat_template_kwargs`` and
    ``response_format``. None keeps the value set here, except that ``focus=None`` keeps all documents. An unknown name
    raises InvalidInputError. ``bind_tools`` and ``with_structured_output`` need the extra ``structured``.

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
            text_inputs=True,
            text_outputs=True,
            image_inputs=False,
            tool_calling=self._engine().follows_instructions,
            structured_output=True,
        )
        window = self._engine().context_window
        return profile if window is None else {**profile, "max_input_tokens": window}

    def bind_tools(
        self,
        tools: Sequence[dict[str, Any] | type | Callable[..., Any] | BaseTool],
        *,
        tool_choice: dict[str, Any] | str | bool | None = None,
        strict: bool | None = None,
        parallel_tool_calls: bool | None = None,
        **kwargs: Any,
    ) -> Runnable[LanguageModelInput, AIMessage]:
        """Bind tools that the model may call. Arguments of calls always match their schema, whatever ``strict`` is.

        Args:
            tools: functions, LangChain tools, Pydantic or TypedDict classes, or OpenAI's dictionaries.
            tool_choice: "auto", "none", "any" (a call), or the name of the tool to call.
            parallel_tool_calls: whether an answer may contain several calls. Default: if the choice is "auto".

        Raises:
            InvalidInputError: the choice is not allowed.
        """
        converted = [convert_to_openai_tool(tool) for tool in tools]
        chosen = to_choice(tool_choice, [tool["function"]["name"] for tool in converted])
        form = {"tool_choice": chosen, "parallel_tool_calls": parallel_tool_calls}
        bound = {name: value for name, value in form.items() if value is not None}
        return cast("Runnable[LanguageModelInput, AIMessage]", self.bind(tools=converted, **bound, **kwargs))

    def with_structured_output(
        self,
        schema: dict[str, Any] | type | None = None,
        *,
        method: Method = "json_schema",
        include_raw: bool = False,
        strict: bool | None = None,
        **kwargs: Any,
    ) -> Runnable[LanguageModelInput, Any]:
        """Return a model whose answers are objects of ``schema``, or JSON of it as a dictionary.

        Args:
            schema: a Pydantic or TypedDict class, a JSON schema, or OpenAI's dictionary of a function.
            method: "json_schema", "function_calling" (as the arguments of a tool), or "json_mode" (any JSON object).
            include_raw: return a dictionary with the message, the object and the error of parsing.
            strict: accepted for other models' sake; answers always match the schema.
            kwargs: options of each call.

        Raises:
            InvalidInputError: the method is unknown, or needs a schema.
        """
        return structured(self, schema, method, include_raw=include_raw, strict=strict, options=kwargs)

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
        options.pop("ls_structured_output_format", None)  # only for traces
        documents = options.pop("documents", None)  # astream_events in version 3 bypasses generate and stream
        if not options.get("tools"):
            for name in ("tools", "tool_choice", "parallel_tool_calls"):
                options.pop(name, None)
        else:
            options["tools"] = to_tools(options["tools"])
        if any("question" in message.additional_kwargs for message in messages):  # generate has called gather
            conversation = read(gather(messages, to_documents(documents or ()), keeps_calls="tools" in options))
        else:
            conversation = read(gathered([messages], documents, keeps_calls="tools" in options)[0])
        has_documents = bool(conversation.documents)
        self._check_documents(all_have_documents=has_documents)
        self._warn_of_missing_documents(all_have_documents=has_documents)
        return conversation, self._generator_options(stop, options)
