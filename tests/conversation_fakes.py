"""Generators without a model for tests of chat models: those of fakes.py, but prompts may be conversations."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from fakes import Call, EchoGenerator, RecordingGenerator

from kvfusion_rag import Document, Message


class _Conversing:
    def count_tokens(self, text: Any) -> int:
        """Words of a text, or of all messages of a conversation."""
        texts = [text] if isinstance(text, str) else [message.text for message in text]
        return sum(len(each.split()) for each in texts)


@dataclass
class ChatRecorder(_Conversing, RecordingGenerator):
    """Records calls; ``prefetched`` has the documents of each prefetch."""

    prefetched: list[list[Document | str]] = field(default_factory=list)

    def prefetch(self, documents: Sequence[Document | str]) -> Future[int]:
        self.prefetched.append(list(documents))
        future: Future[int] = Future()
        future.set_result(len(documents))
        return future


@dataclass
class ChatEcho(_Conversing, EchoGenerator):
    """Answers with what it received."""


def turns(call: Call) -> list[tuple[str, str]]:
    """Role and text of each message of the conversation that a call had as its prompt."""
    prompt: Any = call.prompt
    assert all(isinstance(message, Message) for message in prompt)
    return [(message.role, message.text) for message in prompt]
