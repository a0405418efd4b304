"""Answers on the way out: Answer and AnswerStream as LlamaIndex responses, whole or in pieces, sync or async.

Owns the shape of `raw` and of the token counts. It starts no generation and knows no prompt; an async stream
is advanced in one worker thread, so the event loop is free and the stream never changes threads.
"""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Generator, Mapping
from typing import Any

from llama_index.core.base.llms.types import ChatMessage, ChatResponse, CompletionResponse, MessageRole

from kvfusion_rag import Answer, AnswerStream


def answer_record(answer: Answer) -> dict[str, Any]:
    """Everything but the token ids as plain JSON data: text, mode, sources, citations, usage, timings.

    ``usage`` stands here as well because LlamaIndex's token counter reads it from the raw response.
    """
    record = answer.to_dict()
    del record["token_ids"]
    for source in record["sources"]:
        source["metadata"] = _plain(source["metadata"])
    return record


def completion_response(answer: Answer, delta: str | None = None) -> CompletionResponse:
    """A whole answer: its text, the token counts in `additional_kwargs`, the rest in `raw`."""
    counts = {name: getattr(answer.usage, name) for name in ("prompt_tokens", "completion_tokens", "total_tokens")}
    return CompletionResponse(text=answer.text, delta=delta, additional_kwargs=counts, raw=answer_record(answer))


def chat_response(completion: CompletionResponse) -> ChatResponse:
    """The same as an assistant message.

    The counts stay beside the message: LlamaIndex writes a message's own `additional_kwargs` into the prompt
    of the next turn.
    """
    return ChatResponse(
        message=ChatMessage(role=MessageRole.ASSISTANT, content=completion.text),
        delta=completion.delta,
        raw=completion.raw,
        additional_kwargs=completion.additional_kwargs,
    )


def completion_chunks(stream: AnswerStream) -> Generator[CompletionResponse, None, None]:
    """The pieces as they come, then one chunk without new text that carries the counts and `raw`."""
    text = ""
    with stream:
        for piece in stream:
            text += piece
            yield CompletionResponse(text=text, delta=piece)
    yield _last_chunk(stream)


async def acompletion_chunks(stream: AnswerStream) -> AsyncGenerator[CompletionResponse, None]:
    """Like `completion_chunks`; a consumer that stops early stops the generation after its current step."""
    text = ""
    async with stream:
        async for piece in stream:
            text += piece
            yield CompletionResponse(text=text, delta=piece)
    yield _last_chunk(stream)


def chat_chunks(chunks: Generator[CompletionResponse, None, None]) -> Generator[ChatResponse, None, None]:
    """Completion chunks as chat chunks."""
    for chunk in chunks:
        yield chat_response(chunk)


async def achat_chunks(chunks: AsyncGenerator[CompletionResponse, None]) -> AsyncGenerator[ChatResponse, None]:
    """Completion chunks as chat chunks."""
    async for chunk in chunks:
        yield chat_response(chunk)


def _last_chunk(stream: AnswerStream) -> CompletionResponse:
    answer = stream.answer
    assert answer is not None  # a stream that ended without raising has its answer
    return completion_response(answer, delta="")


def _plain(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """A caller's metadata as JSON data; what JSON does not know (dates, paths) is written as text."""
    return json.loads(json.dumps({str(key): value for key, value in metadata.items()}, default=str))
