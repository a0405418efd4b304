"""The grammar of an answer that may call tools, as llguidance reads it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping

from ...errors import InvalidInputError
from ..answer_format import AnswerFormat, with_fixed_space
from .call_format import CallFormat
from .definitions import ToolUse


def call_grammar(
    use: ToolUse, format: CallFormat, control: Mapping[str, int], content: AnswerFormat | None = None
) -> AnswerFormat:
    """Return the format of an answer with text, calls, or text in front of calls.

    Args:
        content: JSON format of answers that do not call a tool.

    Raises:
        InvalidInputError: calls and ``content`` cannot be told apart.
        control: ids of the model's control tokens by their text. They are one token each in a native format. Our own
            format is plain text, also in the prompt.
    """
    control = control if format.is_native else {}
    rules = [f"call_{number}: %json {with_fixed_space(schema)}" for number, (_, schema) in enumerate(use.callable)]
    names = (f"{_quoted(name)} {_sequence(format.middle, control)} call_{number}"
             for number, (name, _) in enumerate(use.callable))  # fmt: skip
    rules.append(f"call: {' | '.join(names)}")
    repeated = use.several and format.between is not None
    more = f"({_sequence(format.between or '', control)} call)*" if repeated else ""
    calls = f"call {more} {_sequence(format.closing, control)}"
    if use.choice != "auto":
        start = f"start: {_sequence(format.opening, control)} {calls}"
    elif content is not None:
        if content.kind != "json_schema" or format.opening.startswith("{"):
            raise InvalidInputError(
                "response_format and tools are both given, but this model cannot choose between them; pass one of "
                "them. With tools, only JSON is supported."
            )
        start = f"start: {_sequence(format.opening, control)} {calls} | content"
        rules.append(f"content: %json {with_fixed_space(content.text)}")
    else:
        start = _free(format.opening, calls, control)
    return AnswerFormat("grammar", "\n".join([start, *rules]) + "\n")


def _free(opening: str, calls: str, control: Mapping[str, int]) -> str:
    """Return the rules of any text, in which the beginning of a call must be followed by a whole one."""
    text = "TEXT: /(?s:.*)/"
    parts = _split(opening, control)
    if parts[0] in control:
        return f"start: plain ({_sequence(opening, control)} {calls})?\nplain: TEXT\n{text}"
    line, newline, rest = parts[0].partition("\n")
    behind = _sequence("".join([newline + rest, *parts[1:]]), control)
    return f"start: plain | head {behind} {calls}\nplain: TEXT\nhead[lazy]: TEXT {_quoted(line)}\n{text}"


def _sequence(text: str, control: Mapping[str, int]) -> str:
    return " ".join(f"<[{control[part]}]>" if part in control else _quoted(part) for part in _split(text, control))


def _split(text: str, control: Mapping[str, int]) -> list[str]:
    """Return control tokens and the texts between them."""
    marks = sorted((mark for mark in control if mark in text), key=len, reverse=True)
    if not marks:
        return [text] if text else []
    return [part for part in re.split(f"({'|'.join(map(re.escape, marks))})", text) if part]


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
