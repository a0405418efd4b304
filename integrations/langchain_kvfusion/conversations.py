"""Chat messages as a generator reads them: separate documents, the bare question, and the turns around it.

``gather`` brings the documents of a call and of frames into the messages, where traces and LangChain's response cache
see them; ``read`` takes everything out again. Knows no template, no chat model and no generator.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from langchain_core.messages import AIMessage, BaseMessage

from kvfusion_rag import Document, InvalidInputError, Message

from .documents import DocumentLike, to_documents
from .framing import close_gap, split_frames
from .messages import last_human, lifted_documents, map_text, message_text, speaker
from .questions import bare_question, labelled_question


@dataclass(frozen=True)
class Conversation:
    """What a generator is asked: ``turns`` end with the user and hold no documents; ``question`` is the bare one."""

    question: str
    documents: tuple[Document, ...]
    turns: tuple[Message, ...]

    @property
    def prompt(self) -> Sequence[Message] | None:
        """The caller's wording; None where there is only a question, which has the model's own template."""
        is_bare = len(self.turns) == 1 and self.turns[0].text.strip() == self.question.strip()
        return None if is_bare and self.documents else self.turns


def gather(messages: Sequence[BaseMessage], documents: Sequence[DocumentLike] = ()) -> list[BaseMessage]:
    """``messages`` without frames; documents of frames, or those given beside them, on the last human message.

    Raises:
        InvalidInputError: no human said anything, documents come two ways, or frames are forged.
    """
    split = [_without_frames(message) for message in messages]
    clean = [message for message, _ in split]
    framed = [document for _, found in split for document in found]
    index = last_human(clean)
    if index is None:
        raise InvalidInputError(
            f"the prompt holds {len(messages)} messages and no human message with a text, so there is no question to "
            "answer; end it with the user's question."
        )
    _require_one_way(documents, framed, lifted_documents(clean))
    if split[index][1]:  # a template around documents says more than the question
        clean[index] = attach(clean[index], question=bare_question(message_text(clean[index])))
    if framed or documents:
        clean[index] = attach(clean[index], documents=framed or to_documents(documents))
    return clean


def read(messages: Sequence[BaseMessage]) -> Conversation:
    """The conversation that ``messages``, from :func:`gather`, stand for.

    System texts, what people said and what the model answered become turns. A tool's result is something that the
    user tells, unless it is found documents; the model's request for it is no turn. The question is the last human
    text: the part after its "Question:" label, or what ``additional_kwargs["question"]`` says.
    """
    index = last_human(messages)
    assert index is not None, "gather has seen a human message"
    human = message_text(messages[index])
    question = messages[index].additional_kwargs.get("question") or labelled_question(human) or human
    texts = [(message, message_text(message)) for message in messages if not _asks_for_tools(message)]
    turns = tuple(_turn(message, text) for message, text in texts if text.strip())
    if turns[-1].role != "user":
        raise InvalidInputError(
            f"the last message with a text is of type {messages[-1].type!r}, but an answer needs the user's question "
            "at the end; leave out what the model said after it, and put system messages first."
        )
    return Conversation(question, lifted_documents(messages), turns)


def attach(message: BaseMessage, documents: Sequence[Document] = (), question: str | None = None) -> BaseMessage:
    """A copy of ``message`` that carries ``documents`` and the bare ``question`` as plain data."""
    carried: dict[str, Any] = {"documents": [_plain(document) for document in documents]} if documents else {}
    if question is not None:
        carried["question"] = question
    return message.model_copy(update={"additional_kwargs": {**message.additional_kwargs, **carried}})


def _without_frames(message: BaseMessage) -> tuple[BaseMessage, list[Document]]:
    found: list[Document] = []

    def split(text: str) -> str:
        before, documents, after = split_frames(text)
        found.extend(documents)
        return close_gap(before, after) if documents else text

    clean = map_text(message, split)
    return (clean, found) if found else (message, [])


def _require_one_way(*ways: Sequence[object]) -> None:
    counts = dict(zip(("documents=", "KVFusionDocumentPrompt", "the messages"), map(len, ways), strict=True))
    if sum(count > 0 for count in counts.values()) > 1:
        given = " and ".join(f"{count} by {name}" for name, count in counts.items() if count)
        raise InvalidInputError(f"documents come {given}; pass them one way only.")


def _asks_for_tools(message: BaseMessage) -> bool:
    return isinstance(message, AIMessage) and bool(message.tool_calls)


def _turn(message: BaseMessage, text: str) -> Message:
    match speaker(message):
        case "System":
            return Message("system", text)
        case "Assistant":
            return Message("assistant", text)
        case _:
            return Message("user", text)


def _plain(document: Document) -> dict[str, Any]:
    fields = {"text": document.text, "id": document.id, "title": document.title, "metadata": dict(document.metadata)}
    return {name: value for name, value in fields.items() if name == "text" or value}
