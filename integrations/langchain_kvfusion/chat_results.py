"""Answers as LangChain chat messages with token counts and metadata."""

from __future__ import annotations

from typing import Any

from langchain_core.messages import AIMessage, AIMessageChunk
from langchain_core.messages.ai import InputTokenDetails, OutputTokenDetails, UsageMetadata
from langchain_core.outputs import ChatGeneration, ChatGenerationChunk, ChatResult

from kvfusion_rag import Answer, AnswerPiece

from .options import generation_info
from .tools import call_chunk, called

PROVIDER = "kvfusion"
REASONING = "reasoning_content"  # LangChain makes a content block of type "reasoning" of it


def chat_result(answer: Answer, model_id: str) -> ChatResult:
    """Return a complete answer as a chat result."""
    message = AIMessage(
        content=answer.text,
        **called(answer.tool_calls),
        additional_kwargs={} if answer.reasoning is None else {REASONING: answer.reasoning},
        usage_metadata=_usage(answer),
        response_metadata=_metadata(answer, model_id),
    )
    return ChatResult(generations=[ChatGeneration(message=message)])


def piece_chunk(piece: AnswerPiece) -> ChatGenerationChunk:
    """Return one piece of a streamed answer or of its reasoning as a chunk."""
    if piece.call_index is not None:
        message = AIMessageChunk(content="", tool_call_chunks=[call_chunk(piece)])
    elif piece.is_reasoning:
        message = AIMessageChunk(content="", additional_kwargs={REASONING: piece.text})
    else:
        message = AIMessageChunk(content=piece.text)
    return ChatGenerationChunk(message=message)


def last_chunk(answer: Answer | None, model_id: str) -> ChatGenerationChunk:
    """Return the chunk at the end of a stream, which has the metadata and no text."""
    assert answer is not None, "an exhausted stream has an answer"
    message = AIMessageChunk(
        content="", usage_metadata=_usage(answer), response_metadata=_metadata(answer, model_id), chunk_position="last"
    )
    return ChatGenerationChunk(message=message)


def _usage(answer: Answer) -> UsageMetadata:
    """Return token counts. Input tokens include the documents, and documents from the store count as cache reads."""
    usage = answer.usage
    return UsageMetadata(
        input_tokens=usage.prompt_tokens,
        output_tokens=usage.completion_tokens,
        total_tokens=usage.total_tokens,
        input_token_details=InputTokenDetails(cache_read=usage.cached_document_tokens),
        output_token_details=OutputTokenDetails(reasoning=usage.reasoning_tokens),
    )


def _metadata(answer: Answer, model_id: str) -> dict[str, Any]:
    info = generation_info(answer)
    del info["reasoning"]  # it is in the message
    return {"model_name": model_id, "model_provider": PROVIDER, **info}
