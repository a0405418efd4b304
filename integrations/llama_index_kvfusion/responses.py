"""Answers on the way out: Answer and AnswerStream as LlamaIndex responses, whole or in pieces, sync or async.

Owns the shape of `raw` and of the token counts. It starts no generation and knows no prompt; an async stream
is advanced in one worker thread, so the event loop is free and the stream never changes threads.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Generator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

from llama_index.core.base.llms.types import ChatMessage, ChatResponse, CompletionResponse, MessageRole

from kvfusion_rag import Answer, Source, Usage

if TYPE_CHECKING:
    from kvfusion_rag import AnswerStream


def answer_record(answer: Answer) -> dict[str, Any]:
    """Everything but the token ids as plain JSON data: text, mode, sources, citations, usage, timings.

    ``usage`` stands here as well because LlamaIndex's token counter reads it from the raw response.
    """
    return {
        "text": answer.text,
        "cited_text": answer.cited_text,
        "mode": answer.mode,
        "finish_reason": answer.finish_reason,
        "sources": [_source_record(source) for source in answer.sources],
        "citations": [asdict(citation) for citation in answer.citations],
        "usage": asdict(answer.usage) | _token_counts(answer.usage),
        "timings": asdict(answer.timings),
    }


def completion_response(answer: Answer, delta: str | None = None) -> CompletionResponse:
    """A whole answer: its text, the token counts in `additional_kwargs`, the rest in `raw`."""
    return CompletionResponse(
        text=answer.text, delta=delta, additional_kwargs=_token_counts(answer.usage), raw=answer_record(answer)
    )


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
    try:
        for piece in stream:
            text += piece
            yield CompletionResponse(text=text, delta=piece)
    finally:
        stream.close()
    yield _last_chunk(stream)


async def acompletion_chunks(stream: AnswerStream) -> AsyncGenerator[CompletionResponse, None]:
    """Like `completion_chunks`; a consumer that stops early stops the generation after its current step."""
    text = ""
    loop = asyncio.get_running_loop()
    worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="kvfusion-stream")
    try:
        while (piece := await loop.run_in_executor(worker, next, stream, None)) is not None:
            text += piece
            yield CompletionResponse(text=text, delta=piece)
    finally:
        worker.submit(stream.close)
        worker.shutdown(wait=False)
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


def _token_counts(usage: Usage) -> dict[str, int]:
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.total_tokens,
    }


def _source_record(source: Source) -> dict[str, Any]:
    return asdict(replace(source, metadata={})) | {"metadata": _plain(source.metadata)}


def _plain(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """A caller's metadata as JSON data; what JSON does not know (dates, paths) is written as text."""
    return json.loads(json.dumps({str(key): value for key, value in metadata.items()}, default=str))
