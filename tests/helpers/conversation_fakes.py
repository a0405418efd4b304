"""What tests of chat models need beside fakes.py: prefetched documents, and the turns of a conversation."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from fakes import Call, RecordingGenerator

from kvfusion_rag import Document, Message


@dataclass
class ChatRecorder(RecordingGenerator):
    """Records calls; ``prefetched`` has the documents of each prefetch."""

    prefetched: list[list[Document | str]] = field(default_factory=list)

    def prefetch(self, documents: Sequence[Document | str]) -> Future[int]:
        self.prefetched.append(list(documents))
        future: Future[int] = Future()
        future.set_result(len(documents))
        return future


def turns(call: Call) -> list[tuple[str, str]]:
    """Role and text of each message of the conversation that a call had as its prompt, as :func:`marked` has them."""
    prompt: Any = call.prompt
    return marked(prompt)


def marked(messages: Sequence[Message]) -> list[tuple[str, str]]:
    """Role and text of each message, with ``{documents}`` where the documents belong."""
    assert all(isinstance(message, Message) for message in messages)
    return [(message.role, _marked(message)) for message in messages]


def _marked(message: Message) -> str:
    if message.documents is None:
        return message.text
    at = message.documents.offset
    return f"{message.text[:at]}{{documents}}{message.text[at:]}"
