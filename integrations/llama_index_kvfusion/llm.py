"""`KVFusionLlamaIndexLLM`: a KVFusionGenerator as a LlamaIndex LLM that takes separate documents."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn

from llama_index.core.base.llms.generic_utils import messages_to_prompt as generic_messages_to_prompt
from llama_index.core.base.llms.types import (
    ChatMessage,
    ChatResponse,
    ChatResponseAsyncGen,
    ChatResponseGen,
    CompletionResponse,
    CompletionResponseAsyncGen,
    CompletionResponseGen,
    LLMMetadata,
)
from llama_index.core.bridge.pydantic import Field, PrivateAttr
from llama_index.core.constants import DEFAULT_CONTEXT_WINDOW
from llama_index.core.llms.callbacks import llm_chat_callback, llm_completion_callback
from llama_index.core.llms.custom import CustomLLM
from llama_index.core.llms.llm import default_completion_to_prompt
from llama_index.core.prompts import BasePromptTemplate

from kvfusion_rag import DocumentsPlace, InvalidInputError, Message, UnknownOptionError

from .documents import to_documents
from .function_calling import FunctionCalling
from .messages import last_question, to_messages
from .responses import (
    achat_chunks,
    acompletion_chunks,
    chat_chunks,
    chat_response,
    completion_chunks,
    completion_response,
)

if TYPE_CHECKING:
    from kvfusion_rag import KVFusionGenerator, ShownPrompt

_OPTIONS = (
    "temperature",
    "max_new_tokens",
    "max_reasoning_tokens",
    "top_p",
    "top_k",
    "stop",
    "seed",
    "mode",
    "focus",
    "attribution",
    "min_support",
    "chat_template_kwargs",
)
_MODEL_NAMES = ("model", "model_name")  # names of model_id in other LLMs
_FORM = ("response_format", "tools", "tool_choice", "parallel_tool_calls")  # what an answer consists of
_ARGUMENTS = ("documents", "documents_place", "question", "max_tokens", *_OPTIONS, *_FORM)


class KVFusionLlamaIndexLLM(FunctionCalling, CustomLLM):
    """An LLM that takes separate documents: ``llm.complete("Who ...?", documents=["...", node])``.

    Every call takes the options below (``max_tokens`` is an alias of ``max_new_tokens``) and:

    - ``documents``: a list of `kvfusion_rag.Document`, str or LlamaIndex nodes, one item per document.
    - ``documents_place``: their position. In `complete` it is a `kvfusion_rag.DocumentsPlace` in the prompt. In `chat`
      it is a pair: the index of a message, and the place in its text. By default documents are appended to the system
      message.
    - ``question``: the bare question, if the prompt contains more than that.
    - ``response_format``: a `kvfusion_rag.AnswerFormat` or a Pydantic model, which the answer's text matches.
    - ``tools``, ``tool_choice``, ``parallel_tool_calls``: as `chat_with_tools` sets them.

    An option that is None keeps the value set here, except that ``focus=None`` keeps all documents. An unknown option
    raises InvalidInputError. `additional_kwargs` contains token counts, and `raw` sources, citations and reasoning.
    Streams have both on the last chunk. In `chat`, the reasoning in front of an answer is a `ThinkingBlock` of the
    message, and streams have its pieces in `additional_kwargs["thinking_delta"]`. LlamaIndex's events contain the
    documents in full.

    An untuned model reads prompts and messages unchanged in its own chat template, a prompt as one user message. If
    `messages_to_prompt` is set, its text replaces the messages. A tuned model with fixed templates reads a bare
    question with documents in its question template, and any other prompt if it follows instructions.
    """

    temperature: float = Field(default=0.0, description="Sampling temperature; 0 is greedy decoding.")
    max_new_tokens: int | None = Field(
        default=None, description="Maximum tokens of an answer. None: the generator's default."
    )
    max_reasoning_tokens: int | None = Field(
        default=None,
        description="Maximum tokens of the reasoning in front of an answer. None: the generator's default.",
    )
    top_p: float = Field(default=1.0, description="Nucleus sampling for temperatures above 0.")
    top_k: int | None = Field(default=None, description="Sample from the k most likely tokens.")
    stop: str | Sequence[str] = Field(default=(), description="Strings that end the answer and are removed from it.")
    seed: int | None = Field(default=None, description="Makes sampling repeatable.")
    mode: str | None = Field(
        default=None, description="'auto', 'fusion', 'concat' or 'ape'. None: the generator's mode."
    )
    focus: Annotated[int, Field(strict=True, ge=1)] | Literal["auto"] | None = Field(
        default="auto",
        description="Number of documents to keep, those that make the question most likely. None keeps all documents. "
        "'auto': the model's own number.",
    )
    attribution: str | None = Field(
        default=None, description="'attention' or 'effects': adds each document's contribution to the sources."
    )
    min_support: Annotated[float, Field(strict=True, ge=0, le=1)] | Literal["auto"] | None = Field(
        default=None,
        description="Support by the documents (0 to 1) from which an answer counts as found, or 'auto' for the "
        "threshold of the model's calibration: adds support, found and a notice to `raw`. None: the generator's "
        "setting.",
    )
    chat_template_kwargs: dict[str, Any] | None = Field(
        default=None, description="Variables of the model's chat template, such as enable_thinking."
    )

    _generator: KVFusionGenerator = PrivateAttr()

    def __init__(self, generator: KVFusionGenerator | None = None, **fields: Any) -> None:
        """Wrap a loaded `generator`. `fields` are the options above and the fields of LlamaIndex's LLM, such as
        callback_manager, system_prompt, messages_to_prompt and completion_to_prompt.

        Raises InvalidInputError if there is no generator, or a field is unknown.
        """
        own = type(self).__name__
        if generator is None:
            model = repr(next((fields[name] for name in _MODEL_NAMES if name in fields), "MODEL"))
            raise InvalidInputError(f"{own} needs a loaded generator; load a model with {own}.from_model_id({model}).")
        UnknownOptionError.raise_for(fields, type(self).model_fields, own)
        super().__init__(**fields)
        self._generator = generator

    @classmethod
    def from_model_id(
        cls, model_id: str | Path | None = None, *, model_options: Mapping[str, Any] | None = None, **fields: Any
    ) -> KVFusionLlamaIndexLLM:
        """Load a model and wrap it. None loads the default model, SmolLM2-135M-Instruct.

        `model_options` are options of `KVFusionGenerator.from_pretrained` (revision, adapter, device, dtype, store,
        ...), and `fields` those of the constructor. Errors are those of from_pretrained.
        """
        from kvfusion_rag import KVFusionGenerator

        if misplaced := sorted(fields.keys() & KVFusionGenerator.load_options() - cls.model_fields.keys()):
            name = misplaced[0]
            raise InvalidInputError(
                f"{name!r} is an option of the model's loading; pass model_options={{{name!r}: {fields[name]!r}}}."
            )
        if name := next((name for name in _MODEL_NAMES if name in fields), None):
            raise InvalidInputError(
                f"{name!r} is named model_id here; call {cls.__name__}.from_model_id({fields[name]!r})."
            )
        options: dict[str, Any] = dict(model_options or {})
        return cls(KVFusionGenerator.from_pretrained(model_id, **options), **fields)

    @classmethod
    def class_name(cls) -> str:
        return "KVFusionLlamaIndexLLM"

    def __getstate__(self) -> NoReturn:
        raise InvalidInputError(
            f"this {type(self).__name__} cannot be pickled, because it holds a loaded model; create one in each "
            "process."
        )

    @property
    def generator(self) -> KVFusionGenerator:
        """The generator, for methods such as prefill and check_invariance."""
        return self._generator

    @property
    def reads_prompt(self) -> bool:
        """Whether the model reads prompts unchanged, in its own chat template with the documents in their place."""
        return self._generator.reads_prompt(self.mode)  # pyright: ignore[reportArgumentType] - it checks the name

    @property
    def metadata(self) -> LLMMetadata:
        """Name and limits. `is_chat_model`, which makes LlamaIndex send messages, is True for a model that follows
        instructions unless `messages_to_prompt` or `completion_to_prompt` is set. Then it is also a function-calling
        model."""
        has_wrapper = self.completion_to_prompt is not default_completion_to_prompt
        chats = self._generator.follows_instructions and self._keeps_messages and not has_wrapper
        return LLMMetadata(
            context_window=self._generator.context_window or DEFAULT_CONTEXT_WINDOW,
            num_output=self.max_new_tokens or self._generator.max_new_tokens,
            model_name=self._generator.model_id,
            is_chat_model=chats,
            is_function_calling_model=chats,
        )

    def format_text(self, template: BasePromptTemplate, **values: Any) -> str:
        """Format a template as a text, with this LLM's system prompt and wrappers."""
        return self._get_prompt(template, **values)

    def format_prompt(
        self, template: BasePromptTemplate, chat_history: Sequence[ChatMessage], **values: Any
    ) -> list[ChatMessage] | str:
        """Format a template as LlamaIndex's synthesizers do: as messages, or as a text if a wrapper is set."""
        if self.metadata.is_chat_model or (chat_history and self._keeps_messages):
            return self.format_messages(template, chat_history, **values)
        if not chat_history:
            return self.format_text(template, **values)
        assert self.messages_to_prompt is not None  # the parent's validator sets it
        return self.messages_to_prompt(self.format_messages(template, chat_history, **values))

    def format_messages(
        self, template: BasePromptTemplate, chat_history: Sequence[ChatMessage], **values: Any
    ) -> list[ChatMessage]:
        """Format a template as messages, after this LLM's system prompt and `chat_history`. Braces in the history are
        not template variables."""
        messages = self._get_messages(template, **values)
        system = self._extend_messages([])
        return [*system, *chat_history, *messages[len(system) :]]

    def show_prompt(self, prompt: str | Sequence[ChatMessage], formatted: bool = False, **kwargs: Any) -> ShownPrompt:
        """Return the complete prompt of `complete` for a text, or of `chat` for messages, with their arguments."""
        request = self.request(prompt, formatted, **kwargs)
        names = ("question", "documents", "prompt", "mode", "focus", "chat_template_kwargs")
        return self._generator.show_prompt(**{name: request[name] for name in names})

    def request(self, prompt: str | Sequence[ChatMessage], formatted: bool = False, **kwargs: Any) -> dict[str, Any]:
        """Return the arguments of the generator's `answer` for `complete` of a text or `chat` of messages."""
        if isinstance(prompt, str):
            return self._complete_request(prompt, formatted, kwargs)
        return self._chat_request(prompt, kwargs)

    @llm_completion_callback()
    def complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponse:
        """Answer `prompt`. For `kwargs` see the class."""
        return completion_response(self._generator.answer(**self._complete_request(prompt, formatted, kwargs)))

    @llm_completion_callback()
    def stream_complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponseGen:
        """Like `complete`, in pieces. Invalid arguments raise an error here, before the first piece."""
        return completion_chunks(self._generator.stream(**self._complete_request(prompt, formatted, kwargs)))

    @llm_completion_callback()
    async def acomplete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponse:
        """Like `complete`, without blocking the event loop. Concurrent calls are computed together."""
        request = self._complete_request(prompt, formatted, kwargs)
        return completion_response(await self._generator.aanswer(**request))

    @llm_completion_callback()
    async def astream_complete(
        self, prompt: str, formatted: bool = False, **kwargs: Any
    ) -> CompletionResponseAsyncGen:
        """Like `stream_complete`, without blocking the event loop."""
        request = self._complete_request(prompt, formatted, kwargs)
        return acompletion_chunks(await asyncio.to_thread(self._generator.stream, **request))

    @llm_chat_callback()
    def chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponse:
        """Answer the last user message of a conversation. For `kwargs` see the class."""
        request = self._chat_request(messages, kwargs)
        return chat_response(self._generator.answer(**request))

    @llm_chat_callback()
    def stream_chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponseGen:
        """Like `chat`, in pieces."""
        return chat_chunks(self._generator.stream(**self._chat_request(messages, kwargs)))

    @llm_chat_callback()
    async def achat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponse:
        """Like `chat`, without blocking the event loop. Concurrent calls are computed together."""
        request = self._chat_request(messages, kwargs)
        return chat_response(await self._generator.aanswer(**request))

    @llm_chat_callback()
    async def astream_chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponseAsyncGen:
        """Like `stream_chat`, without blocking the event loop."""
        request = self._chat_request(messages, kwargs)
        return achat_chunks(await asyncio.to_thread(self._generator.stream, **request))

    @property
    def _keeps_messages(self) -> bool:
        """Whether messages remain messages, because the caller did not set `messages_to_prompt`."""
        return self.messages_to_prompt is generic_messages_to_prompt

    def _chat_request(self, messages: Sequence[ChatMessage], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        assert self.messages_to_prompt is not None  # the parent's validator sets it
        place = kwargs.get("documents_place")
        if not self._keeps_messages and place is not None:
            raise InvalidInputError(
                "documents_place refers to a message, but messages_to_prompt of this LLM joins the messages into one "
                "text; call complete with a DocumentsPlace in that text."
            )
        keeps_calls = bool(kwargs.get("tools"))
        prompt = (
            to_messages(messages, place, keeps_calls=keeps_calls)
            if self._keeps_messages
            else self.messages_to_prompt(messages)
        )
        return self._request(prompt, {"question": last_question(messages), **kwargs})

    def _complete_request(self, prompt: str, formatted: bool, kwargs: Mapping[str, Any]) -> dict[str, Any]:
        assert self.completion_to_prompt is not None  # the parent's validator sets it
        place: DocumentsPlace | None = kwargs.get("documents_place")
        if place is not None:  # its offset refers to the unwrapped text
            wrapped: str | list[Message] = [Message("user", prompt, place)]
        else:
            wrapped = prompt if formatted else self.completion_to_prompt(prompt)
        return self._request(wrapped, {**kwargs, "question": kwargs.get("question") or prompt})

    def _request(self, prompt: str | list[Message], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """Return the generator's arguments for one call."""
        UnknownOptionError.raise_for(kwargs, _ARGUMENTS, "a call")
        given = kwargs.get("documents")
        documents = [] if given is None else to_documents(given)
        question = kwargs.get("question") or _last_text(prompt)
        options = self._options(kwargs)
        # A tuned model reads a bare question in the template that it was tuned with. That template needs documents, so
        # a prompt without documents is sent unchanged if the model follows instructions.
        uses_own_template = (
            prompt in (question, [Message("user", question)])
            and not self._generator.reads_prompt(options["mode"])
            and (bool(documents) or not self._generator.follows_instructions)
        )
        prompt_argument = None if uses_own_template else prompt
        form = {name: kwargs[name] for name in _FORM if kwargs.get(name) is not None}
        return {"question": question, "documents": documents, "prompt": prompt_argument, **options, **form}

    def _options(self, kwargs: Mapping[str, Any]) -> dict[str, Any]:
        given: dict[str, Any] = {name: value for name, value in kwargs.items() if value is not None or name == "focus"}
        if "max_tokens" in given:
            if "max_new_tokens" in given:
                raise InvalidInputError("max_tokens and max_new_tokens are the same option; set only one.")
            given["max_new_tokens"] = given.pop("max_tokens")
        options = {name: given.get(name, getattr(self, name)) for name in _OPTIONS}
        if self.chat_template_kwargs and "chat_template_kwargs" in given:
            options["chat_template_kwargs"] = {**self.chat_template_kwargs, **given["chat_template_kwargs"]}
        if isinstance(options["stop"], str):
            options["stop"] = (options["stop"],)
        return options


def _last_text(prompt: str | list[Message]) -> str:
    if isinstance(prompt, str):
        return prompt
    if not prompt:
        raise InvalidInputError("messages is empty, but it must contain at least the message to answer.")
    return prompt[-1].text
