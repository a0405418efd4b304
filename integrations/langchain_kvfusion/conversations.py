"""Converts chat messages into a conversation with separate documents.

``gather`` converts messages, the documents of a call, and framed documents into one form, in which messages carry
documents and question as plain data. Traces show this form, and LangChain's response cache uses it as its key.
``read`` converts it into a Conversation. ``carry`` creates it from messages of a generator's prompt.
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
from .fused import FusedPrompt, extract, fuse_prompt, join_messages, to_prompt
from .matching import close_gap
from .messages import calls_tools, documents_place, lifted_documents, message_text, role_of, speaker
from .questions import bare_question, labelled_question
from .tools import results, tool_calls

_MESSAGES: dict[str, type[BaseMessage]] = {"system": SystemMessage, "user": HumanMessage, "assistant": AIMessage}


@dataclass(frozen=True)
class Conversation:
    """Arguments of a generator: messages that end with the user's, separate documents, and the bare question."""

    question: str
    documents: tuple[Document, ...]
    turns: tuple[Message, ...]

    @property
    def prompt(self) -> Sequence[Message] | None:
        """The generator's prompt, or None if the conversation is only a question with documents."""
        return to_prompt(self.turns, self.question, self.documents)

    def arguments(self) -> dict[str, Any]:
        """Return question, documents and prompt as arguments of the generator."""
        return {"question": self.question, "documents": self.documents, "prompt": self.prompt}


def gather(
    messages: Sequence[BaseMessage],
    documents: Sequence[DocumentLike] = (),
    retrieved: Sequence[LangChainDocument] = (),
    *,
    keeps_calls: bool = False,
) -> list[BaseMessage]:
    """Return ``messages`` without documents in their texts.

    The last human message carries all documents and the bare question, and the first message that contained documents
    carries their place. System, human and AI texts are unchanged. Tool results become user messages unless they
    consist of retrieved documents, and tool calls are dropped. With ``keeps_calls``, only the calls that retrieved
    documents are, and other calls and results are kept. The question is ``additional_kwargs["question"]``, or
    the last human text, or its part after a "Question:" label. If no documents are given in another way, ``retrieved``
    documents that occur in a text are removed from it.

    Raises:
        InvalidInputError: no human message has a text, the last message is not human, documents are given in two
            ways, or a frame is forged.
    """
    extractions = _extract_all(messages, () if documents or lifted_documents(messages) else retrieved)
    human = [
        number for number, each in enumerate(extractions) if speaker(messages[number]) == "User" and _has_text(each)
    ]
    question = _question(messages, extractions, human)
    carried = _only_one_way({
        "documents=": to_documents(documents),
        "KVFusionDocumentPrompt": to_documents([document for each in extractions for document in each.documents]),
        "the messages": lifted_documents(messages),
    })  # fmt: skip
    answered = results(messages) if keeps_calls else frozenset()
    turns = [_turn(message, each, answered) for message, each in zip(messages, extractions, strict=True)]
    last = extractions[human[-1]]
    turns[human[-1]] = attach(HumanMessage(last.text), carried, question, last.place)
    kept = [turn for turn in turns if turn is not None]
    if isinstance(kept[-1], AIMessage | SystemMessage):  # a tool's result may be last
        raise InvalidInputError(
            f"the last message with a text has the type {kept[-1].type!r}, but it must be the user's question; remove "
            "AI messages after the question, and put system messages first."
        )
    return kept


def read(messages: Sequence[BaseMessage]) -> Conversation:
    """Return the conversation in the messages of :func:`gather` or :func:`carry`."""
    question = next(m.additional_kwargs["question"] for m in reversed(messages) if "question" in m.additional_kwargs)
    turns = tuple(_message(message) for message in messages)
    return Conversation(question, lifted_documents(messages), turns)


def carry(turns: Sequence[Message], documents: Sequence[Document], question: str) -> list[BaseMessage]:
    """Return a generator's messages as chat messages that carry documents and question, as in :func:`gather`."""
    messages = [attach(_MESSAGES[turn.role](turn.text), place=turn.documents) for turn in turns]
    index = next((n for n in reversed(range(len(turns))) if turns[n].role == "user"), len(turns) - 1)
    messages[index] = attach(messages[index], documents, question)
    return messages


def fuse_messages(messages: Sequence[BaseMessage], retrieved: Sequence[LangChainDocument] = ()) -> FusedPrompt:
    """Return one prompt for an LLM from chat messages, which are converted as in :func:`gather`.

    Messages that do not end with a human message are joined into one user message.

    Raises:
        InvalidInputError: documents are given in two ways, a frame is forged, or content is not text.
    """
    turns = [Message(role_of(m), message_text(m), documents_place(m)) for m in messages if not calls_tools(m)]
    turns = [turn for turn in turns if turn.text.strip() or turn.documents is not None]
    human = [turn.text for turn in turns if turn.role == "user"]
    if human and turns[-1].role == "user":
        conversation = read(gather(messages, retrieved=retrieved))
        return FusedPrompt.of(conversation.turns, conversation.documents, conversation.question)
    fused = fuse_prompt(join_messages(turns).text, lifted_documents(messages), retrieved)
    question = _question_in(extract(human[-1], retrieved)) if human else bare_question(_joined(fused.messages))
    return FusedPrompt.of(fused.messages, fused.documents, question)


def attach(
    message: BaseMessage,
    documents: Sequence[Document] = (),
    question: str | None = None,
    place: DocumentsPlace | None = None,
) -> BaseMessage:
    """Return a copy of ``message`` that carries documents, their place and the bare question as plain data."""
    carried: dict[str, Any] = {"documents": [_plain(document) for document in documents]} if documents else {}
    if question is not None:
        carried["question"] = question
    if place is not None:
        carried["documents_place"] = asdict(place)
    return message.model_copy(update={"additional_kwargs": {**message.additional_kwargs, **carried}})


def _extract_all(messages: Sequence[BaseMessage], retrieved: Sequence[LangChainDocument]) -> list[Extraction]:
    """Remove the documents from each message's text. Only the first message that contained documents keeps a place.

    A retrieved document belongs to the first message that contains it.
    """
    seen: set[str] = set()
    has_place = False
    extractions = []
    for message in messages:
        extraction = _extract(message, retrieved)
        new = tuple(document for document in extraction.documents if not retrieved or document.text not in seen)
        seen.update(document.text for document in extraction.documents)
        if has_place or isinstance(message, ToolMessage):  # a tool result is not part of the user's prompt
            extraction = _without_place(extraction)
        has_place = has_place or extraction.place is not None
        extractions.append(replace(extraction, documents=new))
    return extractions


def _extract(message: BaseMessage, retrieved: Sequence[LangChainDocument]) -> Extraction:
    text, place = message_text(message), documents_place(message)
    if place is not None:
        return Extraction(text, place=place)
    return extract(text, () if isinstance(message, AIMessage) else retrieved)  # an AI message may quote a document


def _without_place(extraction: Extraction) -> Extraction:
    if extraction.place is None:
        return extraction
    before, after = extraction.text[: extraction.place.offset], extraction.text[extraction.place.offset :]
    return Extraction(close_gap(before, after), extraction.documents)


def _has_text(extraction: Extraction) -> bool:
    return bool(extraction.text.strip()) or extraction.place is not None


def _question(messages: Sequence[BaseMessage], extractions: Sequence[Extraction], human: Sequence[int]) -> str:
    """Return the bare question. ``human`` contains the positions of the human messages."""
    given = messages[human[-1]].additional_kwargs.get("question") if human else None
    if given is not None:
        return given
    texts = [extractions[number] for number in human if extractions[number].text.strip()]
    question = _question_in(texts[-1]) if texts else bare_question(_joined(extractions)) if human else ""
    if not question.strip():
        raise InvalidInputError(
            f"the prompt has {len(messages)} messages but no human message with a text; end it with the user's "
            "question."
        )
    return question


def _question_in(human: Extraction) -> str:
    if human.documents:  # a template around documents contains more than the question
        return bare_question(human.text)
    return labelled_question(human.text) or human.text


def _joined(parts: Sequence[Message] | Sequence[Extraction]) -> str:
    return TEXT_SEPARATOR.join(part.text for part in parts)


def _only_one_way(ways: Mapping[str, Sequence[Document]]) -> Sequence[Document]:
    given = {name: documents for name, documents in ways.items() if documents}
    if len(given) > 1:
        counted = " and ".join(f"{len(documents)} in {name}" for name, documents in given.items())
        raise InvalidInputError(f"there are documents in two places, {counted}; pass them in one way only.")
    return next(iter(given.values()), ())


def _message(message: BaseMessage) -> Message:
    if isinstance(message, ToolMessage):
        return Message("tool", message_text(message), tool_call_id=message.tool_call_id)
    calls = tool_calls(message)
    return Message(role_of(message), message_text(message), documents_place(message), tool_calls=calls)


def _turn(message: BaseMessage, extraction: Extraction, answered: frozenset[str]) -> BaseMessage | None:
    """Return ``message`` with the extracted text, or None if it has no text or calls a tool.

    Args:
        answered: ids of the calls that are kept, with their results.
    """
    if isinstance(message, ToolMessage) and message.tool_call_id in answered:
        return ToolMessage(extraction.text, tool_call_id=message.tool_call_id)
    if isinstance(message, AIMessage) and (kept := [c for c in message.tool_calls if c["id"] in answered]):
        return AIMessage(extraction.text, tool_calls=kept)
    if calls_tools(message) or not _has_text(extraction):
        return None
    match speaker(message):
        case "System":
            turn: BaseMessage = SystemMessage(extraction.text)
        case "Assistant":
            turn = AIMessage(extraction.text)
        case "User":
            turn = HumanMessage(extraction.text)
        case other:  # for example a tool result, which the user did not write
            turn = ChatMessage(content=extraction.text, role=other.lower())
    return attach(turn, place=extraction.place)


def _plain(document: Document) -> dict[str, Any]:
    fields = {"text": document.text, "id": document.id, "title": document.title, "metadata": dict(document.metadata)}
    score = {} if document.score is None else {"score": document.score}
    return {name: value for name, value in fields.items() if name == "text" or value} | score
