"""What reaches the model: the caller's messages, the separate documents with their place, and the bare question.

BaseLLM turns every input into a ``str`` and hands that on untouched, so ``FusedPrompt`` is a ``str`` (the
ordinary prompt, legible in traces) that carries the rest. Knows no template and no generator.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, replace

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
    """The ordinary prompt text, with everything that a generator is asked.

    String operations give a plain ``str`` and lose the attributes.

    Attributes:
        documents: the separate documents.
        question: the bare question.
        messages: the caller's own messages without the documents; ``Message.documents`` says where these stand. A
            string prompt is one message of the user.
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
        """The prompt for ``messages``, whose text shows the documents in their place.

        Messages that do not end with the user's become one text, which is the user's.
        """
        whole = as_one(messages)
        asked = messages if messages and messages[-1].role == "user" else [whole]
        return cls(shown(whole, documents), documents=documents, question=question, messages=asked)

    @classmethod
    def parse(cls, text: str, retrieved: Sequence[LangChainDocument] = ()) -> FusedPrompt:
        """The prompt for a finished text, as :func:`extract` reads it; without documents all of it is the question.

        Raises:
            InvalidInputError: forged frames.
        """
        found = extract(text, retrieved)
        if not found.documents:
            return cls(text)
        message = Message("user", found.text, found.place)
        return cls.of([message], to_documents(found.documents), bare_question(found.text))

    def digest(self) -> str:
        """Hex digest of everything beyond the text that changes the answer or its sources."""
        documents = [[d.id, d.title, d.text, d.score] for d in self.documents]
        content = json.dumps([documents, self.question, [asdict(message) for message in self.messages]])
        return hashlib.sha256(content.encode()).hexdigest()


class FusedPromptValue(PromptValue):
    """Hands one ready FusedPrompt to a model."""

    fused: InstanceOf[FusedPrompt]

    @classmethod
    def is_lc_serializable(cls) -> bool:
        return False

    def to_string(self) -> FusedPrompt:
        return self.fused

    def to_messages(self) -> list[BaseMessage]:
        return [HumanMessage(content=str(self.fused))]


def extract(text: str, retrieved: Sequence[LangChainDocument] = ()) -> Extraction:
    """``text`` without the documents that stand in it, framed or as they were ``retrieved``.

    A frame inside a retrieved document is text of that document.

    Raises:
        InvalidInputError: forged frames.
    """
    found = cut_out(text, retrieved)
    return found if found.documents and not has_frames(found.text) else split_frames(text)


def wording(messages: Sequence[Message], question: str, documents: Sequence[Document]) -> Sequence[Message] | None:
    """The generator's ``prompt`` for ``messages``.

    None for a bare question beside documents, which the model reads in its default wording.
    """
    is_bare = len(messages) == 1 and messages[0].documents is None and messages[0].text.strip() == question.strip()
    return None if is_bare and documents else messages


def as_one(messages: Sequence[Message]) -> Message:
    """``messages`` as one of the user: system text, then human text. Only a history before that is labelled."""
    spoken = [number for number, message in enumerate(messages) if message.role != "system"]
    history = spoken if messages and messages[-1].role == "assistant" else spoken[:-1]
    text, place = "", None
    for number, message in enumerate(messages):
        label = f"{_LABELS[message.role]}: " if number in history else ""
        start = f"{text}{TEXT_SEPARATOR}{label}" if number else label
        if message.documents is not None:
            place = replace(message.documents, offset=len(start) + message.documents.offset)
        text = start + message.text
    return Message("user", text, place)


def shown(message: Message, documents: Sequence[Document]) -> str:
    """The text of ``message`` with the documents in their place, on top of it if they have none."""
    place = message.documents
    if place is None:
        return TEXT_SEPARATOR.join(part for part in (joined_text(documents), message.text) if part)
    joined = joined_text(documents, separator=place.separator, titles=place.titles)
    return message.text[: place.offset] + joined + message.text[place.offset :]


def fuse_prompt(
    text: str, documents: Sequence[Document] = (), retrieved: Sequence[LangChainDocument] = ()
) -> FusedPrompt:
    """The prompt as the generator needs it, with the ``documents=`` that a call gave beside it.

    Where it gave none, those of the ``retrieved`` ones count that stand in the text.

    Raises:
        InvalidInputError: the prompt carries documents and the call gives some too; forged frames.
    """
    fused = text if isinstance(text, FusedPrompt) else FusedPrompt.parse(text, () if documents else retrieved)
    if not documents:
        return fused
    if fused.documents:
        raise InvalidInputError(
            f"the prompt carries {len(fused.documents)} documents and documents= gives {len(documents)}; pass them "
            "one way only."
        )
    question = fused.question if isinstance(text, FusedPrompt) else bare_question(text)
    return FusedPrompt.of(fused.messages, documents, question)
