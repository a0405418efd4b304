"""ChatKVFusion: a KVFusionGenerator as a LangChain chat model that takes separate documents.

Turns messages into generator calls and answers into messages. What callers may give stands in ``chat_inputs.py``,
what messages mean in ``conversations.py``, time limits in ``deadlines.py``.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from pathlib import Path
from types import EllipsisType
from typing import TYPE_CHECKING, Any, NoReturn, Self

from langchain_core.callbacks import AsyncCallbackManagerForLLMRun, CallbackManagerForLLMRun
from langchain_core.language_models.base import LangSmithParams, LanguageModelInput
from langchain_core.language_models.llms import create_base_retry_decorator
from langchain_core.language_models.model_profile import ModelProfile
from langchain_core.messages import BaseMessage
from langchain_core.outputs import ChatGenerationChunk, ChatResult
from langchain_core.runnables.config import ensure_config
from pydantic import Field

from kvfusion_rag import Answer, InvalidInputError, OverloadError

from .backed import STRICT_FIELDS, FocusChoice, GeneratorBacked
from .chat_inputs import DocumentChatModel, gathered
from .chat_results import chat_result, last_chunk, piece_chunk
from .conversations import Conversation, gather, read
from .deadlines import answer_within, answered_within, apieces_within, pieces_within
from .documents import DocumentsArgument, to_documents
from .errors import UnsupportedFeatureError

if TYPE_CHECKING:
    from kvfusion_rag import AnswerStream, KVFusionGenerator, ShownPrompt


class ChatKVFusion(GeneratorBacked, DocumentChatModel):
    """A chat model that reads every document apart. Made by :meth:`from_model_id`, or from a ready ``generator``.

    Documents come one of these ways: ``documents=`` of a call (or of ``bind``), a ``KVFusionPrompt``, a
    ``KVFusionDocumentPrompt`` in stock chains, or the messages: ``additional_kwargs["documents"]``, text-plain content
    blocks, and artifacts of tools made by ``create_retriever_tool(response_format="content_and_artifact")``, those of
    earlier turns too. Two ways at once raise InvalidInputError. All else is the conversation: its last human message
    asks.

    A model without fine-tuning reads the conversation in its own chat template, with the documents in their place.
    :meth:`show_prompt` shows what it reads.

    Every call also takes ``stop``, ``temperature``, ``max_tokens`` (or ``max_new_tokens``), ``top_p``, ``top_k``,
    ``seed``, ``mode``, ``focus``, ``attribution`` and ``chat_template_kwargs``. None keeps the value set here, except
    that ``focus=None`` reads all documents. An unknown name raises InvalidInputError.

    Token counts stand in ``usage_metadata``; mode, sources and citations in ``response_metadata``; in streams, on the
    last chunk. Calls of several threads or tasks are answered together, and so are those of a batch.
    """

    timeout: float | None = Field(
        default=None,
        gt=0,
        description="Most seconds that an answer may take: then its work ends at the next token, with an "
        "AnswerTimeoutError. A stream that is not async notices it between two pieces.",
    )
    max_retries: int = Field(
        default=0,
        ge=0,
        description="How often a call that found too many others waiting (OverloadError) is made again, some seconds "
        "later. Nothing else of a local model is mended by asking again. Streams never wait in that queue.",
    )

    model_config = STRICT_FIELDS

    def __init__(self, *, generator: KVFusionGenerator, **fields: Any) -> None:
        """A ready ``generator``, and any field of this class or of BaseChatModel (cache, callbacks, tags, ...).

        Raises:
            InvalidInputError: ``model``, ``model_name`` or ``model_id`` names another model than the generator's.
        """
        for alias in ("model", "model_name"):
            if alias in fields:
                fields["model_id"] = fields.pop(alias)
        super().__init__(generator=generator, **fields)

    @classmethod
    def from_model_id(cls, model_id: str | Path | None = None, **options: Any) -> Self:
        """Load a model: the default one, or a hub name or folder; ``model=`` is another name for ``model_id``.

        Args:
            model_id: as ``KVFusionGenerator.from_pretrained`` takes it.
            options: fields of this class, and options of ``from_pretrained`` (revision, adapter, device, ...).

        Raises:
            TypeError: an option that neither knows; otherwise what ``from_pretrained`` raises.
        """
        return super().from_model_id(options.pop("model", model_id), **options)

    # What it is

    @property
    def _llm_type(self) -> str:
        return "kvfusion-chat"

    @property
    def model_name(self) -> str:
        """The generator's name for its model, as other chat models call it."""
        return self.model_id

    def _get_ls_params(self, stop: list[str] | None = None, **kwargs: Any) -> LangSmithParams:
        return self._name_model(super()._get_ls_params(stop=stop or self.stop, **kwargs), kwargs)

    def _resolve_model_profile(self) -> ModelProfile:
        """Text in, text out: what agents look up before they bind tools or ask for structured output."""
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
            f"bind_tools was called with {len(tools)} tools, but {self.model_id} answers from documents and calls no "
            "tools; let a model that does plan the searches, with create_retriever_tool(..., "
            'response_format="content_and_artifact"), and this one answer from the messages.'
        )

    def with_structured_output(self, schema: Any, *, include_raw: bool = False, **kwargs: Any) -> NoReturn:
        """Not supported.

        Raises:
            UnsupportedFeatureError: always.
        """
        raise UnsupportedFeatureError(
            f"with_structured_output was called on {self.model_id}, but its decoding is not bound to a schema; put an "
            "output parser behind it that checks the text, or take sources and citations from response_metadata."
        )

    def show_prompt(
        self,
        input: LanguageModelInput,
        *,
        documents: DocumentsArgument | None = None,
        mode: str | None = None,
        focus: FocusChoice | EllipsisType = ...,
        chat_template_kwargs: dict[str, Any] | None = None,
    ) -> ShownPrompt:
        """Everything that the model reads for ``input``, which is what ``invoke`` takes; no answer is computed.

        An option that is left out has the value set here. With ``focus`` the documents that it keeps are shown.
        ``(prompt | llm.show_prompt).invoke(...)`` shows it in a chain.
        """
        asked = read(self._carrying(input, documents, ensure_config().get("callbacks")))
        return self._shown(asked.question, asked.documents, asked.prompt, mode, focus, chat_template_kwargs)

    # From messages to answers

    def _generate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        asked = self._asked(messages, stop, kwargs)

        def ask() -> list[Answer]:
            if self.timeout is None:
                return self._engine().answer_batch(**asked)
            return answer_within(self.timeout, lambda: self._engine().aanswer_batch(**asked))

        [answer] = self._retrying(run_manager)(ask)()
        return chat_result(answer, self.model_id)

    async def _agenerate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        asked = self._asked(messages, stop, kwargs)

        async def ask() -> list[Answer]:
            return await answered_within(self.timeout, self._engine().aanswer_batch(**asked))

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
            for piece in pieces_within(self.timeout, stream):
                chunk = piece_chunk(piece)
                if run_manager is not None:
                    run_manager.on_llm_new_token(piece, chunk=chunk)
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
            async for piece in apieces_within(self.timeout, stream):
                chunk = piece_chunk(piece)
                if run_manager is not None:
                    await run_manager.on_llm_new_token(piece, chunk=chunk)
                yield chunk
            last = last_chunk(stream.answer, self.model_id)
            if run_manager is not None:
                await run_manager.on_llm_new_token("", chunk=last)
            yield last

    def _open(self, messages: list[BaseMessage], stop: list[str] | None, given: dict[str, Any]) -> AnswerStream:
        conversation, options = self._read(messages, stop, given)
        question, documents = conversation.question, conversation.documents
        return self._engine().stream(question, documents, prompt=conversation.prompt, **options)

    def _asked(self, messages: list[BaseMessage], stop: list[str] | None, given: dict[str, Any]) -> dict[str, Any]:
        """Arguments of ``answer_batch``."""
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
                f"model is {model!r}, but the weights that this ChatKVFusion holds are {self.model_id!r}; load others "
                "with ChatKVFusion.from_model_id."
            )
        documents = options.pop("documents", None)  # events of version 3 come here straight
        if any("question" in message.additional_kwargs for message in messages):  # generate has gathered them
            conversation = read(gather(messages, to_documents(documents or ())))
        else:
            conversation = read(gathered([messages], documents)[0])
        has_documents = bool(conversation.documents)
        self._check_documents(all_have_documents=has_documents)
        self._warn_of_missing_documents(all_have_documents=has_documents)
        return conversation, self._decoding(stop, options)
