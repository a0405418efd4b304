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
    """Role and text of each message of the conversation that a call had as its prompt."""
    prompt: Any = call.prompt
    assert all(isinstance(message, Message) for message in prompt)
    return [(message.role, message.text) for message in prompt]
