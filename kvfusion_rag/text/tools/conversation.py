"""Tools, calls and results as messages, for prompts of models whose chat template does not show them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from ...errors import InvalidInputError
from ...schema import Message
from ..json_text import is_mapping
from .call_format import OWN_FORMAT, CallFormat
from .definitions import ToolUse, definition


def plain_messages(messages: Sequence[Message], use: ToolUse | None, format: CallFormat = OWN_FORMAT) -> list[Message]:
    """Return messages of system, user and assistant only, the first of which describes the tools."""
    plain = [_plain(message, format) for message in messages]
    if use is None:
        return plain
    block = _description(use, format)
    first = plain[0] if plain else None
    if first is None or first.role != "system":
        return [Message("system", block), *plain]
    block += "\n\n" if first.text or first.documents else ""
    place = first.documents
    moved = None if place is None else replace(place, offset=place.offset + len(block))
    return [replace(first, text=block + first.text, documents=moved), *plain[1:]]


def template_fields(message: Message, names: Mapping[str, str]) -> dict[str, Any]:
    """Return what a chat template that shows calls reads of a message besides role and text.

    Args:
        names: the tool of each call's id.
    """
    if message.tool_calls:
        calls = [
            {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": _object(call.arguments)}}
            for call in message.tool_calls
        ]
        return {"tool_calls": calls}
    if message.role != "tool":
        return {}
    fields = {"tool_call_id": message.tool_call_id, "name": names.get(message.tool_call_id or "")}
    return {name: value for name, value in fields.items() if value}


def tool_names(messages: Sequence[Message]) -> dict[str, str]:
    """Return the name of the tool of each call by its id."""
    return {call.id: call.name for message in messages for call in message.tool_calls}


def _plain(message: Message, format: CallFormat) -> Message:
    if message.tool_calls:
        parts = [message.text, format.write(message.tool_calls)]
        return Message("assistant", "\n".join(part for part in parts if part.strip()))
    if message.role == "tool":
        return Message("user", f"<tool_response>\n{message.text}\n</tool_response>")
    return message


def _description(use: ToolUse, format: CallFormat) -> str:
    functions = [json.dumps(definition(tool)["function"], ensure_ascii=False) for tool in use.tools]
    example = f"{format.opening}NAME{format.middle}{{...}}{format.closing}"
    return "\n".join(["You can call these tools:", *functions, "To call a tool, answer with:", example])


def _object(arguments: str) -> Mapping[str, Any]:
    try:
        found = json.loads(arguments or "{}")
    except (ValueError, RecursionError):
        found = None
    if not is_mapping(found):
        raise InvalidInputError(
            f"a call of the conversation has the arguments {arguments[:80]!r}, but they must be a JSON object."
        )
    return found
