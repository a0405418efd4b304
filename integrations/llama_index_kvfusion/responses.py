"""Converts answers and answer streams into LlamaIndex responses."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Generator, Mapping
from typing import Any

from llama_index.core.base.llms.types import ChatMessage, ChatResponse, CompletionResponse, MessageRole

from kvfusion_rag import Answer, AnswerStream


def answer_record(answer: Answer) -> dict[str, Any]:
    """Return the answer without its token ids as JSON data. LlamaIndex's token counter reads its ``usage``."""
    record = answer.to_dict()
    del record["token_ids"]
    for source in record["sources"]:
        source["metadata"] = _plain(source["metadata"])
    return record


def completion_response(answer: Answer, delta: str | None = None) -> CompletionResponse:
    """Return a complete answer, with token counts in `additional_kwargs` and its record in `raw`."""
    counts = {name: getattr(answer.usage, name) for name in ("prompt_tokens", "completion_tokens", "total_tokens")}
    return CompletionResponse(text=answer.text, delta=delta, additional_kwargs=counts, raw=answer_record(answer))


def chat_response(completion: CompletionResponse) -> ChatResponse:
    """Convert a completion into an assistant message.

    Token counts are not added to the message, because LlamaIndex would write them into the prompt of the next turn.
    """
    return ChatResponse(
        message=ChatMessage(role=MessageRole.ASSISTANT, content=completion.text),
        delta=completion.delta,
        raw=completion.raw,
        additional_kwargs=completion.additional_kwargs,
    )


def completion_chunks(stream: AnswerStream) -> Generator[CompletionResponse, None, None]:
    """Yield the pieces, and then a chunk without text that has the token counts and `raw`."""
    text = ""
    with stream:
        for piece in stream:
            text += piece
            yield CompletionResponse(text=text, delta=piece)
    yield _last_chunk(stream)


async def acompletion_chunks(stream: AnswerStream) -> AsyncGenerator[CompletionResponse, None]:
    """Like `completion_chunks`, without blocking the event loop. Closing it stops decoding at the next token."""
    text = ""
    async with stream:
        async for piece in stream:
            text += piece
            yield CompletionResponse(text=text, delta=piece)
    yield _last_chunk(stream)


def chat_chunks(chunks: Generator[CompletionResponse, None, None]) -> Generator[ChatResponse, None, None]:
    """Convert completion chunks into chat chunks."""
    for chunk in chunks:
        yield chat_response(chunk)


async def achat_chunks(chunks: AsyncGenerator[CompletionResponse, None]) -> AsyncGenerator[ChatResponse, None]:
    """Convert completion chunks into chat chunks."""
    async for chunk in chunks:
        yield chat_response(chunk)


def _last_chunk(stream: AnswerStream) -> CompletionResponse:
    answer = stream.answer
    assert answer is not None  # the stream is exhausted
    return completion_response(answer, delta="")


def _plain(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Return a document's metadata as JSON data. Other types, such as dates and paths, become strings."""
    return json.loads(json.dumps({str(key): value for key, value in metadata.items()}, default=str))
