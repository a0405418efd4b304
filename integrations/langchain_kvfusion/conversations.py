"""Chat messages as a generator reads them: the turns, the separate documents with their place, and the bare question.

``gather`` brings the messages, with the documents of a call and of frames, into one plain form, which traces show and
LangChain's response cache has as its key; ``read`` takes it apart. ``carry`` writes the same form for a prompt that is
known already. Knows no template, no chat model and no generator.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from langchain_core.documents import Document as LangChainDocument
from langchain_core.messages import AIMessage, BaseMessage, ChatMessage, HumanMessage, SystemMessage, ToolMessage

from kvfusion_rag import Document, DocumentsPlace, InvalidInputError, Message

from .documents import TEXT_SEPARATOR, DocumentLike, to_documents
from .framing import Extraction
from .fused import FusedPrompt, as_one, extract, fuse_prompt, wording
from .matching import close_gap
from .messages import calls_tools, documents_place, lifted_documents, message_text, role_of, speaker
from .questions import bare_question, labelled_question

_MESSAGES: dict[str, type[BaseMessage]] = {"system": SystemMessage, "user": HumanMessage, "assistant": AIMessage}


@dataclass(frozen=True)
class Conversation:
    """What a generator is asked: ``turns`` end with the user and hold no documents; ``question`` is the bare one."""

    question: str
    documents: tuple[Document, ...]
    turns: tuple[Message, ...]

    @property
    def prompt(self) -> Sequence[Message] | None:
        """The caller's wording; None if there is only a question beside documents."""
        return wording(self.turns, self.question, self.documents)


def gather(
    messages: Sequence[BaseMessage],
    documents: Sequence[DocumentLike] = (),
    retrieved: Sequence[LangChainDocument] = (),
) -> list[BaseMessage]:
    """The turns of ``messages`` without documents in their texts, as plain data.

    The last human message carries all documents and the bare question. The message that showed the documents first
    carries their place. Texts of the system, people and the model stay as they are. A tool's result becomes something
    that the user tells, unless it is found documents; the model's request for it falls away. The question is the last
    human text: the part after its "Question:" label, or what ``additional_kwargs["question"]`` says. Where no
    documents come otherwise, those of the ``retrieved`` ones that stand in a text are taken out of it.

    Raises:
        InvalidInputError: there is no human message with a text, or it is not the last; documents are given twice;
            frames are forged.
    """
    found = _extract_all(messages, () if documents or lifted_documents(messages) else retrieved)
    spoken = [number for number, each in enumerate(found) if speaker(messages[number]) == "User" and _says(each)]
    question = _question(messages, found, spoken)
    carried = _only_one_way({
        "documents=": to_documents(documents),
        "KVFusionDocumentPrompt": to_documents([document for each in found for document in each.documents]),
        "the messages": lifted_documents(messages),
    })  # fmt: skip
    turns = [_turn(message, each) for message, each in zip(messages, found, strict=True)]
    asked = found[spoken[-1]]
    turns[spoken[-1]] = attach(HumanMessage(asked.text), carried, question, asked.place)
    kept = [turn for turn in turns if turn is not None]
    if isinstance(kept[-1], AIMessage | SystemMessage):
        raise InvalidInputError(
            f"the last message with a text is of type {kept[-1].type!r}, but an answer needs the user's question at "
            "the end; leave out what the model said after it, and put system messages first."
        )
    return kept


def read(messages: Sequence[BaseMessage]) -> Conversation:
    """The conversation that ``messages``, from :func:`gather` or :func:`carry`, stand for."""
    question = next(m.additional_kwargs["question"] for m in reversed(messages) if "question" in m.additional_kwargs)
    turns = tuple(Message(role_of(message), message_text(message), documents_place(message)) for message in messages)
    return Conversation(question, lifted_documents(messages), turns)


def carry(turns: Sequence[Message], documents: Sequence[Document], question: str) -> list[BaseMessage]:
    """``turns`` as chat messages; the last human one carries documents and question, as those of :func:`gather`."""
    messages = [attach(_MESSAGES[turn.role](turn.text), place=turn.documents) for turn in turns]
    index = next((n for n in reversed(range(len(turns))) if turns[n].role == "user"), len(turns) - 1)
    messages[index] = attach(messages[index], documents, question)
    return messages


def fuse_messages(messages: Sequence[BaseMessage], retrieved: Sequence[LangChainDocument] = ()) -> FusedPrompt:
    """One prompt from chat messages, read as :func:`gather` reads them.

    Messages that do not end with the user's become one text, which is the user's.

    Raises:
        InvalidInputError: documents are given twice, frames are forged, or content is not text.
    """
    turns = [Message(role_of(m), message_text(m), documents_place(m)) for m in messages if not calls_tools(m)]
    turns = [turn for turn in turns if turn.text.strip() or turn.documents is not None]
    asked = [turn.text for turn in turns if turn.role == "user"]
    if asked and turns[-1].role == "user":
        conversation = read(gather(messages, retrieved=retrieved))
        return FusedPrompt.of(conversation.turns, conversation.documents, conversation.question)
    fused = fuse_prompt(as_one(turns).text, lifted_documents(messages), retrieved)
    question = _question_in(extract(asked[-1], retrieved)) if asked else bare_question(_joined(fused.messages))
    return FusedPrompt.of(fused.messages, fused.documents, question)


def attach(
    message: BaseMessage,
    documents: Sequence[Document] = (),
    question: str | None = None,
    place: DocumentsPlace | None = None,
) -> BaseMessage:
    """A copy of ``message`` that carries ``documents``, their ``place`` and the bare ``question`` as plain data."""
    carried: dict[str, Any] = {"documents": [_plain(document) for document in documents]} if documents else {}
    if question is not None:
        carried["question"] = question
    if place is not None:
        carried["documents_place"] = asdict(place)
    return message.model_copy(update={"additional_kwargs": {**message.additional_kwargs, **carried}})


def _extract_all(messages: Sequence[BaseMessage], retrieved: Sequence[LangChainDocument]) -> list[Extraction]:
    """Each message's text without documents; the first that showed some has their place.

    A retrieved document counts in the message that shows it first.
    """
    seen: set[str] = set()
    is_placed = False
    everything = []
    for message in messages:
        found = _extract(message, retrieved)
        fresh = tuple(document for document in found.documents if not retrieved or document.text not in seen)
        seen.update(document.text for document in found.documents)
        if is_placed or isinstance(message, ToolMessage):  # what a tool found is not part of the user's prompt
            found = _without_place(found)
        is_placed = is_placed or found.place is not None
        everything.append(replace(found, documents=fresh))
    return everything


def _extract(message: BaseMessage, retrieved: Sequence[LangChainDocument]) -> Extraction:
    text, place = message_text(message), documents_place(message)
    if place is not None:
        return Extraction(text, place=place)
    return extract(text, () if isinstance(message, AIMessage) else retrieved)  # the model may quote a document


def _without_place(found: Extraction) -> Extraction:
    if found.place is None:
        return found
    before, after = found.text[: found.place.offset], found.text[found.place.offset :]
    return Extraction(close_gap(before, after), found.documents)


def _says(found: Extraction) -> bool:
    return bool(found.text.strip()) or found.place is not None


def _question(messages: Sequence[BaseMessage], found: Sequence[Extraction], spoken: Sequence[int]) -> str:
    """The bare question; ``spoken`` are the numbers of the human messages."""
    given = messages[spoken[-1]].additional_kwargs.get("question") if spoken else None
    if given is not None:
        return given
    asked = [found[number] for number in spoken if found[number].text.strip()]
    question = _question_in(asked[-1]) if asked else bare_question(_joined(found)) if spoken else ""
    if not question.strip():
        raise InvalidInputError(
            f"the prompt holds {len(messages)} messages and no human message with a text, so there is no question to "
            "answer; end it with the user's question."
        )
    return question


def _question_in(human: Extraction) -> str:
    if human.documents:  # a template around documents says more than the question
        return bare_question(human.text)
    return labelled_question(human.text) or human.text


def _joined(parts: Sequence[Message] | Sequence[Extraction]) -> str:
    return TEXT_SEPARATOR.join(part.text for part in parts)


def _only_one_way(ways: Mapping[str, Sequence[Document]]) -> Sequence[Document]:
    given = {name: documents for name, documents in ways.items() if documents}
    if len(given) > 1:
        counted = " and ".join(f"{len(documents)} by {name}" for name, documents in given.items())
        raise InvalidInputError(f"documents come {counted}; pass them one way only.")
    return next(iter(given.values()), ())


def _turn(message: BaseMessage, found: Extraction) -> BaseMessage | None:
    """The plain text of ``message`` as its speaker says it; None if there is none."""
    if calls_tools(message) or not _says(found):
        return None
    match speaker(message):
        case "System":
            turn: BaseMessage = SystemMessage(found.text)
        case "Assistant":
            turn = AIMessage(found.text)
        case "User":
            turn = HumanMessage(found.text)
        case other:  # what the user is told, but did not ask
            turn = ChatMessage(content=found.text, role=other.lower())
    return attach(turn, place=found.place)


def _plain(document: Document) -> dict[str, Any]:
    fields = {"text": document.text, "id": document.id, "title": document.title, "metadata": dict(document.metadata)}
    score = {} if document.score is None else {"score": document.score}
    return {name: value for name, value in fields.items() if name == "text" or value} | score
