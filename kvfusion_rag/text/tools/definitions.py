"""The tools of one call, checked: names, sizes, and which of them may or must be called."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ...errors import InvalidInputError
from ...schema import Tool
from ..answer_format import MAX_FORMAT_CHARACTERS, AnswerFormat, as_json
from ..json_text import is_a, is_mapping, is_sequence

MAX_TOOLS = 128
CHOICES = ("auto", "none", "required")

_NAME = re.compile(r"[A-Za-z0-9_.:-]{1,64}")


@dataclass(frozen=True, slots=True)
class ToolUse:
    """Tools that one answer may call.

    Attributes:
        choice: "auto", "required" (at least one call), or the name of the tool that is called.
        several: whether an answer may call more than once.
        schemas: JSON schema of the arguments of each tool, as JSON.
    """

    tools: tuple[Tool, ...]
    choice: str
    several: bool
    schemas: tuple[str, ...]

    @classmethod
    def of(cls, tools: Any, choice: str | None, parallel: bool | None) -> ToolUse | None:
        """Return the checked tools, or None if there are none or none may be called.

        Args:
            tools: a list of ``Tool``.
            choice: see ``choice``, or "none". Default: "auto".
            parallel: whether an answer may call more than once. Default: with "auto".

        Raises:
            InvalidInputError: a tool, its schema or the choice is not allowed.
        """
        tools = () if tools is None else tools
        if not is_sequence(tools) or not all(isinstance(tool, Tool) for tool in tools):
            raise InvalidInputError(f"tools is a {type(tools).__name__}, but it must be a list of kvfusion_rag.Tool.")
        choice = "auto" if choice is None else choice
        names = [tool.name for tool in tools]
        _require_names(names)
        if choice not in (*CHOICES, *names):
            raise InvalidInputError(
                f"tool_choice is {choice!r}, but it must be {', '.join(map(repr, CHOICES))} or the name of a tool."
            )
        if choice == "required" and not tools:
            raise InvalidInputError("tool_choice is 'required', but there are no tools.")
        if choice == "none" or not tools:
            return None
        schemas = tuple(_schema(tool) for tool in tools)
        size = sum(map(len, schemas)) + sum(len(tool.description) for tool in tools)
        if size > MAX_FORMAT_CHARACTERS:
            raise InvalidInputError(
                f"the tools have {size} characters, but at most {MAX_FORMAT_CHARACTERS} are allowed; pass fewer ones."
            )
        return cls(tuple(tools), choice, choice == "auto" if parallel is None else parallel, schemas)

    @property
    def callable(self) -> list[tuple[str, str]]:
        """Name and schema of each tool that may be called."""
        pairs = ((tool.name, schema) for tool, schema in zip(self.tools, self.schemas, strict=True))
        return [pair for pair in pairs if self.choice in (*CHOICES, pair[0])]


def definition(tool: Tool) -> dict[str, Any]:
    """Return a tool as OpenAI's API and chat templates describe it."""
    parameters = dict(tool.parameters) or {"type": "object", "properties": {}}
    function = {"name": tool.name, "description": tool.description, "parameters": parameters}
    return {"type": "function", "function": function}


def _require_names(names: Sequence[str]) -> None:
    if len(names) > MAX_TOOLS:
        raise InvalidInputError(f"there are {len(names)} tools, but at most {MAX_TOOLS} are allowed.")
    for number, name in enumerate(names):
        if not is_a(name, str) or not _NAME.fullmatch(name) or name in CHOICES:
            raise InvalidInputError(
                f"a tool is named {str(name)[:80]!r}, but a name must have 1 to 64 letters, digits or signs of '_.:-' "
                f"and must not be one of {', '.join(CHOICES)}."
            )
        if name in names[:number]:
            raise InvalidInputError(f"two tools are named {name!r}, but names must differ.")


def _schema(tool: Tool) -> str:
    if not is_a(tool.description, str):
        raise InvalidInputError(f"the description of tool {tool.name!r} must be a text.")
    if not is_mapping(tool.parameters):
        raise InvalidInputError(f"the parameters of tool {tool.name!r} must be a JSON schema, a dictionary.")
    parameters = definition(tool)["function"]["parameters"]
    if parameters.get("type", "object") != "object":
        raise InvalidInputError(
            f"the parameters of tool {tool.name!r} have the type {as_json(parameters['type'], 'the type')[:40]}, but "
            "arguments are an object."
        )
    return AnswerFormat.json_schema({"type": "object", **parameters}).text
