"""FusedPrompt: a prompt string that also carries messages, separate documents and the bare question.

BaseLLM converts every input into a ``str`` and passes it on unchanged, so a subclass of ``str`` can carry more than
its text. The text is the ordinary prompt, which is readable in traces.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

from langchain_core.documents import Document as LangChainDocument
from langchain_core.messages import BaseMessage, HumanMessage
from langchain_core.prompt_values import PromptValue
from pydantic import InstanceOf

from kvfusion_rag import Document, InvalidInputError, Message

from .documents import TEXT_SEPARATOR, joined_text, to_documents
from .framing import Extraction, has_frames, split_frames
from .matching import cut_out
from .questions import bare_question

_LABELS = {"system": "System", "user": "User", "assistant": "Assistant"}


class FusedPrompt(str):
    """The ordinary prompt text with the arguments of a generator as attributes.

    String operations return a plain ``str`` without the attributes.

    Attributes:
        documents: the separate documents.
        question: the bare question.
        messages: the caller's messages without the documents, whose place is ``Message.documents``. A string prompt is
            one user message.
    """

    documents: tuple[Document, ...]
    question: str
    messages: tuple[Message, ...]

    def __new__(
        cls,
        text: str,
        *,
        documents: Sequence[Document] = (),
        question: str | None = None,
        messages: Sequence[Message] | None = None,
    ) -> FusedPrompt:
        self = super().__new__(cls, text)
        self.documents = tuple(documents)
        self.messages = (Message("user", str(text)),) if messages is None else tuple(messages)
        self.question = str(text) if question is None else question
        return self

    @classmethod
    def of(cls, messages: Sequence[Message], documents: Sequence[Document], question: str) -> FusedPrompt:
        """Create the prompt for ``messages``. Its text contains the documents in their place.

        Messages that do not end with a user message are joined into one.
        """
        joined = join_messages(messages)
        kept = messages if messages and messages[-1].role == "user" else [joined]
        return cls(full_text(joined, documents), documents=documents, question=question, messages=kept)

    @classmethod
    def parse(cls, text: str, retrieved: Sequence[LangChainDocument] = ()) -> FusedPrompt:
        """Create the prompt for a text, see :func:`extract`. If it has no documents, all of it is the question.

        Raises:
            InvalidInputError: a frame is forged.
        """
        found = extract(text, retrieved)
        if not found.documents:
            return cls(text)
        message = Message("user", found.text, found.place)
        return cls.of([message], to_documents(found.documents), bare_question(found.text))

    def arguments(self) -> dict[str, Any]:
        """Return question, documents and prompt as arguments of the generator."""
        prompt = to_prompt(self.messages, self.question, self.documents)
        return {"question": self.question, "documents": self.documents, "prompt": prompt}

    def digest(self) -> str:
        """Return a hex digest of everything besides the text that affects the answer or its sources."""
        documents = [[d.id, d.title, d.text, d.score] for d in self.documents]
        content = json.dumps([documents, self.question, [asdict(message) for message in self.messages]])
        return hashlib.sha256(content.encode()).hexdigest()


class FusedPromptValue(PromptValue):
    """A prompt value that contains a FusedPrompt."""

    fused: InstanceOf[FusedPrompt]

    @classmethod
    def is_lc_serializable(cls) -> bool:
        return False

    def to_string(self) -> FusedPrompt:
        return self.fused

    def to_messages(self) -> list[BaseMessage]:
        return [HumanMessage(content=str(self.fused))]


def extract(text: str, retrieved: Sequence[LangChainDocument] = ()) -> Extraction:
    """Remove framed or ``retrieved`` documents from ``text``.

    A frame inside a retrieved document is treated as text of that document.

    Raises:
        InvalidInputError: a frame is forged.
    """
    found = cut_out(text, retrieved)
    return found if found.documents and not has_frames(found.text) else split_frames(text)


def to_prompt(messages: Sequence[Message], question: str, documents: Sequence[Document]) -> Sequence[Message] | None:
    """Return the generator's ``prompt`` for ``messages``, or None for a bare question with documents.

    The model reads a bare question in its default prompt.
    """
    is_bare = len(messages) == 1 and messages[0].documents is None and messages[0].text.strip() == question.strip()
    return None if is_bare and documents else messages


def join_messages(messages: Sequence[Message]) -> Message:
    """Join ``messages`` into one user message. All but system messages and the last user message get a role label."""
    others = [number for number, message in enumerate(messages) if message.role != "system"]
    history = others if messages and messages[-1].role == "assistant" else others[:-1]
    text, place = "", None
    for number, message in enumerate(messages):
        label = f"{_LABELS[message.role]}: " if number in history else ""
        start = f"{text}{TEXT_SEPARATOR}{label}" if number else label
        if message.documents is not None:
            place = replace(message.documents, offset=len(start) + message.documents.offset)
        text = start + message.text
    return Message("user", text, place)


def full_text(message: Message, documents: Sequence[Document]) -> str:
    """Return the text of ``message`` with the documents in their place, or before it if they have no place."""
    place = message.documents
    if place is None:
        return TEXT_SEPARATOR.join(part for part in (joined_text(documents), message.text) if part)
    joined = joined_text(documents, separator=place.separator, titles=place.titles)
    return message.text[: place.offset] + joined + message.text[place.offset :]


def fuse_prompt(
    text: str, documents: Sequence[Document] = (), retrieved: Sequence[LangChainDocument] = ()
) -> FusedPrompt:
    """Return the prompt with the ``documents`` of a call, or else with the ``retrieved`` documents in its text.

    Raises:
        InvalidInputError: prompt and call both have documents, or a frame is forged.
    """
    fused = text if isinstance(text, FusedPrompt) else FusedPrompt.parse(text, () if documents else retrieved)
    if not documents:
        return fused
    if fused.documents:
        raise InvalidInputError(
            f"the prompt has {len(fused.documents)} documents and documents= has {len(documents)}; pass them in one "
            "way only."
        )
    question = fused.question if isinstance(text, FusedPrompt) else bare_question(text)
    return FusedPrompt.of(fused.messages, documents, question)
