"""Reads chat messages: text, speaker, documents, and the place of the documents.

A message can carry documents in ``additional_kwargs["documents"]``, in text-plain content blocks, and in the artifact
of a retriever tool.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from langchain_core.documents import Document as LangChainDocument
from langchain_core.messages import AIMessage, BaseMessage, ChatMessage, HumanMessage, SystemMessage, ToolMessage

from kvfusion_rag import Document, DocumentsPlace, InvalidInputError

from .documents import to_documents

Role = Literal["system", "user", "assistant"]

_SPEAKERS = {"human": "User", "user": "User", "ai": "Assistant", "assistant": "Assistant"}
_ROLES: dict[str, Role] = {"System": "system", "Assistant": "assistant"}


def last_human_text(messages: Sequence[BaseMessage]) -> str | None:
    """Return the text of the last human message that is not blank, or None."""
    texts = (message_text(message) for message in reversed(messages) if speaker(message) == "User")
    return next((text for text in texts if text.strip()), None)


def documents_place(message: BaseMessage) -> DocumentsPlace | None:
    """Return the place in ``additional_kwargs["documents_place"]``, or None.

    Raises:
        InvalidInputError: the entry is not a place.
    """
    found = message.additional_kwargs.get("documents_place")
    if found is None or isinstance(found, DocumentsPlace):
        return found
    try:
        place = DocumentsPlace(**found)
    except TypeError:
        place = None
    if place is None or not (isinstance(place.offset, int) and isinstance(place.separator, str)):
        raise InvalidInputError(
            f"additional_kwargs['documents_place'] is {found!r}, but it must have 'offset', the position of the "
            "documents in the message's text in characters, and may have 'separator' and 'titles'."
        )
    return place


def lifted_documents(messages: Sequence[BaseMessage]) -> tuple[Document, ...]:
    """Return the documents that the messages carry, in order."""
    return to_documents([item for message in messages for item in _lifted(message)])


def message_text(message: BaseMessage) -> str:
    """Return the text of a message without the documents in text-plain blocks or in a retriever tool's result.

    Raises:
        InvalidInputError: a human or system message contains an image or other content that is not text.
    """
    if _found_documents(message):
        return ""
    if isinstance(message.content, str):
        return message.content
    return "".join(_block_text(message, block) for block in message.content)


def map_text(message: BaseMessage, change: Callable[[str], str]) -> BaseMessage:
    """Return a copy of ``message`` with ``change`` applied to each of its texts."""
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
        return ""  # content of models and tools that is not text is ignored
    raise InvalidInputError(
        f"a {message.type} message has a content block of type {kind!r}, but this model reads only text; allowed are "
        '"text" blocks, and "text-plain" blocks for documents.'
    )


def _lifted(message: BaseMessage) -> list[Any]:
    if isinstance(message, AIMessage):  # other models may store their sources there
        return []
    carried = [*to_documents(message.additional_kwargs.get("documents") or []), *_found_documents(message)]
    if isinstance(message.content, str):
        return carried
    blocks = [block for block in message.content if isinstance(block, dict) and block.get("type") == "text-plain"]
    return [*carried, *map(_from_block, blocks)]


def _found_documents(message: BaseMessage) -> list[LangChainDocument]:
    """Return the result of a tool created by ``create_retriever_tool(response_format="content_and_artifact")``."""
    artifact = message.artifact if isinstance(message, ToolMessage) else None
    is_search = isinstance(artifact, list) and all(isinstance(item, LangChainDocument) for item in artifact)
    return artifact if is_search else []  # pyright: ignore[reportReturnType]


def _from_block(block: Mapping[str, Any]) -> Document:
    text = block.get("text")
    if not isinstance(text, str):
        raise InvalidInputError(
            f"a text-plain block has the keys {sorted(block)} but no text; add the document's text, because files and "
            "URLs are not loaded."
        )
    metadata = {"context": block["context"]} if block.get("context") else {}
    return Document(text, block.get("id"), block.get("title"), metadata)


def speaker(message: BaseMessage) -> str:
    """Return the speaker of ``message``: "User", "Assistant", "System", "Tool" or the name of another role."""
    role = message.role if isinstance(message, ChatMessage) else message.type
    return _SPEAKERS.get(role.lower(), role.capitalize())


def role_of(message: BaseMessage) -> Role:
    """Return the role of ``message`` in a generator's prompt. All speakers except AI and system become the user."""
    return _ROLES.get(speaker(message), "user")


def calls_tools(message: BaseMessage) -> bool:
    """Return whether ``message`` calls a tool."""
    return isinstance(message, AIMessage) and bool(message.tool_calls)
