"""Bodies of requests: which fields are read, which are taken and change nothing, and which are refused.

All of it is untrusted. Lone surrogates become U+FFFD here, so that ids and titles can be sent back.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from math import isfinite
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from ..schema import Attributed, Document, FocusChoice, Message, ModeChoice
from ..text.settings import require_focus

MOST_MESSAGES = 1000
MOST_STOPS = 16
LONGEST_STOP = 500  # characters
MOST_VARIABLES = 16
LONGEST_VARIABLE_NAME = 64  # characters
LONGEST_VARIABLE = 500  # characters

_LONE_SURROGATE = re.compile("[\ud800-\udfff]")


def _well_formed(value: object) -> object:
    return _LONE_SURROGATE.sub("\ufffd", value) if isinstance(value, str) else value


Text = Annotated[str, BeforeValidator(_well_formed)]


class _Body(BaseModel):
    """Null means absent, as OpenAI's clients have it, except in the fields named in ``NULLABLE``."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    NULLABLE: ClassVar[frozenset[str]] = frozenset()

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, value: object) -> object:
        if not isinstance(value, dict):
            return value
        return {k: v for k, v in value.items() if v is not None or k in cls.NULLABLE}


def _joined_parts(content: object) -> object:
    """The text of content that is given in parts.

    Raises:
        ValueError: a part is no text.
    """
    if not isinstance(content, list):
        return content
    for number, part in enumerate(content):
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            kind = part.get("type") if isinstance(part, dict) else None
            raise ValueError(
                f"part {number} is of type {str(kind)[:50]!r}, but this model reads text alone: "
                '{"type": "text", "text": "..."}'
            )
    return "".join(part["text"] for part in content)


class ChatMessage(_Body):
    """One message; what an assistant's message carries besides its text is empty or not read."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[Text, BeforeValidator(_joined_parts)] = ""
    name: Text | None = None
    refusal: Text | None = None
    annotations: list[Any] | None = None

    def to_message(self) -> Message:
        return Message("system" if self.role == "developer" else self.role, self.content)


class DocumentBody(_Body):
    """One document, as ``kvfusion_rag.Document``."""

    text: Text
    id: Text | None = None
    title: Text | None = None
    metadata: dict[str, Any] = Field(default_factory=dict)
    score: float | None = Field(None, description="The retriever's score, higher for a better document.")

    @model_validator(mode="before")
    @classmethod
    def _of_string(cls, value: object) -> object:
        return {"text": value} if isinstance(value, str) else value

    def to_document(self) -> Document:
        return Document(self.text, self.id, self.title, self.metadata, self.score)


class StreamOptions(_Body):
    include_usage: bool = False
    include_obfuscation: bool = False  # padding against guesses from lengths: none is sent


class _WithDocuments(_Body):
    documents: list[DocumentBody] = Field(default_factory=list)

    def to_documents(self) -> list[Document]:
        return [body.to_document() for body in self.documents]


def _only(*allowed: Any) -> AfterValidator:
    """Of a field that is not supported: the values that ask for nothing."""

    def check(value: Any) -> Any:
        if value not in allowed:
            raise ValueError(f"this is not supported; leave it out, or set it to {' or '.join(map(repr, allowed))}")
        return value

    return AfterValidator(check)


def _one_or_many(value: object) -> object:
    return [value] if isinstance(value, str) else value


def _ends_with_user(messages: Sequence[ChatMessage]) -> Sequence[ChatMessage]:
    if messages[-1].role != "user" or not messages[-1].content.strip():
        raise ValueError("the last message must be the user's and not blank, because that is what is answered")
    return messages


def _scalars(variables: dict[str, Any]) -> dict[str, Any]:
    """Variables of a chat template.

    Raises:
        ValueError: a name or a text is too long, or a value is not a JSON scalar.
    """
    for name, value in variables.items():
        if not 0 < len(name) <= LONGEST_VARIABLE_NAME:
            raise ValueError(f"a name has {len(name)} characters, but it must have 1 to {LONGEST_VARIABLE_NAME}")
        if not isinstance(value, str | bool | int | float | None) or (
            isinstance(value, float) and not isfinite(value)
        ):
            raise ValueError(f"{name!r} is not a text, a finite number, true, false or null")
        if isinstance(value, str) and len(value) > LONGEST_VARIABLE:
            raise ValueError(f"{name!r} has {len(value)} characters, but it may have {LONGEST_VARIABLE} at most")
    return {name: _well_formed(value) for name, value in variables.items()}


def _focus(value: object) -> object:
    require_focus(value)
    return value


Messages = Annotated[list[ChatMessage], Field(min_length=1, max_length=MOST_MESSAGES), AfterValidator(_ends_with_user)]
Variables = Annotated[dict[Text, Any], Field(max_length=MOST_VARIABLES), AfterValidator(_scalars)]


class DocumentsRequest(_WithDocuments):
    """Documents to forget."""

    documents: list[DocumentBody] = Field(min_length=1)


class PrefillRequest(DocumentsRequest):
    """Documents to prefill, and the wording that questions about them will come in."""

    messages: Messages | None = None
    chat_template_kwargs: Variables | None = None

    def to_wording(self) -> dict[str, Any]:
        """Arguments of ``KVFusionGenerator.prefill`` besides the documents."""
        if self.messages is None:
            return {"chat_template_kwargs": self.chat_template_kwargs}
        return {
            "prompt": [message.to_message() for message in self.messages],
            "question": self.messages[-1].content,
            "chat_template_kwargs": self.chat_template_kwargs,
        }


class ChatRequest(_WithDocuments):
    """A request for a chat completion.

    It has OpenAI's fields, and documents, mode, focus, attribution, top_k and variables.
    """

    NULLABLE: ClassVar[frozenset[str]] = frozenset({"focus"})

    model: Text
    messages: Messages
    mode: ModeChoice | None = None
    focus: Annotated[FocusChoice, BeforeValidator(_focus)] = Field(
        "auto",
        description="Keep this many documents, those that make the question likeliest; null keeps all, 'auto' is the "
        "model's own number. If it is absent, the server's own setting counts.",
    )
    chat_template_kwargs: Variables | None = None
    attribution: Attributed | None = None
    stream: bool = False
    stream_options: StreamOptions = Field(default_factory=StreamOptions)
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int | None = None
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    stop: Annotated[
        list[Annotated[Text, Field(min_length=1, max_length=LONGEST_STOP)]],
        Field(max_length=MOST_STOPS),
        BeforeValidator(_one_or_many),
    ] = Field(default_factory=list)
    seed: int | None = None

    # What asks for nothing that could be missing from an answer is taken, and not read.
    user: Any = None
    metadata: Any = None
    store: Any = None
    service_tier: Any = None
    safety_identifier: Any = None
    prompt_cache_key: Any = None
    prompt_cache_retention: Any = None
    # What asks for something that is not there is refused.
    n: Annotated[Any, _only(1)] = 1
    logprobs: Annotated[Any, _only(False)] = False
    top_logprobs: Annotated[Any, _only(0)] = 0
    presence_penalty: Annotated[Any, _only(0)] = 0
    frequency_penalty: Annotated[Any, _only(0)] = 0
    logit_bias: Annotated[Any, _only({})] = None
    response_format: Annotated[Any, _only({"type": "text"})] = None
    modalities: Annotated[Any, _only(["text"])] = None
    tools: Annotated[Any, _only([])] = None
    functions: Annotated[Any, _only([])] = None
    tool_choice: Annotated[Any, _only("none", "auto")] = None
    function_call: Annotated[Any, _only("none", "auto")] = None
    parallel_tool_calls: Annotated[Any, _only(True, False)] = None

    def to_arguments(self) -> dict[str, Any]:
        """Arguments of ``KVFusionGenerator.answer`` except mode and focus. The question is the last message's text."""
        longest = self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens
        return {
            "question": self.messages[-1].content,
            "documents": self.to_documents(),
            "prompt": [message.to_message() for message in self.messages],
            "max_new_tokens": longest,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": self.top_k,
            "stop": self.stop,
            "seed": self.seed,
            "attribution": self.attribution,
            "chat_template_kwargs": self.chat_template_kwargs,
        }
