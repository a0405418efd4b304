"""LlamaIndex chat messages as the messages of a generator's prompt.

Maps LlamaIndex's roles to system, user and assistant, and refuses what a text model cannot read. It knows no model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from llama_index.core.base.llms.types import (
    AudioBlock,
    ChatMessage,
    DocumentBlock,
    ImageBlock,
    MessageRole,
    VideoBlock,
)

from kvfusion_rag import InvalidInputError, Message

from .wording import MessagePlace

_SAYS_AS_SYSTEM = (MessageRole.SYSTEM, MessageRole.DEVELOPER)
_SAYS_AS_ASSISTANT = (MessageRole.ASSISTANT, MessageRole.CHATBOT, MessageRole.MODEL)
_MEDIA = (ImageBlock, AudioBlock, VideoBlock, DocumentBlock)


def to_messages(messages: Sequence[ChatMessage], place: MessagePlace | None = None) -> list[Message]:
    """The messages as the generator takes them, with the documents at `place`. Tool messages become the user's.

    A final system message ("Sum up.") becomes the user's too, because the last message is what is answered.

    Raises InvalidInputError for images, sound, video and files, and for a place in a message that does not exist.
    """
    turns = [_to_message(message, number) for number, message in enumerate(messages)]
    if place is not None:
        number, documents = place
        if not 0 <= number < len(turns):
            raise InvalidInputError(
                f"documents_place names message {number}, but there are {len(turns)} messages, counted from 0."
            )
        turns[number] = replace(turns[number], documents=documents)
    if turns and turns[-1].role == "system":
        turns[-1] = replace(turns[-1], role="user")
    return turns


def last_question(messages: Sequence[ChatMessage]) -> str | None:
    """What the user said last, if the user said anything."""
    asked = [message.content for message in messages if message.role == MessageRole.USER and message.content]
    return asked[-1] if asked else None


def _to_message(message: ChatMessage, number: int) -> Message:
    for block in message.blocks:
        if isinstance(block, _MEDIA):
            raise InvalidInputError(
                f"messages[{number}] holds a {type(block).__name__}, but the model reads text alone; leave it out."
            )
    text = message.content or ""
    if message.role in _SAYS_AS_SYSTEM:
        return Message("system", text)
    return Message("assistant" if message.role in _SAYS_AS_ASSISTANT else "user", text)
