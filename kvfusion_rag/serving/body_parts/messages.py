"""Messages in request bodies: their texts, tool calls, and the rule that one of them contains a question."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from ...schema import Message
from .base import Body, Text
from .tools import MAX_CALL_ID_CHARACTERS, MAX_CALLS, ToolCallBody

MAX_MESSAGES = 1000


class TextPart(BaseModel):
    """A part of a message, for the schema."""

    type: Literal["text"]
    text: str


def _joined_parts(content: object) -> object:
    """Join content that consists of several parts. Raises ValueError for a part that is not text."""
    if not isinstance(content, list):
        return content
    for number, part in enumerate(content):
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            kind = part.get("type") if isinstance(part, dict) else None
            raise ValueError(
                f"part {number} has the type {str(kind)[:50]!r}, but this model reads only text: "
                '{"type": "text", "text": "..."}'
            )
    return "".join(part["text"] for part in content)


_CALLS_FIT_THE_ROLE: dict[str, Any] = {
    "allOf": [
        {
            "if": {"properties": {"role": {"const": "tool"}}},
            "then": {"required": ["tool_call_id"], "properties": {"tool_call_id": {"type": "string"}}},
        },
        {
            "if": {"properties": {"role": {"not": {"const": "assistant"}}}},
            "then": {"properties": {"tool_calls": {"anyOf": [{"type": "null"}, {"maxItems": 0}]}}},
        },
    ]
}


class ChatMessage(Body):
    """One message. Other fields of an answer are accepted but ignored, so that answers can be sent back."""

    model_config = ConfigDict(json_schema_extra=_CALLS_FIT_THE_ROLE)

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Annotated[Text, BeforeValidator(_joined_parts, json_schema_input_type=str | list[TextPart])] = ""
    tool_calls: Annotated[list[ToolCallBody], Field(max_length=MAX_CALLS, fail_fast=True)] | None = None
    tool_call_id: Annotated[Text, Field(max_length=MAX_CALL_ID_CHARACTERS)] | None = None
    name: Text | None = None
    refusal: Text | None = None
    annotations: list[Any] | None = None
    reasoning_content: Text | None = None
    reasoning: Text | None = None

    @model_validator(mode="after")
    def _calls_fit_the_role(self) -> Self:
        if self.tool_calls and self.role != "assistant":
            raise ValueError(f"a message of the role {self.role!r} has tool_calls, but only the assistant calls tools")
        if self.role == "tool" and self.tool_call_id is None:
            raise ValueError("a message of the role 'tool' has no tool_call_id, which names the call that it answers")
        return self

    def to_message(self) -> Message:
        role = "system" if self.role == "developer" else self.role
        calls = tuple(call.to_call() for call in self.tool_calls or ())
        return Message(role, self.content, tool_calls=calls, tool_call_id=self.tool_call_id)


def _has_question(messages: Sequence[ChatMessage]) -> Sequence[ChatMessage]:
    if not any(message.role == "user" and message.content.strip() for message in messages):
        raise ValueError("there is no message of the user that is not blank")
    return messages


def question_of(messages: Sequence[ChatMessage]) -> str:
    """Return the last message of the user that is not blank."""
    return next(m.content for m in reversed(messages) if m.role == "user" and m.content.strip())


# Python takes more characters for white space than the regular expressions of JSON Schema.
_NOT_BLANK = {"type": "string", "pattern": r"[^\s\u001c-\u001f\u0085]"}
_ASKS = {
    "type": "object",
    "properties": {
        "role": {"const": "user"},
        "content": {
            "anyOf": [
                _NOT_BLANK,
                {"type": "array", "contains": {"type": "object", "properties": {"text": _NOT_BLANK}}},
            ]
        },
    },
    "required": ["role", "content"],
}
Messages = Annotated[
    list[ChatMessage],
    Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True, json_schema_extra={"contains": _ASKS}),
    AfterValidator(_has_question),
]
