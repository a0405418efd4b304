"""Chat messages for a model that reads text: what the wording is, and which documents the messages carry.

Documents are lifted out of ``additional_kwargs["documents"]``, of text-plain content blocks, of the artifacts of
retriever tools and of frames. Knows no template and no generator.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from langchain_core.documents import Document as LangChainDocument
from langchain_core.messages import AIMessage, BaseMessage, ChatMessage, HumanMessage, SystemMessage, ToolMessage

from kvfusion_rag import Document, InvalidInputError

from .documents import TEXT_SEPARATOR, joined_text, to_documents
from .fused import FusedPrompt, part
from .questions import bare_question, labelled_question

_SPEAKERS = {"human": "User", "user": "User", "ai": "Assistant", "assistant": "Assistant"}


def fuse_messages(messages: Sequence[BaseMessage], retrieved: Sequence[LangChainDocument] = ()) -> FusedPrompt:
    """One prompt from chat messages; documents are those it carries, or those ``retrieved`` ones that stand in it.

    The question is the last human message (the part after its "Question:" label, if it has one).

    Raises:
        InvalidInputError: forged frames, content that is no text, or a document that cannot be read.
    """
    lifted = lifted_documents(messages)
    text = render(messages)
    inside = FusedPrompt.parse(text, () if lifted else retrieved)
    if inside.documents and lifted:
        raise InvalidInputError(
            f"the messages carry {len(lifted)} documents and {len(inside.documents)} framed ones; pass them one way "
            "only."
        )
    ordinary = TEXT_SEPARATOR.join(each for each in (joined_text(lifted), text) if each) if lifted else str(inside)
    question = question_in(last_human_text(messages), inside.prompt, retrieved)
    return FusedPrompt(ordinary, documents=inside.documents or lifted, question=question, prompt=inside.prompt)


def question_in(human: str | None, wording: str, retrieved: Sequence[LangChainDocument] = ()) -> str:
    """The bare question of the last human text, or of the whole wording where no human said anything."""
    if human is None:
        return bare_question(wording)
    rest, documents = part(human, retrieved)
    if documents:  # the message is a template around the documents, so it says more than the question
        return bare_question(rest)
    return labelled_question(human) or human


def last_human_text(messages: Sequence[BaseMessage]) -> str | None:
    """The text of the last human message that has any."""
    index = last_human(messages)
    return None if index is None else message_text(messages[index])


def last_human(messages: Sequence[BaseMessage]) -> int | None:
    """Place of the last human message that has any text."""
    spoken = (i for i in reversed(range(len(messages))) if speaker(messages[i]) == "User")
    return next((i for i in spoken if message_text(messages[i]).strip()), None)


def lifted_documents(messages: Sequence[BaseMessage]) -> tuple[Document, ...]:
    """The documents that stand beside the messages' texts, in order."""
    return to_documents([item for message in messages for item in _lifted(message)])


def render(messages: Sequence[BaseMessage]) -> str:
    """The messages as one text: system text, then human text. Only a history before that is labelled."""
    turns = [(message, message_text(message)) for message in messages]
    turns = [(message, text) for message, text in turns if text.strip()]
    spoken = [index for index, (message, _) in enumerate(turns) if not isinstance(message, SystemMessage)]
    history = set(spoken) if turns and isinstance(turns[-1][0], AIMessage) else set(spoken[:-1])
    return TEXT_SEPARATOR.join(
        f"{speaker(message)}: {text}" if index in history else text for index, (message, text) in enumerate(turns)
    )


def message_text(message: BaseMessage) -> str:
    """The text of one message, without its documents: text-plain blocks, or what a retriever tool found.

    Raises:
        InvalidInputError: a human or system message holds an image or other content that is no text.
    """
    if _found_documents(message):
        return ""
    if isinstance(message.content, str):
        return message.content
    return "".join(_block_text(message, block) for block in message.content)


def map_text(message: BaseMessage, change: Callable[[str], str]) -> BaseMessage:
    """A copy of ``message`` with ``change`` made to each of its texts."""
    if isinstance(message.content, str):
        return message.model_copy(update={"content": change(message.content)})
    blocks = [_map_block(block, change) for block in message.content]
    return message.model_copy(update={"content": blocks})


def _map_block(block: str | dict[str, Any], change: Callable[[str], str]) -> str | dict[str, Any]:
    if isinstance(block, str):
        return change(block)
    return {**block, "text": change(block["text"])} if block.get("type") == "text" else block


def _block_text(message: BaseMessage, block: str | Mapping[str, Any]) -> str:
    if isinstance(block, str):
        return block
    kind = block.get("type")
    if kind == "text":
        return block["text"]
    if kind == "text-plain" or not isinstance(message, HumanMessage | SystemMessage):
        return ""  # what a model or a tool said besides text is no part of the wording
    raise InvalidInputError(
        f"a {message.type} message holds a content block of type {kind!r}, but this model reads text alone: "
        '"text" blocks, and "text-plain" blocks for documents.'
    )


def _lifted(message: BaseMessage) -> list[Any]:
    if isinstance(message, AIMessage):  # other models put sources of theirs there
        return []
    carried = [*to_documents(message.additional_kwargs.get("documents") or []), *_found_documents(message)]
    if isinstance(message.content, str):
        return carried
    blocks = [block for block in message.content if isinstance(block, dict) and block.get("type") == "text-plain"]
    return [*carried, *map(_from_block, blocks)]


def _found_documents(message: BaseMessage) -> list[LangChainDocument]:
    """What a tool made by ``create_retriever_tool(response_format="content_and_artifact")`` found."""
    artifact = message.artifact if isinstance(message, ToolMessage) else None
    is_search = isinstance(artifact, list) and all(isinstance(item, LangChainDocument) for item in artifact)
    return artifact if is_search else []  # pyright: ignore[reportReturnType]


def _from_block(block: Mapping[str, Any]) -> Document:
    text = block.get("text")
    if not isinstance(text, str):
        raise InvalidInputError(
            f"a text-plain block has the keys {sorted(block)} but no text; give the document's text itself, "
            "because files and addresses are not fetched."
        )
    metadata = {"context": block["context"]} if block.get("context") else {}
    return Document(text, block.get("id"), block.get("title"), metadata)


def speaker(message: BaseMessage) -> str:
    """Who says ``message``: "User", "Assistant", "System", "Tool" or another role's name."""
    role = message.role if isinstance(message, ChatMessage) else message.type
    return _SPEAKERS.get(role.lower(), role.capitalize())
