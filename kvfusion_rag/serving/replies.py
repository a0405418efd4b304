"""Answers in OpenAI's format, complete or streamed, with an additional ``kvfusion`` object."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Sequence
from typing import Any

from ..schema import Answer, AnswerPiece, Document, Source, ToolCall
from ..text.citations import place_of

LAST_EVENT = b"data: [DONE]\n\n"
_OF_SERVER = frozenset({"source", "distance"})  # metadata of an index that clients do not get


def event(data: object) -> bytes:
    """Return one server-sent event. In ASCII, no text can end the event or fail to be encoded."""
    return f"data: {json.dumps(data, allow_nan=False)}\n\n".encode("ascii")


def source_list(sources: Sequence[Source]) -> list[dict[str, Any]]:
    """Return the sources as JSON data, with the place in their metadata, and attribution if it was requested."""
    return [_source(source.to_dict()) for source in sources]


def _source(data: dict[str, Any]) -> dict[str, Any]:
    metadata = data.pop("metadata")
    unset = {name for name in ("attention", "effect") if data[name] is None}
    return {name: value for name, value in data.items() if name not in unset} | {"place": place_of(metadata)}


def document_list(documents: Sequence[Document]) -> list[dict[str, Any]]:
    """Return documents that the server found, in the form that requests have. Paths of the server are left out."""
    return [
        {
            "id": document.id,
            "title": document.title,
            "text": document.text,
            "score": document.score,
            "metadata": {name: value for name, value in document.metadata.items() if name not in _OF_SERVER},
        }
        for document in documents
    ]


class Completion:
    """The JSON objects of one completion, which all have its id.

    Args:
        found: the documents that the server found for the question; ``None`` if the request had its own.
        include_usage: whether a stream ends with a chunk of token counts.
    """

    def __init__(self, model: str, found: Sequence[Document] | None = None, *, include_usage: bool = False) -> None:
        self._include_usage = include_usage
        self._found = {} if found is None else {"documents": document_list(found)}
        self._common = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}

    def whole(self, answer: Answer) -> dict[str, Any]:
        """Return the complete answer as one object."""
        message: dict[str, Any] = {"role": "assistant", "content": answer.text}
        if answer.tool_calls:
            message["content"] = answer.text or None
            message["tool_calls"] = [_call(call) for call in answer.tool_calls]
        if answer.reasoning is not None:
            message["reasoning_content"] = answer.reasoning
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": answer.finish_reason}
        return {
            **self._common,
            "object": "chat.completion",
            "choices": [choice],
            "usage": _usage(answer),
            "kvfusion": _extension(answer) | self._found,
        }

    def first(self) -> dict[str, Any]:
        """Return the first chunk of a stream, which has the role but no text, and the documents that were found."""
        found = {"kvfusion": self._found} if self._found else {}
        return self._chunk({"role": "assistant", "content": ""}) | found

    def piece(self, piece: AnswerPiece) -> dict[str, Any]:
        """Return a chunk with one piece of the answer, of its reasoning, or of a call of a tool."""
        if piece.call_index is not None:
            begun = {"function": {}} if piece.call is None else _call(piece.call)
            function = {**begun["function"], "arguments": piece.text}
            return self._chunk({"tool_calls": [{**begun, "index": piece.call_index, "function": function}]})
        return self._chunk({"reasoning_content" if piece.is_reasoning else "content": piece.text})

    def last(self, answer: Answer) -> list[dict[str, Any]]:
        """Return a chunk with the finish reason and the ``kvfusion`` object, and one with token counts if wanted."""
        chunks = [{**self._chunk({}, answer.finish_reason), "kvfusion": _extension(answer)}]
        if self._include_usage:
            chunks.append({**self._common, "object": "chat.completion.chunk", "choices": [], "usage": _usage(answer)})
        return chunks

    def _chunk(self, delta: dict[str, Any], finish_reason: str | None = None) -> dict[str, Any]:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
        return {**self._common, "object": "chat.completion.chunk", "choices": [choice]}


def _call(call: ToolCall) -> dict[str, Any]:
    function = {"name": call.name, "arguments": call.arguments}
    return {"id": call.id, "type": "function", "function": function}


def _usage(answer: Answer) -> dict[str, Any]:
    usage = answer.usage
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.total_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_document_tokens},
        "completion_tokens_details": {"reasoning_tokens": usage.reasoning_tokens},
    }


def _extension(answer: Answer) -> dict[str, Any]:
    data = answer.to_dict()
    support = {} if answer.support is None else {name: data[name] for name in ("support", "found", "notice")}
    return {
        **{name: data[name] for name in ("mode", "cited_text", "citations", "timings")},
        **support,
        "sources": source_list(answer.sources),
    }
