"""How a model writes calls of tools.

Chat templates that show tools also show calls of earlier turns. Rendering such a call with known names tells how the
model writes one. Models without such a template are told to write calls in a format of our own.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ...schema import Tool, ToolCall
from ..chat import TEMPLATE_ERRORS, typed
from ..reasoning import Harmony, Reasoning, Tags, find_format
from .definitions import definition

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_NAME, _RESULT, _ID = "probe_tool", "probe result", "callprobe"
_ARGUMENTS = {"probe_argument": "probe value"}
_SPELLINGS = (json.dumps(_ARGUMENTS), json.dumps(_ARGUMENTS, separators=(",", ":")))


@dataclass(frozen=True, slots=True)
class CallFormat:
    """The text around the names and arguments of calls.

    Calls are ``opening name middle arguments (between name middle arguments)* closing``.

    Attributes:
        between: text between the arguments of a call and the name of the next, or None if there is at most one call.
        is_native: whether the model's chat template shows tools, calls and results.
    """

    opening: str
    middle: str
    between: str | None
    closing: str
    is_native: bool = True

    def write(self, calls: Sequence[ToolCall]) -> str:
        """Return calls as the model writes them."""
        if self.between is None:
            return "\n".join(f"{self.opening}{c.name}{self.middle}{c.arguments}{self.closing}" for c in calls)
        written = self.between.join(f"{call.name}{self.middle}{call.arguments}" for call in calls)
        return f"{self.opening}{written}{self.closing}"


OWN_FORMAT = CallFormat(
    '<tool_call>\n{"name": "',
    '", "arguments": ',
    '}\n</tool_call>\n<tool_call>\n{"name": "',
    "}\n</tool_call>",
    is_native=False,
)


def find_call_format(
    tokenizer: PreTrainedTokenizerBase, kwargs: Mapping[str, Any], ends: Sequence[str], reasoning: Reasoning = "auto"
) -> CallFormat:
    """Return how a model writes calls.

    Args:
        kwargs: variables of the chat template.
        ends: texts of the tokens that end an answer.
        reasoning: marks of the model's reasoning, as in its settings.
    """
    form = find_format(tokenizer, reasoning)
    # Channels end the reasoning, so none may call.
    if typed(tokenizer).chat_template is None or isinstance(form, Harmony):
        return OWN_FORMAT
    try:
        return _probed(tokenizer, kwargs, ends, form if isinstance(form, Tags) else None) or OWN_FORMAT
    except TEMPLATE_ERRORS:  # the template does not know these roles
        return OWN_FORMAT


def _probed(
    tokenizer: PreTrainedTokenizerBase, kwargs: Mapping[str, Any], ends: Sequence[str], tags: Tags | None
) -> CallFormat | None:
    """Return the format of the model's chat template, or None if the template has none that can be followed."""
    parameters = {"type": "object", "properties": {name: {"type": "string"} for name in _ARGUMENTS}}
    tools: list[Any] = [definition(Tool(_NAME, "", parameters))]

    def render(*messages: Mapping[str, Any], asks: bool = False) -> str:
        turns = [{"role": "user", "content": "probe"}, *messages]
        return typed(tokenizer).apply_chat_template(
            turns, tools=tools, tokenize=False, add_generation_prompt=asks, **kwargs
        )

    call = {"id": _ID, "type": "function", "function": {"name": _NAME, "arguments": _ARGUMENTS}}
    result = {"role": "tool", "content": _RESULT, "tool_call_id": _ID, "name": _NAME}
    one: dict[str, Any] = {"role": "assistant", "content": "", "tool_calls": [call]}
    asked, called = render(asks=True), render(one)
    if _NAME not in asked or not called.startswith(asked) or _RESULT not in render(one, result, asks=True):
        return None
    body = called[len(asked) :]
    opening, _, rest = body.partition(_NAME)
    spelling = next((spelling for spelling in _SPELLINGS if spelling in rest), None)
    if spelling is None:
        return None
    middle, _, tail = rest.partition(spelling)
    if not opening.strip() or not middle or _ID in body or any(part in tail for part in (_NAME, spelling)):
        return None
    both = _body_of_two(render, one, asked)
    between = _between(both, f"{opening}{_NAME}{middle}{spelling}", f"{_NAME}{middle}{spelling}{tail}")
    if tags is not None:
        opening = opening.rpartition(tags.closing)[2].lstrip()
    return CallFormat(opening.lstrip(), middle, between, _until_end(tail, ends))


def _body_of_two(render: Any, one: Mapping[str, Any], asked: str) -> str:
    try:
        return render({**one, "tool_calls": [*one["tool_calls"]] * 2})[len(asked) :]
    except TEMPLATE_ERRORS:  # some templates show only one call in a message
        return ""


def _between(body: str, first: str, last: str) -> str | None:
    if body.startswith(first) and body.endswith(last) and len(body) > len(first) + len(last):
        return body[len(first) : -len(last)]
    return None


def _until_end(text: str, ends: Sequence[str]) -> str:
    return min((text.partition(end)[0] for end in ends if end), key=len, default=text).rstrip()
