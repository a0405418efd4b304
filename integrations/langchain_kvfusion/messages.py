"""What one chat message holds: its text, its speaker, the documents that it carries, and their place in its text.

Documents stand in ``additional_kwargs["documents"]``, in text-plain content blocks and in the artifacts of retriever
tools. Knows no template and no generator.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from langchain_core.documents import Document as LangChainDocument
from langchain_core.messages import AIMessage, BaseMessage, ChatMessage, HumanMessage, SystemMessage, ToolMessage

from kvfusion_rag import Document, DocumentsPlace, InvalidInputError

from .documents import to_documents

Role = Literal["system", "user", "assistant"]  # of a kvfusion_rag.Message

_SPEAKERS = {"human": "User", "user": "User", "ai": "Assistant", "assistant": "Assistant"}
_ROLES: dict[str, Role] = {"System": "system", "Assistant": "assistant"}


def last_human_text(messages: Sequence[BaseMessage]) -> str | None:
    """The text of the last human message that has any."""
    texts = (message_text(message) for message in reversed(messages) if speaker(message) == "User")
    return next((text for text in texts if text.strip()), None)


def documents_place(message: BaseMessage) -> DocumentsPlace | None:
    """The place of the documents in the message's text, as ``additional_kwargs["documents_place"]`` has it.

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
            f"additional_kwargs['documents_place'] is {found!r}, but it must hold the 'offset' of the documents in "
            "the message's text, in characters, and may hold a 'separator' and 'titles'."
        )
    return place


def lifted_documents(messages: Sequence[BaseMessage]) -> tuple[Document, ...]:
    """The documents that stand beside the messages' texts, in order."""
    return to_documents([item for message in messages for item in _lifted(message)])


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


def role_of(message: BaseMessage) -> Role:
    """The role of ``message`` in a generator's prompt; whoever is not the model or the system counts as the user."""
    return _ROLES.get(speaker(message), "user")


def calls_tools(message: BaseMessage) -> bool:
    """Whether ``message`` asks for a tool's result."""
    return isinstance(message, AIMessage) and bool(message.tool_calls)
