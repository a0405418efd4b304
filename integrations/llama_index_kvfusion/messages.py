"""LlamaIndex chat messages on the way in: the turns that a generator reads behind its documents.

Decides which role each of LlamaIndex's roles speaks as, and refuses what no text model can read. It knows no model.
"""

from __future__ import annotations

from collections.abc import Sequence

from llama_index.core.base.llms.types import (
    AudioBlock,
    ChatMessage,
    DocumentBlock,
    ImageBlock,
    MessageRole,
    VideoBlock,
)

from kvfusion_rag import InvalidInputError, Message

_SAYS_AS_SYSTEM = (MessageRole.SYSTEM, MessageRole.DEVELOPER)
_SAYS_AS_ASSISTANT = (MessageRole.ASSISTANT, MessageRole.CHATBOT, MessageRole.MODEL)
_MEDIA = (ImageBlock, AudioBlock, VideoBlock, DocumentBlock)


def to_messages(messages: Sequence[ChatMessage]) -> list[Message]:
    """The messages as the generator takes them. What tools say is read as the user's, as models without tools do.

    A conversation that ends with the system's instruction ("Sum up.") has that answered, as if the user said it.

    Raises InvalidInputError for images, sound, video and files.
    """
    turns = [_to_message(message, number) for number, message in enumerate(messages)]
    if turns and turns[-1].role == "system":
        turns[-1] = Message("user", turns[-1].text)
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
