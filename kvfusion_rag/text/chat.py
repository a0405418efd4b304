"""Renders the model's chat template around the messages of a prompt, with the documents in their place.

The template is rendered over the messages' own texts, so it trims and splits them exactly as in
``apply_chat_template``. Control tokens in untrusted text are broken up before rendering. ``layouts.py`` repairs them
afterwards and encodes the result. This module encodes nothing.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import groupby
from operator import attrgetter
from typing import TYPE_CHECKING, Any, Protocol, cast

from jinja2 import TemplateError

from ..errors import InvalidInputError
from ..schema import ROLES, DocumentsPlace, Message, Prompt
from .json_text import is_a, is_list, is_mapping

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TEXT_SEPARATOR = "\n\n"
DEFAULT_LEAD = "Answer the question from these documents.\n\n"  # before documents that the caller did not place
# Some templates print today's date, which would change the prefix, and therefore every key, at midnight. Llama 3 takes
# the date as a variable. SmolLM 3 calls a function, which is shadowed here.
FIXED_DATE = "26 Jul 2024"
_FIXED_CLOCK = f"{{%- macro strftime_now(format) -%}}{FIXED_DATE}{{%- endmacro -%}}"

# A variable of the wrong type fails inside the template with one of Python's own errors.
TEMPLATE_ERRORS = (
    TemplateError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError, RecursionError, MemoryError
)  # fmt: skip

_PROBE = "probe"  # text of a message
_LABELS = {"user": "User", "assistant": "Assistant", "system": "System"}
# What templates compare with, and therefore must be able to read.
_KNOWN_WORDS = frozenset({
    "type", "function", "name", "description", "parameters", "properties", "required", "enum", "items", "object",
    "array", "string", "number", "integer", "boolean", "null", "tool_calls", "tool_call_id", "id", "arguments",
})  # fmt: skip


class TypedTokenizer(Protocol):
    """What this package asks of transformers' tokenizers, which lack these types."""

    chat_template: str | dict[str, str] | None

    def get_chat_template(self) -> str: ...

    def apply_chat_template(
        self, conversation: Sequence[Mapping[str, Any]], *, tokenize: bool, add_generation_prompt: bool, **more: Any
    ) -> str: ...

    def decode(self, token_ids: list[int], **options: bool) -> str: ...


def typed(tokenizer: PreTrainedTokenizerBase) -> TypedTokenizer:
    """Return ``tokenizer`` with the types of what is asked of it."""
    return cast(TypedTokenizer, tokenizer)


class Marks:
    """Unguessable texts that mark places in a rendered template.

    Args:
        control_tokens: texts that the tokenizer would read as control tokens.
    """

    def __init__(self, control_tokens: Sequence[str]) -> None:
        nonce = secrets.token_hex(8)
        self.documents = f"[documents:{nonce}]"
        self.break_mark = f"[break:{nonce}]"
        self.start, self.end = f"[start:{nonce}]", f"[end:{nonce}]"
        longest_first = sorted((token for token in control_tokens if len(token) > 1), key=len, reverse=True)
        self._joined_tokens = "\0".join(longest_first)
        self._control = re.compile("|".join(map(re.escape, longest_first))) if longest_first else None

    def disarm(self, text: str, *, spare: Sequence[str] = ()) -> str:
        """Return ``text`` with a ``break_mark`` inside every control token except those in ``spare``."""
        if self._control is None:
            return text

        def broken(match: re.Match[str]) -> str:
            token = match[0]
            return token if token in spare else f"{token[:1]}{self.break_mark}{token[1:]}"

        return self._control.sub(broken, text)

    def disarm_data(self, value: Any) -> Any:
        """Return JSON data for a template, in which no text is or completes a control token.

        Templates write names between signs of their own, such as ``<`` and ``>``.
        """
        if isinstance(value, str):
            is_part = value in self._joined_tokens and value not in _KNOWN_WORDS and value != ""
            return f"{self.break_mark}{self.disarm(value)}" if is_part else self.disarm(value)
        if is_mapping(value):
            return {self.disarm_data(name): self.disarm_data(part) for name, part in value.items()}
        return [self.disarm_data(part) for part in value] if is_list(value) else value


def render(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[tuple[str, str]],
    kwargs: Mapping[str, Any] | None = None,
    *,
    fixed_date: bool,
    fields: Sequence[Mapping[str, Any]] | None = None,
) -> str:
    """Return the model's chat template around ``messages`` (role, text), up to the start of the answer.

    Args:
        kwargs: further variables of the template, as ``apply_chat_template`` takes them.
        fields: further fields of each message.
        fixed_date: put a constant in place of today's date.

    Raises:
        jinja2.TemplateError: the template does not accept these messages.
    """
    template = typed(tokenizer).get_chat_template()
    variables = dict(kwargs or {})
    if fixed_date:
        template = _FIXED_CLOCK + template
        variables.setdefault("date_string", FIXED_DATE)

    def fill(turns: Sequence[tuple[str, Any]], more: Sequence[Mapping[str, Any]] | None = None) -> str:
        return typed(tokenizer).apply_chat_template(
            [
                {"role": role, "content": content, **extra}
                for (role, content), extra in zip(turns, more or [dict[str, Any]()] * len(turns), strict=True)
            ],
            chat_template=template,
            tokenize=False,
            add_generation_prompt=True,
            **variables,
        )

    reads_parts = not _shows(fill, _PROBE) and _shows(fill, _as_parts(_PROBE))
    return fill([(role, _as_parts(content) if reads_parts else content) for role, content in messages], fields)


def _as_parts(text: str) -> list[dict[str, str]]:
    """Return a text as the list that templates of multimodal models read, some of which skip plain texts."""
    return [{"type": "text", "text": text}]


def _shows(fill: Callable[[Sequence[tuple[str, Any]]], str], content: Any) -> bool:
    """Whether the template shows a user message with this content."""
    try:
        return _PROBE in fill([("user", content)])
    except TEMPLATE_ERRORS:
        return False


def messages_of(prompt: Prompt, bare_prompt: str) -> list[Message]:
    """Return the messages of ``prompt``, which may be a text. If it is None, ``bare_prompt`` is the only message.

    Raises:
        InvalidInputError: an item is not a message, nothing asks for an answer, or several messages show the
            documents.
    """
    if prompt is None or isinstance(prompt, str):
        return [Message("user", bare_prompt if prompt is None else prompt)]
    for number, message in enumerate(prompt):
        if not is_a(message, Message) or message.role not in ROLES or not is_a(message.text, str):
            raise InvalidInputError(
                f"message {number} of the prompt is {message!r}, but it must be a kvfusion_rag.Message with a text "
                f"and one of the roles {', '.join(ROLES)}."
            )
        place = message.documents
        if place is not None and not 0 <= place.offset <= len(message.text):
            raise InvalidInputError(
                f"message {number} puts the documents at character {place.offset}, but its text has "
                f"{len(message.text)}."
            )
    messages = list(prompt)
    while messages and messages[-1].role != "tool" and _is_blank(messages[-1]):
        messages.pop()
    if not any(message.role == "tool" or (message.role == "user" and not _is_blank(message)) for message in messages):
        raise InvalidInputError(
            "the conversation has no text of the user and no result of a tool, but the model needs one to answer."
        )
    if sum(message.documents is not None for message in messages) > 1:
        raise InvalidInputError("the prompt shows the documents in several messages, but it may show them only once.")
    return messages


def _is_blank(message: Message) -> bool:
    return not message.text.strip() and message.documents is None


def with_place(messages: Sequence[Message], *, lead: str) -> list[Message]:
    """Return ``messages`` with the documents at the end of the system message, unless they already have a place.

    Args:
        lead: text in front of the documents.
    """
    if any(message.documents is not None for message in messages):
        return list(messages)
    if messages[0].role != "system":
        return [Message.around("system", lead, "", titles=True), *messages]
    text = messages[0].text + TEXT_SEPARATOR + lead
    return [Message.around("system", text, "", titles=True), *messages[1:]]


def documents_first(messages: Sequence[Message], question: str) -> list[Message]:
    """Return ``messages`` reordered so that the text in front of the documents is the same for all questions.

    Fixed text before the documents stays there. Lines that contain the question move behind the documents, and so do
    earlier turns of user and assistant: otherwise every turn would have to read the documents again.
    """
    number = next(n for n, message in enumerate(messages) if message.documents is not None)
    message, place = messages[number], messages[number].documents
    assert place is not None
    fixed, moved = _split_off_question(message.text[: place.offset], question)
    rest = moved + message.text[place.offset :]
    systems: list[Message] = []
    for earlier in (m for m in messages[:number] if m.role == "system"):
        system_text, question_lines = _split_off_question(earlier.text, question)
        systems += [replace(earlier, text=system_text)] if system_text.strip() else []
        rest = question_lines + rest
    history = [m for m in messages[:number] if m.role != "system"]
    if not history:
        return [*systems, _around(message, fixed, rest, place), *messages[number + 1 :]]
    opening = history.pop(0).text if history[0].role == "user" else ""
    first = _around(replace(message, role="user"), fixed, TEXT_SEPARATOR + opening, place)
    last = [replace(message, text=rest.strip(), documents=None)] if rest.strip() else []
    return [*systems, first, *history, *last, *messages[number + 1 :]]


def without_place(message: Message) -> Message:
    """Return ``message`` without the place of the documents, and close the gap in its text."""
    if message.documents is None:
        return message
    before, after = message.text[: message.documents.offset], message.text[message.documents.offset :]
    return Message(message.role, close_gap(before, after))


def close_gap(before: str, after: str) -> str:
    """Join the texts before and after the documents with the longer of the two runs of white space between them."""
    left, right = before.rstrip(), after.lstrip()
    if not left or not right:
        return left + right
    return left + max(before[len(left) :], after[: len(after) - len(right)], key=len) + right


def alternating(messages: Sequence[Message]) -> list[Message]:
    """Return ``messages`` as alternating turns of user and assistant, beginning and ending with the user.

    System texts open the first user turn. Neighbouring messages of one role become one turn.
    """
    opening = [replace(message, role="user") for message in messages if message.role == "system"]
    turns = [message for message in messages if message.role != "system"]
    if not opening and turns[0].role != "user":
        opening = [Message("user", "")]
    return [_joined(list(group)) for _, group in groupby([*opening, *turns], key=attrgetter("role"))]


def as_text(messages: Sequence[Message], text_of: Callable[[Message], str] = attrgetter("text")) -> str:
    """Return messages as one text, for models without a chat template. Several turns are labelled by their speaker."""
    if sum(message.role != "system" for message in messages) == 1:
        return TEXT_SEPARATOR.join(text_of(message) for message in messages if text_of(message))
    return TEXT_SEPARATOR.join(f"{_LABELS[m.role]}: {text_of(m)}" for m in messages if text_of(m))


def rendered(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    text_of: Callable[[Message], str],
    kwargs: Mapping[str, Any],
    *,
    fixed_date: bool,
    fields: Callable[[Message], Mapping[str, Any]] = lambda message: {},
    plain: Callable[[Sequence[Message]], Sequence[Message]] = lambda messages: messages,
) -> str:
    """Return the model's chat template around ``messages``, or their plain text if the model has no template.

    A template that rejects the roles gets alternating turns of user and assistant.

    Args:
        text_of: returns the text of a message, with the documents or a mark in their place.
        fields: returns further fields of a message.
        plain: returns messages without calls of tools and their results, which alternating turns cannot contain.

    Raises:
        InvalidInputError: the template rejects both forms, or its variables. The message contains the reason.
    """
    if typed(tokenizer).chat_template is None:
        return as_text(messages, text_of)
    reason: Exception | None = None
    for turns in (messages, alternating(plain(messages))):
        try:
            more = [fields(message) for message in turns]
            return render(tokenizer, [(m.role, text_of(m)) for m in turns], kwargs, fixed_date=fixed_date, fields=more)
        except TEMPLATE_ERRORS as error:
            reason = reason or error
    raise InvalidInputError(f"the model's chat template rejects this conversation: {reason}.") from reason


def _split_off_question(text: str, question: str) -> tuple[str, str]:
    """Return the lines of ``text`` that do not contain the question, and those that do."""
    question = question.strip()
    others: list[str] = []
    lines: list[str] = []
    at = 0
    while question and (start := text.find(question, at)) >= 0:
        first = text.rfind("\n", at, start) + 1 or at
        end = text.find("\n", start + len(question))
        last = len(text) if end < 0 else end + 1
        while last < len(text) and text[last] == "\n":
            last += 1
        others.append(text[at:first])
        lines.append(text[first:last])
        at = last
    return "".join(others) + text[at:], "".join(lines)


def _around(message: Message, before: str, after: str, place: DocumentsPlace) -> Message:
    return replace(message, text=before + after, documents=replace(place, offset=len(before)))


def _joined(messages: Sequence[Message]) -> Message:
    """Join neighbouring messages of one role into one, and keep the place of the documents."""
    whole = messages[0]
    for message in messages[1:]:
        start = len(whole.text) + len(TEXT_SEPARATOR)
        place = message.documents
        moved = whole.documents if place is None else replace(place, offset=start + place.offset)
        whole = Message(whole.role, whole.text + TEXT_SEPARATOR + message.text, moved)
    return whole
