"""The reasoning that some models write in front of their answer: how it is marked, and where it ends.

The marks are found in the model's chat template and tokenizer: a pair of tags such as ``<think>`` and ``</think>``,
or the channels of gpt-oss, of which ``final`` is the answer. A :class:`Reader` follows the tokens of one answer. It
does not know about budgets or streams.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

from ..errors import InvalidInputError
from .chat import typed

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Ids = tuple[int, ...]
Reasoning = Literal["auto", "none", "harmony"] | tuple[str, str]  # a tuple holds the opening and the closing tag
Stage = Literal["before", "reasoning", "answer"]

MAX_HELD = 16  # tokens in front of the reasoning: white space, or the pieces of a tag that is not one token
_CLOSING_TAG = re.compile(r"([<\[])/([\w:.|-]++)([>\]])")
_REASONING_NAME = re.compile("think|thought|reason", re.IGNORECASE)
_HARMONY = ("<|start|>", "<|channel|>", "<|message|>", "<|end|>")
_START, _CHANNEL, _MESSAGE, _END = _HARMONY
_FINAL = "final"


@dataclass(frozen=True, slots=True)
class Spelling:
    """How a tokenizer spells marks and plain text.

    Attributes:
        ids: id of each mark that is one token. A mark that is missing here is spelt by several tokens.
        encode, decode: plain text -> ids, and back without special tokens.
    """

    ids: Mapping[str, int]
    encode: Callable[[str], list[int]]
    decode: Callable[[list[int]], str]

    @classmethod
    def of(
        cls,
        tokenizer: PreTrainedTokenizerBase,
        marks: Sequence[str],
        encode: Callable[[str], list[int]],
        decode: Callable[[list[int]], str],
    ) -> Spelling:
        found = ((mark, _token_id(tokenizer, mark)) for mark in marks)
        return cls({mark: i for mark, i in found if i is not None}, encode, decode)

    def spell(self, text: str) -> Ids:
        """Return the ids of trusted text, with the ids of the marks in it."""
        if not self.ids:
            return tuple(self.encode(text))
        pieces = re.split(f"({'|'.join(map(re.escape, self.ids))})", text)
        ids = ([self.ids[piece]] if piece in self.ids else self.encode(piece) for piece in pieces if piece)
        return tuple(i for spelt in ids for i in spelt)


class Reader(Protocol):
    """Follows the tokens of one answer up to the end of its reasoning.

    Attributes:
        stage: "before" the reasoning, of which it is not yet known whether it comes; in the "reasoning"; in the
            "answer", and then the reader has nothing more to read.
        held: tokens read "before", which belong to the answer if no reasoning comes.
        lead: text of the answer's beginning in the token that ended the reasoning.
        cut: texts that end the reasoning's text, as stop strings end an answer's.
        ends: tokens that end the answer, besides the model's end tokens.
        opening: the token that opens the reasoning, or None if it is several tokens, or already open.
        gap: white space that the model writes between reasoning and answer.
    """

    stage: Stage
    held: list[int]
    lead: str
    cut: tuple[str, ...]
    ends: frozenset[int]
    opening: int | None
    gap: Ids

    def read(self, token: int) -> Sequence[int]:
        """Read the next token and return the ids that it adds to the reasoning."""
        ...

    def closing(self) -> Ids:
        """Return the tokens that end the reasoning here, as the model would write them."""
        ...


class ReasoningFormat(Protocol):
    """How one model marks its reasoning."""

    @property
    def marks(self) -> tuple[str, ...]:
        """Texts that the tokenizer may spell with one token."""
        ...

    def closing_text(self, prompt: str) -> str:
        """Return the text that ends the reasoning right behind ``prompt``, or "" if it has not begun there."""
        ...

    def reader(self, prompt: str, spelling: Spelling) -> Reader:
        """Return a reader of the answer to ``prompt``, the text that the model reads."""
        ...

    def most_closing(self, spelling: Spelling) -> int:
        """Return an upper bound of the tokens that an answer needs besides those of its reasoning and its text."""
        ...


@dataclass(frozen=True, slots=True)
class ReasoningStart:
    """The reasoning of the answer to one prompt.

    Attributes:
        prompt: the end of the prompt's text.
    """

    format: ReasoningFormat
    prompt: str
    spelling: Spelling

    @classmethod
    def of(cls, form: ReasoningFormat | None, prompt: str, spelling: Spelling) -> ReasoningStart | None:
        """Return the start behind ``prompt``, or None if the model has no reasoning or the prompt has closed it."""
        start = None if form is None else cls(form, prompt[-200:], spelling)
        return None if start is None or start.reader().stage == "answer" else start

    @property
    def overhead(self) -> int:
        """Tokens that an answer may need besides its reasoning and its text."""
        return self.format.most_closing(self.spelling)

    def reader(self) -> Reader:
        return self.format.reader(self.prompt, self.spelling)

    def closing(self) -> Ids:
        """Return the tokens that end the reasoning right here, if the prompt has opened it."""
        return self.spelling.spell(self.format.closing_text(self.prompt))


@dataclass(frozen=True, slots=True)
class Tags:
    """Reasoning between two tags at the beginning of an answer.

    Attributes:
        space: white space that the model writes behind the closing tag.
    """

    opening: str
    closing: str
    space: str = "\n\n"

    @property
    def marks(self) -> tuple[str, ...]:
        return self.opening, self.closing

    def closing_text(self, prompt: str) -> str:
        return self.closing + self.space if prompt.rstrip().endswith(self.opening) else ""

    def reader(self, prompt: str, spelling: Spelling) -> Reader:
        end = prompt.rstrip()
        stage: Stage = "reasoning" if end.endswith(self.opening) else "before"
        return _TagReader(self, spelling, "answer" if end.endswith(self.closing) else stage)

    def most_closing(self, spelling: Spelling) -> int:
        return MAX_HELD + len(spelling.spell(self.closing + self.space))


class _TagReader:
    """Reads tags that are one token each by their ids, so that text which only looks like a tag is none."""

    def __init__(self, tags: Tags, spelling: Spelling, stage: Stage) -> None:
        self._tags, self._spelling = tags, spelling
        self.stage: Stage = stage
        self._opening_id, self._closing_id = (spelling.ids.get(tag) for tag in tags.marks)
        self._recent: list[int] = []
        self.held: list[int] = []
        self.lead = ""
        self.cut = (tags.closing,) if self._closing_id is None else ()
        self.ends: frozenset[int] = frozenset()
        self.opening, self.gap = self._opening_id, spelling.spell(tags.space)

    def read(self, token: int) -> Sequence[int]:
        if self.stage == "before":
            self._read_opening(token)
            return ()
        if token == self._closing_id:
            self.stage = "answer"
            return ()
        if self._closing_id is not None:
            return (token,)
        self._recent = [*self._recent, token][-len(self._tags.closing) :]
        _, tag, rest = self._spelling.decode(self._recent).partition(self._tags.closing)
        if tag:
            self.stage, self.lead = "answer", rest
        return (token,)

    def _read_opening(self, token: int) -> None:
        self.held.append(token)
        text = self._spelling.decode(self.held).lstrip()
        tag = self._tags.opening
        if token == self._opening_id or (self._opening_id is None and text.startswith(tag)):
            self.stage, self.held = "reasoning", []
        elif len(self.held) == MAX_HELD or not (tag.startswith(text) if self._opening_id is None else text == ""):
            self.stage = "answer"

    def closing(self) -> Ids:
        return self._spelling.spell(self._tags.closing + self._tags.space)


@dataclass(frozen=True, slots=True)
class Harmony:
    """The channels of gpt-oss: messages of which the one in the channel ``final`` is the answer.

    A message is ``<|start|>assistant<|channel|>analysis<|message|>text<|end|>``. The prompt ends inside its header.
    """

    @property
    def marks(self) -> tuple[str, ...]:
        return _HARMONY

    def closing_text(self, prompt: str) -> str:
        """Return the rest of a final message's header. ``prompt`` must end with a message, or in its header."""
        header = prompt.rpartition(_START)[2]
        if _MESSAGE not in header:
            return _closed_header(header)
        if _END not in header:
            return "" if _name(header.partition(_MESSAGE)[0]) == _FINAL else _END + _START + _closed_header("")
        return _START + _closed_header("")

    def reader(self, prompt: str, spelling: Spelling) -> Reader:
        return _HarmonyReader(self, spelling, prompt.rpartition(_START)[2])

    def most_closing(self, spelling: Spelling) -> int:
        return len(spelling.spell(_MESSAGE + _END + _START + _closed_header("")))


class _HarmonyReader:
    """Reads message by message. ``text`` is the message so far behind ``<|start|>``, its text left out."""

    def __init__(self, form: Harmony, spelling: Spelling, text: str) -> None:
        self._form, self._spelling = form, spelling
        self._names = {i: mark for mark, i in spelling.ids.items()}
        self._text = text
        self._has_read = False  # any reasoning
        self.stage: Stage = "reasoning" if form.closing_text(_START + text) else "answer"
        self.held: list[int] = []
        self.lead = ""
        self.cut: tuple[str, ...] = ()
        self.ends = frozenset({spelling.ids[_END]})
        self.opening: int | None = None
        self.gap: Ids = ()

    def read(self, token: int) -> Sequence[int]:
        mark = self._names.get(token)
        if mark is None and _MESSAGE in self._text:
            is_next = _END in self._text  # text behind a message, where a header should be
            self._has_read = self._has_read or not is_next
            return () if is_next else (token,)
        self._text = "" if mark == _START else self._text + (mark or self._spelling.decode([token]))
        if mark != _MESSAGE:
            return ()
        if _name(self._text.partition(_MESSAGE)[0]) == _FINAL:
            self.stage = "answer"
        return self._spelling.encode("\n\n") if self._has_read and self.stage == "reasoning" else ()

    def closing(self) -> Ids:
        return self._spelling.spell(self._form.closing_text(_START + self._text))


def _closed_header(header: str) -> str:
    """Return what turns the beginning of a header behind ``<|start|>`` into that of a final message."""
    role, channel, _ = header.partition(_CHANNEL)
    if not channel:
        return ("" if role.strip() else "assistant") + _CHANNEL + _FINAL + _MESSAGE
    name = _name(header)
    if name in ("", _FINAL):
        return ("" if name else _FINAL) + _MESSAGE
    return _MESSAGE + _END + _START + _closed_header("")


def _name(header: str) -> str:
    """Return the channel that a header names, or "" if it names none."""
    return next(iter(re.findall(r"[a-z]+", header.partition(_CHANNEL)[2])), "")


def find_format(tokenizer: PreTrainedTokenizerBase, choice: Reasoning = "auto") -> ReasoningFormat | None:
    """Return how a model marks its reasoning, or None if its template and tokenizer know no such marks.

    Args:
        choice: what the model's settings say. "auto" looks into the chat template, then at the tokenizer's own tokens.

    Raises:
        InvalidInputError: the settings name channels that the tokenizer does not have.
    """
    if choice == "none" or (choice == "auto" and typed(tokenizer).chat_template is None):
        return None
    has_channels = all(_token_id(tokenizer, mark) is not None for mark in _HARMONY)
    if choice == "harmony":
        if not has_channels:
            raise InvalidInputError(
                f"reasoning is 'harmony', but the tokenizer lacks one of the tokens {', '.join(_HARMONY)}; use 'auto' "
                "for a model that does not write in channels."
            )
        return Harmony()
    if choice != "auto":
        opening, closing = choice
        return Tags(opening, closing.rstrip(), closing[len(closing.rstrip()) :] or "\n\n")
    template = typed(tokenizer).get_chat_template()
    if has_channels and all(mark in template for mark in (_START, _CHANNEL, _MESSAGE)):
        return Harmony()
    tokens = " ".join(str(token) for token in tokenizer.added_tokens_decoder.values())
    for text in (template, tokens):
        for found in _CLOSING_TAG.finditer(text):
            if _REASONING_NAME.search(found[2]):
                return Tags(found[1] + found[2] + found[3], found[0], _space_behind(found[0], text))
    return None


def _token_id(tokenizer: PreTrainedTokenizerBase, text: str) -> int | None:
    """Return the id of the token that is exactly ``text``, or None if there is none."""
    found = tokenizer.convert_tokens_to_ids(text)
    return found if isinstance(found, int) and typed(tokenizer).decode([found]) == text else None


def _space_behind(closing: str, template: str) -> str:
    """Return the line breaks that a template writes behind the closing tag, or a blank line if it writes none."""
    runs = re.findall(re.escape(closing) + r"((?:\\n|\n)+)", template)
    return "\n" * max((run.replace("\\n", "\n").count("\n") for run in runs), default=2)
