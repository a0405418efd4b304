"""Converts LlamaIndex chat messages into the messages of a generator's prompt."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace

from llama_index.core.base.llms.types import (
    AudioBlock,
    ChatMessage,
    DocumentBlock,
    ImageBlock,
    MessageRole,
    ToolCallBlock,
    VideoBlock,
)

from kvfusion_rag import InvalidInputError, Message, ToolCall

from .marks import MessagePlace

_SYSTEM_ROLES = (MessageRole.SYSTEM, MessageRole.DEVELOPER)
_ASSISTANT_ROLES = (MessageRole.ASSISTANT, MessageRole.CHATBOT, MessageRole.MODEL)
_MEDIA = (ImageBlock, AudioBlock, VideoBlock, DocumentBlock)


def to_messages(
    messages: Sequence[ChatMessage], place: MessagePlace | None = None, *, keeps_calls: bool = False
) -> list[Message]:
    """Convert the messages, with the documents at `place`.

    Calls of tools are dropped, and their results become user messages, unless `keeps_calls` is set.

    A final system message ("Sum up.") becomes a user message too, because the last message is answered.

    Raises InvalidInputError for images, audio, video and files, and if the message of `place` does not exist.
    """
    turns = [_to_message(message, number, keeps_calls) for number, message in enumerate(messages)]
    if place is not None:
        number, documents = place
        if not 0 <= number < len(turns):
            raise InvalidInputError(
                f"documents_place refers to message {number}, but there are {len(turns)} messages, counted from 0."
            )
        turns[number] = replace(turns[number], documents=documents)
    if turns and turns[-1].role == "system":
        turns[-1] = replace(turns[-1], role="user")
    return turns


def last_question(messages: Sequence[ChatMessage]) -> str | None:
    """Return the text of the last user message that has one, or None."""
    texts = [message.content for message in messages if message.role == MessageRole.USER and message.content]
    return texts[-1] if texts else None


def _to_message(message: ChatMessage, number: int, keeps_calls: bool) -> Message:
    for block in message.blocks:
        if isinstance(block, _MEDIA):
            raise InvalidInputError(
                f"messages[{number}] contains a {type(block).__name__}, but the model reads only text; remove it."
            )
    text = message.content or ""
    if message.role in _SYSTEM_ROLES:
        return Message("system", text)
    if keeps_calls and message.role == MessageRole.TOOL:
        return Message("tool", text, tool_call_id=message.additional_kwargs.get("tool_call_id"))
    if keeps_calls and (calls := [block for block in message.blocks if isinstance(block, ToolCallBlock)]):
        return Message("assistant", text, tool_calls=tuple(map(_to_call, calls)))
    return Message("assistant" if message.role in _ASSISTANT_ROLES else "user", text)


def _to_call(block: ToolCallBlock) -> ToolCall:
    given = block.tool_kwargs
    arguments = given if isinstance(given, str) else json.dumps(given, ensure_ascii=False, default=str)
    return ToolCall(block.tool_name, arguments, block.tool_call_id or "")
