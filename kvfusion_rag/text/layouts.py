"""Lays out the prompt of one question as token ids: a prefix, the documents, and the rest.

An untuned model reads the prompt in its own chat template. A joined prompt has the ids of ``apply_chat_template`` over
the same messages. A fused prompt has the same text with the documents in the same place. A tuned decoder reads the
fixed templates that it was trained with. It knows about text and ids, but not about weights or
positions.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

from transformers import PreTrainedTokenizerBase

from ..errors import InvalidInputError
from ..schema import Document, Message, Prompt
from .chat import DEFAULT_LEAD, Marks, documents_first, messages_of, rendered, typed, with_place
from .documents import EncodedDocuments
from .encoder import (
    Control,
    DocumentEncoder,
    PlainEncoder,
    PromptEncoder,
    TextDocuments,
    document_text,
    split_at_control_tokens,
)
from .reasoning import ReasoningStart, Spelling, Tags, find_format
from .settings import ModelSettings, leading_bos
from .tools.call_format import OWN_FORMAT, CallFormat
from .tools.conversation import plain_messages, template_fields, tool_names
from .tools.definitions import ToolUse, definition

Ids = tuple[int, ...]
Span = tuple[int, int]  # start and end, in tokens


@dataclass(frozen=True, slots=True)
class JoinedPrompt:
    """All documents in one prompt.

    Attributes:
        ids: token ids of the whole prompt.
        spans: token span of each of the caller's documents, or ``(0, 0)`` if the prompt does not contain it.
    """

    ids: Ids
    spans: tuple[Span, ...]


class Layout(Protocol):
    """The layout of one question's prompt.

    In a fused prompt, ``prefix`` precedes the documents and ``question`` follows them. ``reasoning`` is None if the
    answer follows without reasoning.
    """

    @property
    def prefix(self) -> Ids: ...
    @property
    def question(self) -> Ids: ...
    @property
    def documents(self) -> DocumentEncoder: ...
    @property
    def reasoning(self) -> ReasoningStart | None: ...
    def joined(self, encoded: EncodedDocuments) -> JoinedPrompt: ...


@dataclass(frozen=True, slots=True)
class FixedLayout:
    """The templates of a tuned decoder."""

    prefix: Ids
    question: Ids
    documents: DocumentEncoder
    reasoning: ReasoningStart | None = None

    @classmethod
    def of(cls, encoder: PromptEncoder, question: str, prompt: Prompt) -> FixedLayout:
        return cls(encoder.prefix_ids, encoder.encode_question(question, prompt), encoder)

    def joined(self, encoded: EncodedDocuments) -> JoinedPrompt:
        ids = [*self.prefix]
        spans: list[Span] = []
        for document in encoded.documents:
            start = len(ids)
            for piece in document.pieces:
                ids += piece
            spans.append((start, len(ids)) if document.pieces else (0, 0))
        return JoinedPrompt((*ids, *self.question), tuple(spans))


class ChatLayouts:
    """Creates layouts of prompts in the model's own chat template.

    Args:
        settings: settings with the variables of the chat template.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, settings: ModelSettings, plain: PlainEncoder) -> None:
        self.tokenizer, self.plain = tokenizer, plain
        self._kwargs = settings.chat_template_kwargs
        template = typed(tokenizer).chat_template
        self._has_template = template is not None
        self._start = "" if self._has_template else leading_bos(tokenizer)
        self._documents: dict[tuple[str, bool, bool], TextDocuments] = {}
        self._format = find_format(tokenizer, settings.reasoning)
        marks = () if self._format is None else self._format.marks
        # The template cuts the reasoning between these tags out of earlier answers.
        is_stripped = isinstance(self._format, Tags) and self._format.closing in (template or "")
        self._stripped = marks if is_stripped else ()
        self._spelling = Spelling.of(tokenizer, marks, partial(plain.encode, continues=True), plain.decode)

    def of(
        self,
        question: str,
        prompt: Prompt,
        *,
        has_documents: bool,
        kwargs: Mapping[str, Any] | None = None,
        tools: ToolUse | None = None,
        calls: CallFormat = OWN_FORMAT,
    ) -> ChatLayout:
        """Return the layout of one prompt.

        Args:
            question: the bare question.
            prompt: the caller's messages; None puts the question into the default wording.
            has_documents: whether there are documents, for which the prompt needs a place.
            kwargs: variables of the chat template for this prompt. Control tokens in them stay plain text.
            tools: tools that the prompt describes.
            calls: how the model writes calls of tools.

        Raises:
            InvalidInputError: the prompt cannot be answered, or the template rejects it.
        """
        messages = messages_of(prompt, self._bare_prompt(question) if has_documents else question)
        variables = {**self._kwargs, **(kwargs or {})}
        if not calls.is_native:
            messages = plain_messages(messages, tools, calls)
        elif tools is not None:
            variables["tools"] = [definition(tool) for tool in tools.tools]
        if has_documents:
            messages = with_place(messages, lead=DEFAULT_LEAD if self._has_template else "")
        return ChatLayout(self, messages, question, variables)

    def _bare_prompt(self, question: str) -> str:
        return question if self._has_template else f"Question: {question}\nAnswer:"

    def reasoning(self, prompt: str) -> ReasoningStart | None:
        """Return the reasoning of the answer to ``prompt``, a rendered template, or None if there is none."""
        return ReasoningStart.of(self._format, prompt, self._spelling)

    def text_documents(self, separator: str, titles: bool, continues: bool) -> TextDocuments:
        """Return the document encoder with these options, which all prompts share."""
        key = separator, titles, continues
        if key not in self._documents:
            options: dict[str, Any] = {"separator": separator, "titles": titles, "continues": continues}
            self._documents[key] = TextDocuments(self.plain, **options)
        return self._documents[key]

    def render(
        self, marks: Marks, messages: Sequence[Message], shown: str, kwargs: Mapping[str, Any], fixed: bool
    ) -> str:
        """Return the chat template around ``messages``, with the text ``shown`` in the place of the documents."""

        def text_of(message: Message) -> str:
            if message.documents is None:
                return marks.disarm(message.text, spare=self._stripped if message.role == "assistant" else ())
            at = message.documents.offset
            return marks.disarm(message.text[:at]) + shown + marks.disarm(message.text[at:])

        names = tool_names(messages)

        def fields(message: Message) -> Mapping[str, Any]:
            return marks.disarm_data(template_fields(message, names))

        variables = {
            name: marks.disarm(v) if isinstance(v, str) else marks.disarm_data(v) if name == "tools" else v
            for name, v in kwargs.items()
        }
        plain = partial(plain_messages, use=None)
        return self._start + rendered(
            self.tokenizer, messages, text_of, variables, fixed_date=fixed, fields=fields, plain=plain
        )

    def encode(self, text: str, marks: Marks, *, continues: bool = False) -> tuple[Ids, list[Span]]:
        """Return the ids of a rendered prompt, and the span of tokens between each start mark and its end mark."""
        ids: list[int] = []
        spans: list[Span] = []
        for part in split_at_control_tokens(text, self.tokenizer, self.plain.control_ids):
            if isinstance(part, Control):
                ids.append(part.token_id)
                continue
            clean, characters = _without_marks(part, marks)
            follows = continues or bool(ids)
            encoded = self.plain.encode(clean, continues=follows)
            if characters:
                offsets = self.plain.offsets(clean, continues=follows)
                spans += [_token_span(offsets, start, end, len(ids)) for start, end in characters]
            ids += encoded
        return tuple(ids), spans


class ChatLayout:
    """The layout of one prompt in the model's chat template."""

    def __init__(
        self, layouts: ChatLayouts, messages: Sequence[Message], question: str, kwargs: Mapping[str, Any]
    ) -> None:
        self._layouts, self._messages, self._kwargs = layouts, messages, kwargs
        place = next((message.documents for message in messages if message.documents is not None), None)
        self._place = place
        marks = Marks(layouts.plain.control_tokens)
        if place is None:
            self.prefix: Ids = ()
            text = layouts.render(marks, messages, "", kwargs, False)
            self.question = layouts.encode(text, marks)[0]
            self.reasoning = layouts.reasoning(text)
            self.documents: DocumentEncoder = layouts.text_documents("\n\n", False, False)
            return
        text = layouts.render(marks, documents_first(messages, question), marks.documents, kwargs, True)
        self.reasoning = layouts.reasoning(text)
        before, mark, after = text.partition(marks.documents)
        if not mark or marks.documents in after:
            raise InvalidInputError(
                "the model's chat template does not show the message with the documents exactly once, so they have "
                "no place in it."
            )
        self.prefix = layouts.encode(before, marks)[0]
        # Every document ends with the separator, including the last.
        self.question = layouts.encode(after.removeprefix(place.separator), marks, continues=True)[0]
        self.documents = layouts.text_documents(place.separator, place.titles, bool(self.prefix))

    def joined(self, encoded: EncodedDocuments) -> JoinedPrompt:
        """Return the caller's own prompt with exactly the tokens of ``apply_chat_template``."""
        if self._place is None:
            return JoinedPrompt(self.question, tuple((0, 0) for _ in encoded.documents))
        marks, layouts = Marks(self._layouts.plain.control_tokens), self._layouts
        shown = [document.document for document in encoded.documents if document.pieces]
        ids, _ = layouts.encode(self._rendered(marks, shown, marked=False), marks)
        marked, spans = layouts.encode(self._rendered(marks, shown, marked=True), marks)
        if marked != ids:  # without marks, the template trims a few characters at the edge of a document
            shift = len(marked) - len(ids)
            spans = [
                (max(0, start - (shift if n else 0)), max(0, end - shift)) for n, (start, end) in enumerate(spans)
            ]
        remaining = iter(spans)
        return JoinedPrompt(
            ids, tuple(next(remaining) if document.pieces else (0, 0) for document in encoded.documents)
        )

    def _rendered(self, marks: Marks, documents: Sequence[Document], *, marked: bool) -> str:
        place = self._place
        assert place is not None
        texts = [marks.disarm(document_text(document, titles=place.titles)) for document in documents]
        if marked:
            texts = [f"{marks.start}{text}{marks.end}" for text in texts]
        shown = marks.disarm(place.separator).join(texts)
        return self._layouts.render(marks, self._messages, shown, self._kwargs, False)


def _without_marks(text: str, marks: Marks) -> tuple[str, list[Span]]:
    """Return ``text`` without marks, and the span of characters between each start mark and its end mark."""
    pieces: list[str] = []
    spans: list[Span] = []
    length = start = 0
    for piece in re.split(f"({re.escape(marks.start)}|{re.escape(marks.end)}|{re.escape(marks.break_mark)})", text):
        if piece == marks.start:
            start = length
        elif piece == marks.end:
            spans.append((start, length))
        elif piece != marks.break_mark:
            pieces.append(piece)
            length += len(piece)
    return "".join(pieces), spans


def _token_span(offsets: Sequence[Span], start: int, end: int, first_token: int) -> Span:
    """Return the span of tokens that spell the characters from ``start`` to ``end``, counted from ``first_token``."""
    touched = [n for n, (first, last) in enumerate(offsets) if first < end and last > start]
    if not touched:
        return first_token, first_token
    return first_token + touched[0], first_token + touched[-1] + 1
