"""Request bodies: which fields are read, which are accepted but ignored, and which are rejected.

Everything in a body is untrusted. Lone surrogates become U+FFFD, so that ids and titles can be sent back.
"""

from __future__ import annotations

import base64
from dataclasses import dataclass
from math import isfinite
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    PositiveInt,
    WithJsonSchema,
)
from pydantic_core import CoreSchema, core_schema

from ..schema import Attributed, Document, FocusChoice, ModeChoice
from ..text.settings import require_focus
from ..text.support import MinSupport, require_min_support
from .body_parts.base import Body, Text, well_formed
from .body_parts.messages import Messages, question_of
from .body_parts.tools import ResponseFormatBody, ToolChoice, Tools, chosen_tool

MAX_ID_CHARACTERS = 256  # an id is repeated in the reply by every duplicate of its document
MAX_TITLE_CHARACTERS = 1000
MAX_METADATA = 256
MAX_STOPS = 16
MAX_STOP_CHARACTERS = 500
MAX_VARIABLES = 16
MAX_NAME_CHARACTERS = 64
MAX_VALUE_CHARACTERS = 500


class DocumentBody(Body):
    """One document, with the fields of ``kvfusion_rag.Document``."""

    text: Text
    id: Annotated[Text, Field(max_length=MAX_ID_CHARACTERS)] | None = None
    title: Annotated[Text, Field(max_length=MAX_TITLE_CHARACTERS)] | None = None
    metadata: dict[str, Any] = Field(default_factory=dict, max_length=MAX_METADATA)
    score: float | None = Field(None, description="Score of the retriever, higher for a better document.")

    def to_document(self) -> Document:
        return Document(self.text, self.id, self.title, self.metadata, self.score)


class StreamOptions(Body):
    include_usage: bool = False
    include_obfuscation: bool = False  # accepted, but no padding is sent


def _of_string(value: object) -> object:
    return {"text": value} if isinstance(value, str) else value


OneDocument = Annotated[DocumentBody, BeforeValidator(_of_string, json_schema_input_type=DocumentBody | str)]
# One error is reported, whatever the number of documents.
Documents = Annotated[list[OneDocument], Field(fail_fast=True)]


class _WithDocuments(Body):
    documents: Documents = Field(default_factory=list)

    def to_documents(self) -> list[Document]:
        return [body.to_document() for body in self.documents]


@dataclass(frozen=True, eq=False)  # otherwise Annotated would take the one with 0 and the one with False for equal
class _Only:
    """Validates an unsupported field, which may only have values that have no effect."""

    allowed: tuple[Any, ...]

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_after_validator_function(self._check, handler(source))

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        return {"enum": list(self.allowed)}

    def _check(self, value: Any) -> Any:
        if not any(value == one and isinstance(value, bool) == isinstance(one, bool) for one in self.allowed):
            raise ValueError(f"this is not supported; omit it or set it to {' or '.join(map(repr, self.allowed))}")
        return value


def _only(*allowed: Any) -> _Only:
    return _Only(allowed)


def _one_or_many(value: object) -> object:
    return [value] if isinstance(value, str) else value


def _scalars(variables: dict[str, Any]) -> dict[str, Any]:
    """Check chat template variables. Raises ValueError for a long name or text, or a value that is not a scalar."""
    for name, value in variables.items():
        if not 0 < len(name) <= MAX_NAME_CHARACTERS:
            raise ValueError(f"a name has {len(name)} characters, but it must have 1 to {MAX_NAME_CHARACTERS}")
        if not isinstance(value, str | bool | int | float | None) or (
            isinstance(value, float) and not isfinite(value)
        ):
            raise ValueError(f"{name!r} is not a text, a finite number, true, false or null")
        if isinstance(value, str) and len(value) > MAX_VALUE_CHARACTERS:
            raise ValueError(f"{name!r} has {len(value)} characters, but at most {MAX_VALUE_CHARACTERS} are allowed")
    return {name: well_formed(value) for name, value in variables.items()}


def _focus(value: object) -> object:
    require_focus(value)
    return value


def _min_support(value: object) -> object:
    require_min_support(value)
    return value


def _of_base64(value: object) -> bytes:
    if not isinstance(value, str):
        raise ValueError("this is not a string")
    try:
        return base64.b64decode(value, validate=True)
    except ValueError as error:
        raise ValueError("this is not base64") from error


Variables = Annotated[
    dict[Text, Any],
    Field(max_length=MAX_VARIABLES),
    AfterValidator(_scalars),
    WithJsonSchema(
        {
            "type": "object",
            "maxProperties": MAX_VARIABLES,
            "propertyNames": {"minLength": 1, "maxLength": MAX_NAME_CHARACTERS},
            "additionalProperties": {
                "type": ["string", "number", "boolean", "null"],
                "maxLength": MAX_VALUE_CHARACTERS,
            },
        }
    ),
]
Focus = Annotated[FocusChoice, BeforeValidator(_focus, json_schema_input_type=PositiveInt | Literal["auto"] | None)]
Share = Annotated[float, Field(ge=0, le=1)]
Stop = Annotated[Text, Field(min_length=1, max_length=MAX_STOP_CHARACTERS)]
Stops = Annotated[list[Stop], Field(max_length=MAX_STOPS, fail_fast=True)]


class DocumentsRequest(_WithDocuments):
    """A request to remove documents from the store."""

    documents: Documents = Field(min_length=1)


class UploadRequest(Body):
    """A file for the library of this server. ``content`` are its bytes in base64."""

    name: Text
    content: Annotated[bytes, BeforeValidator(_of_base64, json_schema_input_type=str)] = Field(
        json_schema_extra={"contentEncoding": "base64"}
    )


class RemoveRequest(Body):
    """The name of an uploaded file that is removed."""

    name: Text


class PrefillRequest(DocumentsRequest):
    """A request to prefill documents. ``messages`` and ``tools`` are an example of the requests that will follow."""

    messages: Messages | None = None
    chat_template_kwargs: Variables | None = None
    tools: Tools = Field(default_factory=list)

    def prefill_arguments(self) -> dict[str, Any]:
        """Return the arguments of ``KVFusionGenerator.prefill`` except the documents."""
        tools = [tool.to_tool() for tool in self.tools]
        wording = {"chat_template_kwargs": self.chat_template_kwargs, "tools": tools}
        if self.messages is None:
            return wording
        prompt = [message.to_message() for message in self.messages]
        return {"prompt": prompt, "question": question_of(self.messages), **wording}


class ChatRequest(_WithDocuments):
    """A request for a chat completion: OpenAI's fields, and those of KV-Fusion (documents, mode, focus, ...)."""

    NULLABLE: ClassVar[frozenset[str]] = frozenset({"focus"})

    model: Text
    messages: Messages
    mode: ModeChoice | None = None
    focus: Focus = Field(
        "auto",
        description="Keep the n documents that make the question most likely. null keeps all documents, 'auto' uses "
        "the model's own number. Default: the server's setting.",
    )
    retrieve: int | None = Field(
        None,
        ge=0,
        description="Number of documents that the server finds in its own files if the request has none. 0 for no "
        "documents. Default: the server's setting.",
    )
    chat_template_kwargs: Variables | None = None
    attribution: Attributed | None = None
    min_support: Annotated[
        MinSupport, BeforeValidator(_min_support, json_schema_input_type=Share | Literal["auto"] | None)
    ] = Field(
        None,
        description="Support by the documents (0 to 1) from which the answer counts as found. 'auto' is the threshold "
        "of the model's calibration. Default: the server's setting, else support is not measured.",
    )
    stream: bool = False
    stream_options: StreamOptions = Field(default_factory=StreamOptions)
    # The generator checks these ranges; here they are only shown.
    temperature: float = Field(0.0, json_schema_extra={"minimum": 0})
    top_p: float = Field(1.0, json_schema_extra={"exclusiveMinimum": 0, "maximum": 1})
    top_k: int | None = Field(None, json_schema_extra={"minimum": 1})
    max_tokens: int | None = Field(None, json_schema_extra={"minimum": 1})
    max_completion_tokens: int | None = Field(None, json_schema_extra={"minimum": 1})
    max_reasoning_tokens: int | None = Field(None, json_schema_extra={"minimum": 0})
    stop: Annotated[Stops, BeforeValidator(_one_or_many, json_schema_input_type=Stop | Stops)] = Field(
        default_factory=list
    )
    seed: int | None = Field(None, json_schema_extra={"minimum": 0, "maximum": 2**63 - 1})
    response_format: ResponseFormatBody | None = None
    tools: Tools = Field(default_factory=list)
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = None

    # Ignored: the answer is the same without them.
    user: Any = None
    metadata: Any = None
    store: Any = None
    service_tier: Any = None
    safety_identifier: Any = None
    prompt_cache_key: Any = None
    prompt_cache_retention: Any = None
    # Rejected unless the value has no effect.
    n: Annotated[Any, _only(1)] = 1
    logprobs: Annotated[Any, _only(False)] = False
    top_logprobs: Annotated[Any, _only(0)] = 0
    presence_penalty: Annotated[Any, _only(0)] = 0
    frequency_penalty: Annotated[Any, _only(0)] = 0
    logit_bias: Annotated[Any, _only({})] = None
    modalities: Annotated[Any, _only(["text"])] = None
    functions: Annotated[Any, _only([])] = None
    function_call: Annotated[Any, _only("none", "auto")] = None

    def to_arguments(self) -> dict[str, Any]:
        """Return the arguments of ``KVFusionGenerator.answer`` except mode and focus.

        The question is the last message of the user.
        """
        max_new_tokens = self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens
        return {
            **self._form(),
            "question": question_of(self.messages),
            "documents": self.to_documents(),
            "prompt": [message.to_message() for message in self.messages],
            "max_new_tokens": max_new_tokens,
            "max_reasoning_tokens": self.max_reasoning_tokens,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": self.top_k,
            "stop": self.stop,
            "seed": self.seed,
            "attribution": self.attribution,
            "min_support": self.min_support,
            "chat_template_kwargs": self.chat_template_kwargs,
        }

    def _form(self) -> dict[str, Any]:
        """Return the arguments that say what the answer consists of, if it is not only text."""
        choice = chosen_tool(self.tool_choice)
        if self.tools or choice not in (None, "none", "auto"):
            return {
                "tools": [tool.to_tool() for tool in self.tools],
                "tool_choice": choice,
                "parallel_tool_calls": self.parallel_tool_calls,
            }
        if self.response_format is None or self.response_format.type == "text":
            return {}
        return {"response_format": self.response_format.to_format()}
