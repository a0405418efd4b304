"""Converts answers and answer streams into LlamaIndex responses."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Generator, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

from llama_index.core.base.llms.types import (
    ChatMessage,
    ChatResponse,
    CompletionResponse,
    MessageRole,
    ThinkingBlock,
    ToolCallBlock,
)

from kvfusion_rag import Answer, AnswerPiece, AnswerStream, ToolCall


def answer_record(answer: Answer) -> dict[str, Any]:
    """Return the answer without its token ids as JSON data. LlamaIndex's token counter reads its ``usage``."""
    record = answer.to_dict()
    del record["token_ids"]
    for source in record["sources"]:
        source["metadata"] = _plain(source["metadata"])
    return record


def completion_response(answer: Answer, delta: str | None = None) -> CompletionResponse:
    """Return a complete answer, with token counts in `additional_kwargs` and its record in `raw`."""
    return CompletionResponse(
        text=answer.text, delta=delta, additional_kwargs=_counts(answer), raw=answer_record(answer)
    )


def chat_response(answer: Answer, delta: str | None = None) -> ChatResponse:
    """Return a complete answer as an assistant message, with its reasoning in a block of its own.

    Token counts are not added to the message, because LlamaIndex would write them into the prompt of the next turn.
    """
    return ChatResponse(
        message=_message(answer.text, answer.reasoning, answer.tool_calls),
        delta=delta,
        raw=answer_record(answer),
        additional_kwargs=_counts(answer),
    )


def completion_chunks(stream: AnswerStream) -> Generator[CompletionResponse, None, None]:
    """Yield the pieces, and then a chunk without text that has the token counts and `raw`."""
    text = ""
    with stream:
        for piece in stream:
            text += piece
            yield CompletionResponse(text=text, delta=piece)
    yield completion_response(_answer(stream), delta="")


async def acompletion_chunks(stream: AnswerStream) -> AsyncGenerator[CompletionResponse, None]:
    """Like `completion_chunks`, without blocking the event loop. Closing it stops decoding at the next token."""
    text = ""
    async with stream:
        async for piece in stream:
            text += piece
            yield CompletionResponse(text=text, delta=piece)
    yield completion_response(_answer(stream), delta="")


def chat_chunks(stream: AnswerStream) -> Generator[ChatResponse, None, None]:
    """Yield the pieces of reasoning and answer, and then a chunk that has the token counts and `raw`."""
    growing = _GrowingMessage()
    with stream:
        for piece in stream.pieces:
            yield growing.chunk(piece)
    yield chat_response(_answer(stream), delta="")


async def achat_chunks(stream: AnswerStream) -> AsyncGenerator[ChatResponse, None]:
    """Like `chat_chunks`, without blocking the event loop. Closing it stops decoding at the next token."""
    growing = _GrowingMessage()
    async with stream:
        async for piece in stream.pieces:
            yield growing.chunk(piece)
    yield chat_response(_answer(stream), delta="")


class _GrowingMessage:
    """The message of a stream so far."""

    def __init__(self) -> None:
        self._text, self._reasoning = "", ""
        self._calls: list[ToolCall] = []

    def chunk(self, piece: AnswerPiece) -> ChatResponse:
        """Add a piece and return its chunk."""
        if piece.call_index is not None:
            if piece.call is not None:
                self._calls.append(piece.call)
            call = self._calls[piece.call_index]
            self._calls[piece.call_index] = replace(call, arguments=call.arguments + piece.text)
            return ChatResponse(message=_message(self._text, self._reasoning, self._calls), delta="")
        if piece.is_reasoning:
            self._reasoning += piece.text
            message = _message(self._text, self._reasoning)
            return ChatResponse(message=message, delta="", additional_kwargs={"thinking_delta": piece.text})
        self._text += piece.text
        return ChatResponse(message=_message(self._text, self._reasoning), delta=piece.text)


def _message(text: str, reasoning: str | None, calls: Sequence[ToolCall] = ()) -> ChatMessage:
    message = ChatMessage(role=MessageRole.ASSISTANT, content=text)
    for call in calls:
        kwargs = _complete(call.arguments)
        message.blocks.append(ToolCallBlock(tool_call_id=call.id, tool_name=call.name, tool_kwargs=kwargs))
    if calls:  # LlamaIndex's programs look here for calls in streams
        message.additional_kwargs["tool_calls"] = [asdict(call) for call in calls]
    if reasoning:
        message.blocks.insert(0, ThinkingBlock(content=reasoning))
    return message


def _complete(arguments: str) -> dict[str, Any] | str:
    """Return the arguments of a call, or their text if the call is not complete."""
    try:
        return json.loads(arguments)
    except ValueError:
        return arguments


def _counts(answer: Answer) -> dict[str, int]:
    return {name: getattr(answer.usage, name) for name in ("prompt_tokens", "completion_tokens", "total_tokens")}


def _answer(stream: AnswerStream) -> Answer:
    assert stream.answer is not None  # the stream is exhausted
    return stream.answer


def _plain(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Return a document's metadata as JSON data. Other types, such as dates and paths, become strings."""
    return json.loads(json.dumps({str(key): value for key, value in metadata.items()}, default=str))
