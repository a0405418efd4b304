"""Tools, calls and formats of answers in request bodies. Sizes are limited here and, before work, by the generator."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import ConfigDict, Field, model_validator

from ...schema import Tool, ToolCall
from ...text.answer_format import AnswerFormat
from ...text.tools.definitions import CHOICES, MAX_TOOLS
from .base import Body, Text

MAX_CALLS = 128  # per message
MAX_CALL_ID_CHARACTERS = 256
MAX_TOOL_NAME_CHARACTERS = 64

Name = Annotated[Text, Field(min_length=1, max_length=MAX_TOOL_NAME_CHARACTERS)]
# The generator checks this; here it is only shown. The second part forbids a line break at the end.
_NAME_SCHEMA: dict[str, Any] = {
    "pattern": "^[A-Za-z0-9_.:-]+$",
    "not": {"anyOf": [{"pattern": "[^A-Za-z0-9_.:-]"}, {"enum": list(CHOICES)}]},
}
ToolName = Annotated[Name, Field(json_schema_extra=_NAME_SCHEMA)]


class FunctionBody(Body):
    """A function that the model may call. Arguments always match ``parameters``, whatever ``strict`` is."""

    name: ToolName
    description: Text = ""
    parameters: dict[str, Any] = Field(default_factory=dict)
    strict: bool | None = None


class ToolBody(Body):
    """A tool. Only functions are supported."""

    type: Literal["function"]
    function: FunctionBody

    def to_tool(self) -> Tool:
        return Tool(self.function.name, self.function.description, self.function.parameters)


class ChosenFunction(Body):
    """The name of the function to call."""

    name: ToolName


class ChosenTool(Body):
    """The tool that the model must call."""

    type: Literal["function"]
    function: ChosenFunction


class CalledFunction(Body):
    """A function that the model called, and its arguments as the text of a JSON object."""

    name: Name
    arguments: Text = "{}"


class ToolCallBody(Body):
    """A call of a tool in an earlier message of the assistant."""

    type: Literal["function"] = "function"
    id: Annotated[Text, Field(max_length=MAX_CALL_ID_CHARACTERS)]
    function: CalledFunction
    index: int | None = None

    def to_call(self) -> ToolCall:
        return ToolCall(self.function.name, self.function.arguments, self.id)


class JsonSchemaBody(Body):
    """A JSON schema. Answers always match it, whatever ``strict`` is."""

    name: Text = ""
    description: Text = ""
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None


_HAS_ITS_SCHEMA: dict[str, Any] = {
    "if": {"properties": {"type": {"const": "json_schema"}}},
    "then": {"required": ["json_schema"], "properties": {"json_schema": {"type": "object"}}},
    "else": {"properties": {"json_schema": {"type": "null"}}},
}


class ResponseFormatBody(Body):
    """What the answer must look like."""

    model_config = ConfigDict(json_schema_extra=_HAS_ITS_SCHEMA)

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchemaBody | None = None

    @model_validator(mode="after")
    def _has_its_schema(self) -> Self:
        if self.type == "json_schema" and self.json_schema is None:
            raise ValueError("json_schema is missing, which the type 'json_schema' needs")
        if self.type != "json_schema" and self.json_schema is not None:
            raise ValueError(f"json_schema belongs to the type 'json_schema' only, but the type is {self.type!r}")
        return self

    def to_format(self) -> AnswerFormat:
        """Return the format, which is not "text".

        Raises:
            InvalidInputError: the schema is too large.
        """
        if self.json_schema is None:
            return AnswerFormat.json_object()
        return AnswerFormat.json_schema(self.json_schema.schema_)


Tools = Annotated[list[ToolBody], Field(max_length=MAX_TOOLS, fail_fast=True)]
ToolChoice = Literal["none", "auto", "required"] | ChosenTool


def chosen_tool(choice: ToolChoice | None) -> str | None:
    """Return the choice as ``KVFusionGenerator.answer`` takes it."""
    return choice.function.name if isinstance(choice, ChosenTool) else choice
