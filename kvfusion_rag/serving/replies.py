"""Answers as OpenAI's clients read them, whole or in pieces, with a ``kvfusion`` object besides. Plain data alone."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from ..schema import Answer, Source

LAST_EVENT = b"data: [DONE]\n\n"


def event(data: object) -> bytes:
    """One server-sent event; in ASCII, so no text can end it or fail to be sent."""
    return f"data: {json.dumps(data, allow_nan=False)}\n\n".encode("ascii")


def sources(found: Sequence[Source]) -> list[dict[str, Any]]:
    """Where each document's keys and values came from, whether it was read, and its part in the answer if asked for.

    Its metadata is not sent back.
    """
    return [
        {
            **{"id": s.id, "title": s.title, "origin": s.origin, "tokens": s.tokens, "duplicate_of": s.duplicate_of},
            **{"used": s.used, "focus_score": s.focus_score},
            **{name: value for name in ("attention", "effect") if (value := getattr(s, name)) is not None},
        }
        for s in found
    ]


class Completion:
    """One completion under its id: the objects that tell of it."""

    def __init__(self, model: str) -> None:
        self._facts = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}

    def whole(self, answer: Answer) -> dict[str, Any]:
        message = {"role": "assistant", "content": answer.text}
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": answer.finish_reason}
        return {
            **self._facts,
            "object": "chat.completion",
            "choices": [choice],
            "usage": _usage(answer),
            "kvfusion": _facts(answer),
        }

    def first(self) -> dict[str, Any]:
        """The chunk that begins a stream."""
        return self._chunk({"role": "assistant", "content": ""})

    def piece(self, text: str) -> dict[str, Any]:
        return self._chunk({"content": text})

    def last(self, answer: Answer) -> dict[str, Any]:
        """The last chunk with a choice: why the answer ended, and what it was made of."""
        return {**self._chunk({}, answer.finish_reason), "kvfusion": _facts(answer)}

    def usage(self, answer: Answer) -> dict[str, Any]:
        """The chunk of token counts, without a choice, that a client may ask for."""
        return {**self._facts, "object": "chat.completion.chunk", "choices": [], "usage": _usage(answer)}

    def _chunk(self, delta: dict[str, str], finish_reason: str | None = None) -> dict[str, Any]:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
        return {**self._facts, "object": "chat.completion.chunk", "choices": [choice]}


def _usage(answer: Answer) -> dict[str, Any]:
    usage = answer.usage
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.total_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_document_tokens},
    }


def _facts(answer: Answer) -> dict[str, Any]:
    return {
        "mode": answer.mode,
        "cited_text": answer.cited_text,
        "sources": sources(answer.sources),
        "citations": [asdict(citation) for citation in answer.citations],
        "timings": asdict(answer.timings),
    }
