"""Tools, calls and results between LangChain and the generator."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from langchain_core.messages import AIMessage, BaseMessage, InvalidToolCall, ToolMessage
from langchain_core.messages.tool import ToolCall as LangChainCall
from langchain_core.messages.tool import ToolCallChunk, invalid_tool_call, tool_call_chunk
from langchain_core.messages.tool import tool_call as langchain_call

from kvfusion_rag import AnswerPiece, InvalidInputError, Tool, ToolCall

from .messages import message_text

_CHOICES = {"any": "required", "required": "required", "auto": "auto", "none": "none"}


def to_tools(definitions: Sequence[Mapping[str, Any]]) -> list[Tool]:
    """Return the generator's tools from OpenAI's dictionaries."""
    functions = [definition["function"] for definition in definitions]
    return [Tool(f["name"], f.get("description") or "", f.get("parameters") or {}) for f in functions]


def to_choice(choice: dict[str, Any] | str | bool | None, names: Sequence[str]) -> str | None:
    """Return ``tool_choice`` as the generator takes it.

    Raises:
        InvalidInputError: it is neither a choice nor the name of a tool.
    """
    if choice is None or isinstance(choice, bool):
        return "required" if choice else None
    name = choice.get("function", {}).get("name") if isinstance(choice, dict) else choice
    if name in names:
        return name
    if not isinstance(choice, str) or choice not in _CHOICES:
        raise InvalidInputError(
            f"tool_choice is {choice!r}, but it must be 'auto', 'any', 'none' or a tool's name: {', '.join(names)}."
        )
    return _CHOICES[choice]


def called(calls: Sequence[ToolCall]) -> dict[str, Any]:
    """Return the calls of an answer as fields of a message. A call that was cut is an invalid one."""
    valid: list[LangChainCall] = []
    invalid: list[InvalidToolCall] = []
    for call in calls:
        try:
            valid.append(langchain_call(name=call.name, args=json.loads(call.arguments), id=call.id))
        except ValueError as error:
            reason = f"the arguments are not JSON: {error}"
            invalid.append(invalid_tool_call(name=call.name, args=call.arguments, id=call.id, error=reason))
    return {"tool_calls": valid, "invalid_tool_calls": invalid}


def call_chunk(piece: AnswerPiece) -> ToolCallChunk:
    """Return a piece of a call."""
    name, id = (None, None) if piece.call is None else (piece.call.name, piece.call.id)
    return tool_call_chunk(name=name, args=piece.text, id=id, index=piece.call_index)


def tool_calls(message: BaseMessage) -> tuple[ToolCall, ...]:
    """Return the calls in a message as the generator's."""
    calls = message.tool_calls if isinstance(message, AIMessage) else []
    return tuple(
        ToolCall(call["name"], json.dumps(call["args"], ensure_ascii=False), call["id"] or "") for call in calls
    )


def results(messages: Sequence[BaseMessage]) -> frozenset[str]:
    """Return the ids of calls whose results are texts of their own, and not retrieved documents."""
    return frozenset(m.tool_call_id for m in messages if isinstance(m, ToolMessage) and message_text(m))
