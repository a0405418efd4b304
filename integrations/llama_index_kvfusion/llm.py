"""`KVFusionLlamaIndexLLM`: a KVFusionGenerator as a LlamaIndex LLM.

Turns LlamaIndex's calls (complete, stream, chat, each sync and async) into one generator request: question,
wording, separate documents and options. It knows neither retrieval nor the shape of responses.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

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

from kvfusion_rag import DocumentsPlace, InvalidInputError, Message

from .documents import to_documents
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
    "top_p",
    "top_k",
    "stop",
    "seed",
    "mode",
    "focus",
    "attribution",
    "chat_template_kwargs",
)
_ARGUMENTS = ("documents", "documents_place", "question", "max_tokens", *_OPTIONS)


class KVFusionLlamaIndexLLM(CustomLLM):
    """An LLM that takes separate documents: ``llm.complete("Who ...?", documents=["...", node])``.

    Every call takes the options below (``max_tokens`` is another name for ``max_new_tokens``) and:

    - ``documents``: a list of `kvfusion_rag.Document`, str or LlamaIndex nodes, one item for each document.
    - ``documents_place``: where they belong. In `complete` it is a `kvfusion_rag.DocumentsPlace` in the prompt. In
      `chat` it is the number of a message, counted from 0, and the place in its text. By default documents end the
      system message.
    - ``question``: the bare question, if the prompt is a longer wording of it.

    An option given as None keeps the value set here, except that ``focus=None`` reads all documents. An unknown
    option raises InvalidInputError. Token counts are in `additional_kwargs`, sources and citations in `raw`; in
    streams both come with the last chunk. LlamaIndex's events contain the documents in full.

    An untuned model reads prompts and messages unchanged, in its own chat template: a prompt is one user message. If
    `messages_to_prompt` is given, its text is read in place of the messages. A tuned model with fixed templates reads
    a bare question over documents in its own question template, and any other wording if it follows instructions.
    """

    temperature: float = Field(default=0.0, description="0 is greedy decoding.")
    max_new_tokens: int | None = Field(default=None, description="None: the generator's default.")
    top_p: float = Field(default=1.0, description="Nucleus sampling, used above temperature 0.")
    top_k: int | None = Field(default=None, description="Sample among the k likeliest tokens.")
    stop: str | Sequence[str] = Field(default=(), description="Strings that end the answer, left out of it.")
    seed: int | None = Field(default=None, description="Makes sampling repeatable.")
    mode: str | None = Field(
        default=None, description="'auto', 'fusion', 'concat' or 'ape'; None: the generator's mode."
    )
    focus: Annotated[int, Field(strict=True, ge=1)] | Literal["auto"] | None = Field(
        default="auto",
        description="Keep this many documents, those that make the question likeliest; None: all of them; 'auto': the "
        "model's own number.",
    )
    attribution: str | None = Field(
        default=None, description="'attention' or 'effects': what sources say of their part in an answer."
    )
    chat_template_kwargs: dict[str, Any] | None = Field(
        default=None, description="Variables of the model's chat template, such as enable_thinking."
    )

    _generator: KVFusionGenerator = PrivateAttr()

    def __init__(self, generator: KVFusionGenerator, **fields: Any) -> None:
        """A ready `generator`, and any of the options above or of LlamaIndex's LLM fields
        (callback_manager, system_prompt, messages_to_prompt, completion_to_prompt)."""
        unknown = sorted(set(fields) - set(type(self).model_fields))
        if unknown:
            raise InvalidInputError(
                f"Unknown option {unknown[0]!r} for KVFusionLlamaIndexLLM; allowed are "
                f"{', '.join(_OPTIONS)} and the fields of LlamaIndex's LLM."
            )
        super().__init__(**fields)
        self._generator = generator

    @classmethod
    def from_model_id(
        cls, model_id: str | Path | None = None, *, model_options: Mapping[str, Any] | None = None, **fields: Any
    ) -> KVFusionLlamaIndexLLM:
        """Load a model and wrap it. None is the default model, SmolLM2-135M-Instruct.

        `model_options` go to `KVFusionGenerator.from_pretrained` (revision, adapter, device, dtype, store,
        ...), everything else to the constructor. Raises what from_pretrained raises.
        """
        from kvfusion_rag import KVFusionGenerator

        options: dict[str, Any] = dict(model_options or {})
        return cls(KVFusionGenerator.from_pretrained(model_id, **options), **fields)

    @classmethod
    def class_name(cls) -> str:
        return "KVFusionLlamaIndexLLM"

    @property
    def generator(self) -> KVFusionGenerator:
        """The generator that answers, for prefill, check_invariance and the like."""
        return self._generator

    @property
    def reads_prompt(self) -> bool:
        """Whether the model reads wordings unchanged, in its own chat template with the documents in their place."""
        return self._generator.reads_prompt(self.mode)  # pyright: ignore[reportArgumentType] - which checks the name

    @property
    def metadata(self) -> LLMMetadata:
        """Limits and name. A chat model (whose prompts LlamaIndex sends as messages) is one that follows
        instructions, unless the caller's own `messages_to_prompt` or `completion_to_prompt` is to be used."""
        own_wrapper = self.completion_to_prompt is not default_completion_to_prompt
        return LLMMetadata(
            context_window=self._generator.context_window or DEFAULT_CONTEXT_WINDOW,
            num_output=self.max_new_tokens or self._generator.max_new_tokens,
            model_name=self._generator.model_id,
            is_chat_model=self._generator.follows_instructions and self._sends_turns and not own_wrapper,
        )

    def fill(self, template: BasePromptTemplate, **values: Any) -> str:
        """The template's complete wording with this LLM's system prompt and wrappers, ready to send."""
        return self._get_prompt(template, **values)

    def word(
        self, template: BasePromptTemplate, chat_history: Sequence[ChatMessage], **values: Any
    ) -> list[ChatMessage] | str:
        """What LlamaIndex's own synthesizers send to this LLM: messages, or a text if the caller wraps prompts."""
        if self.metadata.is_chat_model or (chat_history and self._sends_turns):
            return self.fill_messages(template, chat_history, **values)
        if not chat_history:
            return self.fill(template, **values)
        assert self.messages_to_prompt is not None  # the parent's validator fills it in
        return self.messages_to_prompt(self.fill_messages(template, chat_history, **values))

    def fill_messages(
        self, template: BasePromptTemplate, chat_history: Sequence[ChatMessage], **values: Any
    ) -> list[ChatMessage]:
        """The template's messages behind `chat_history` and this LLM's system prompt. Earlier messages are not
        templates, so braces in them stay as they are."""
        asked = self._get_messages(template, **values)
        said = self._extend_messages([])
        return [*said, *chat_history, *asked[len(said) :]]

    def show_prompt(self, prompt: str | Sequence[ChatMessage], formatted: bool = False, **kwargs: Any) -> ShownPrompt:
        """The text that the model reads for `complete` of a text or `chat` of messages; arguments are theirs."""
        asked = self.request(prompt, formatted, **kwargs)
        names = ("question", "documents", "prompt", "mode", "focus", "chat_template_kwargs")
        return self._generator.show_prompt(**{name: asked[name] for name in names})

    def request(self, prompt: str | Sequence[ChatMessage], formatted: bool = False, **kwargs: Any) -> dict[str, Any]:
        """Arguments of the generator's `answer` for `complete` of a text or `chat` of messages."""
        if isinstance(prompt, str):
            return self._complete_request(prompt, formatted, kwargs)
        return self._chat_request(prompt, kwargs)

    @llm_completion_callback()
    def complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponse:
        """Answer `prompt`; see the class for what `kwargs` may hold."""
        return completion_response(self._generator.answer(**self._complete_request(prompt, formatted, kwargs)))

    @llm_completion_callback()
    def stream_complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponseGen:
        """Like `complete`, piece by piece. Wrong arguments raise here, not at the first piece."""
        return completion_chunks(self._generator.stream(**self._complete_request(prompt, formatted, kwargs)))

    @llm_completion_callback()
    async def acomplete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponse:
        """Like `complete`, while the event loop stays free; calls at the same time are answered together."""
        request = self._complete_request(prompt, formatted, kwargs)
        return completion_response(await self._generator.aanswer(**request))

    @llm_completion_callback()
    async def astream_complete(
        self, prompt: str, formatted: bool = False, **kwargs: Any
    ) -> CompletionResponseAsyncGen:
        """Like `stream_complete`; each piece is computed in a worker thread."""
        request = self._complete_request(prompt, formatted, kwargs)
        return acompletion_chunks(await asyncio.to_thread(self._generator.stream, **request))

    @llm_chat_callback()
    def chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponse:
        """Answer the last user message, in its conversation; see the class for what `kwargs` may hold."""
        request = self._chat_request(messages, kwargs)
        return chat_response(completion_response(self._generator.answer(**request)))

    @llm_chat_callback()
    def stream_chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponseGen:
        """Like `chat`, piece by piece."""
        return chat_chunks(completion_chunks(self._generator.stream(**self._chat_request(messages, kwargs))))

    @llm_chat_callback()
    async def achat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponse:
        """Like `chat`, while the event loop stays free; calls at the same time are answered together."""
        request = self._chat_request(messages, kwargs)
        return chat_response(completion_response(await self._generator.aanswer(**request)))

    @llm_chat_callback()
    async def astream_chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponseAsyncGen:
        """Like `stream_chat`; each piece is computed in a worker thread."""
        request = self._chat_request(messages, kwargs)
        return achat_chunks(acompletion_chunks(await asyncio.to_thread(self._generator.stream, **request)))

    @property
    def _sends_turns(self) -> bool:
        """Whether messages stay messages: the caller has no wording of their own for them."""
        return self.messages_to_prompt is generic_messages_to_prompt

    def _chat_request(self, messages: Sequence[ChatMessage], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        assert self.messages_to_prompt is not None  # the parent's validator fills it in
        place = kwargs.get("documents_place")
        if not self._sends_turns and place is not None:
            raise InvalidInputError(
                "documents_place is for messages, but this LLM has a messages_to_prompt that makes one text of them; "
                "call complete with a DocumentsPlace in that text."
            )
        wording = to_messages(messages, place) if self._sends_turns else self.messages_to_prompt(messages)
        return self._request(wording, {"question": last_question(messages), **kwargs})

    def _complete_request(self, prompt: str, formatted: bool, kwargs: Mapping[str, Any]) -> dict[str, Any]:
        assert self.completion_to_prompt is not None  # the parent's validator fills it in
        place: DocumentsPlace | None = kwargs.get("documents_place")
        if place is not None:  # offsets count in the text as it is
            wording: str | list[Message] = [Message("user", prompt, place)]
        else:
            wording = prompt if formatted else self.completion_to_prompt(prompt)
        return self._request(wording, {**kwargs, "question": kwargs.get("question") or prompt})

    def _request(self, wording: str | list[Message], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """The generator's arguments for one call."""
        unknown = sorted(set(kwargs) - set(_ARGUMENTS))
        if unknown:
            raise InvalidInputError(f"Unknown option {unknown[0]!r}; allowed are {', '.join(_ARGUMENTS)}.")
        given = kwargs.get("documents")
        documents = [] if given is None else to_documents(given)
        question = kwargs.get("question") or _last_text(wording)
        options = self._options(kwargs)
        # A tuned model reads a bare question in the template that it was tuned with. That template is about
        # documents, so a prompt without documents is sent as it is if the model follows instructions.
        is_templated = (
            wording in (question, [Message("user", question)])
            and not self._generator.reads_prompt(options["mode"])
            and (bool(documents) or not self._generator.follows_instructions)
        )
        return {"question": question, "documents": documents, "prompt": None if is_templated else wording, **options}

    def _options(self, kwargs: Mapping[str, Any]) -> dict[str, Any]:
        given: dict[str, Any] = {name: value for name, value in kwargs.items() if value is not None or name == "focus"}
        if "max_tokens" in given:
            if "max_new_tokens" in given:
                raise InvalidInputError("max_tokens and max_new_tokens are two names for one option; give one.")
            given["max_new_tokens"] = given.pop("max_tokens")
        options = {name: given.get(name, value) for name, value in self._defaults().items()}
        if self.chat_template_kwargs and "chat_template_kwargs" in given:
            options["chat_template_kwargs"] = {**self.chat_template_kwargs, **given["chat_template_kwargs"]}
        if isinstance(options["stop"], str):
            options["stop"] = (options["stop"],)
        return options

    def _defaults(self) -> dict[str, Any]:
        return {
            "temperature": self.temperature,
            "max_new_tokens": self.max_new_tokens,
            "top_p": self.top_p,
            "top_k": self.top_k,
            "stop": self.stop,
            "seed": self.seed,
            "mode": self.mode,
            "focus": self.focus,
            "attribution": self.attribution,
            "chat_template_kwargs": self.chat_template_kwargs,
        }


def _last_text(wording: str | list[Message]) -> str:
    if isinstance(wording, str):
        return wording
    if not wording:
        raise InvalidInputError("messages is empty, but there must be one at least: the one that is answered.")
    return wording[-1].text
