"""A fake generator that records prefetches, and a short form of the messages in a call."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from fakes import Call, RecordingGenerator

from kvfusion_rag import Document, Message


@dataclass
class ChatRecorder(RecordingGenerator):
    """Records calls and the documents of each prefetch."""

    prefetched: list[list[Document | str]] = field(default_factory=list)

    def prefetch(self, documents: Sequence[Document | str]) -> Future[int]:
        self.prefetched.append(list(documents))
        future: Future[int] = Future()
        future.set_result(len(documents))
        return future


def turns(call: Call) -> list[tuple[str, str]]:
    """Return role and text of each message in a call's prompt, see :func:`marked`."""
    prompt: Any = call.prompt
    return marked(prompt)


def marked(messages: Sequence[Message]) -> list[tuple[str, str]]:
    """Return role and text of each message, with ``{documents}`` in the place of the documents."""
    assert all(isinstance(message, Message) for message in messages)
    return [(message.role, _marked(message)) for message in messages]


def _marked(message: Message) -> str:
    if message.documents is None:
        return message.text
    at = message.documents.offset
    return f"{message.text[:at]}{{documents}}{message.text[at:]}"
