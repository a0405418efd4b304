"""Chat messages as a generator reads them: separate documents, the bare question, and the turns around it.

``gather`` brings the messages, with the documents of a call and of frames, into one plain form, which traces show and
LangChain's response cache has as its key; ``read`` takes it apart. Knows no template, no chat model and no generator.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from langchain_core.documents import Document as LangChainDocument
from langchain_core.messages import AIMessage, BaseMessage, ChatMessage, HumanMessage, SystemMessage

from kvfusion_rag import Document, InvalidInputError, Message

from .documents import DocumentLike, to_documents
from .fused import part
from .messages import last_human, lifted_documents, map_text, message_text, speaker
from .questions import bare_question, labelled_question

_ROLES: dict[str, Literal["system", "assistant"]] = {"system": "system", "ai": "assistant"}


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


def gather(
    messages: Sequence[BaseMessage],
    documents: Sequence[DocumentLike] = (),
    retrieved: Sequence[LangChainDocument] = (),
) -> list[BaseMessage]:
    """The turns of ``messages``, with all documents and the bare question on the last human one as plain data.

    System texts, what people said and what the model answered stay. A tool's result becomes something that the user
    tells, unless it is found documents; the model's request for it falls away. The question is the last human text:
    the part after its "Question:" label, or what ``additional_kwargs["question"]`` says. Where no documents come
    otherwise, those of the ``retrieved`` ones that stand in a text are taken out of it.

    Raises:
        InvalidInputError: no human said anything, or not last; documents come two ways; frames are forged.
    """
    split = _split_all(messages, () if documents or lifted_documents(messages) else retrieved)
    clean = [message for message, _ in split]
    index = last_human(clean)
    if index is None:
        raise InvalidInputError(
            f"the prompt holds {len(messages)} messages and no human message with a text, so there is no question to "
            "answer; end it with the user's question."
        )
    inside = [document for _, found in split for document in found]
    found = _only_one_way({
        "documents=": to_documents(documents),
        "KVFusionDocumentPrompt": to_documents(inside),
        "the messages": lifted_documents(clean),
    })  # fmt: skip
    human = message_text(clean[index])
    question = clean[index].additional_kwargs.get("question")
    if question is None:  # a template around documents says more than the question
        question = bare_question(human) if split[index][1] else labelled_question(human) or human
    turns = [_turn(message) for message in clean]
    turns[index] = attach(HumanMessage(human), found, question)
    spoken = [turn for turn in turns if turn is not None]
    if isinstance(spoken[-1], AIMessage | SystemMessage):
        raise InvalidInputError(
            f"the last message with a text is of type {spoken[-1].type!r}, but an answer needs the user's question at "
            "the end; leave out what the model said after it, and put system messages first."
        )
    return spoken


def read(messages: Sequence[BaseMessage]) -> Conversation:
    """The conversation that ``messages``, from :func:`gather`, stand for."""
    index = last_human(messages)
    assert index is not None, "gather has seen a human message"
    turns = tuple(Message(_ROLES.get(message.type, "user"), message_text(message)) for message in messages)
    return Conversation(messages[index].additional_kwargs["question"], lifted_documents(messages), turns)


def attach(message: BaseMessage, documents: Sequence[Document] = (), question: str | None = None) -> BaseMessage:
    """A copy of ``message`` that carries ``documents`` and the bare ``question`` as plain data."""
    carried: dict[str, Any] = {"documents": [_plain(document) for document in documents]} if documents else {}
    if question is not None:
        carried["question"] = question
    return message.model_copy(update={"additional_kwargs": {**message.additional_kwargs, **carried}})


def _split_all(
    messages: Sequence[BaseMessage], retrieved: Sequence[LangChainDocument]
) -> list[tuple[BaseMessage, list[Document]]]:
    """Each message without the documents inside its texts, and these; a retrieved one only where it stands first."""
    seen: set[str] = set()
    split = []
    for message in messages:  # what the model said stays, though it quotes a document
        clean, found = _split(message, () if isinstance(message, AIMessage) else retrieved)
        fresh = [document for document in found if not retrieved or document.text not in seen]
        seen.update(document.text for document in found)
        split.append((clean, fresh))
    return split


def _split(message: BaseMessage, retrieved: Sequence[LangChainDocument]) -> tuple[BaseMessage, list[Document]]:
    found: list[Document] = []
    if not message_text(message):  # also of a tool that found documents, whose text is not read
        return message, found

    def split(text: str) -> str:
        rest, documents = part(text, retrieved)
        found.extend(documents)
        return rest

    return map_text(message, split), found


def _only_one_way(ways: Mapping[str, Sequence[Document]]) -> Sequence[Document]:
    given = {name: documents for name, documents in ways.items() if documents}
    if len(given) > 1:
        counted = " and ".join(f"{len(documents)} by {name}" for name, documents in given.items())
        raise InvalidInputError(f"documents come {counted}; pass them one way only.")
    return next(iter(given.values()), ())


def _turn(message: BaseMessage) -> BaseMessage | None:
    """``message`` as plain text of whoever says it; None where it says nothing."""
    text = message_text(message)
    if not text.strip() or (isinstance(message, AIMessage) and message.tool_calls):
        return None
    match speaker(message):
        case "System":
            return SystemMessage(text)
        case "Assistant":
            return AIMessage(text)
        case "User":
            return HumanMessage(text)
        case other:  # what the user is told, but did not ask
            return ChatMessage(content=text, role=other.lower())


def _plain(document: Document) -> dict[str, Any]:
    fields = {"text": document.text, "id": document.id, "title": document.title, "metadata": dict(document.metadata)}
    return {name: value for name, value in fields.items() if name == "text" or value}
