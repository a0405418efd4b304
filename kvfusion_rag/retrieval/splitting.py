"""Splits a text into chunks at paragraphs and sentences, with semantic-text-splitter.

The caller's function counts tokens, because the splitter's own tokenizer mode also counts special tokens, which
documents do not have.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ..errors import InvalidInputError, MissingDependencyError
from .loaders import Kind

MIN_CHUNK_TOKENS = 8  # the splitter does not split characters, and a character has up to four byte-level tokens


@dataclass(frozen=True, slots=True)
class Chunk:
    """A piece of a text: ``whole[start:end] == text``."""

    text: str
    start: int
    end: int


def check_chunk_tokens(chunk_tokens: int) -> int:
    """Return ``chunk_tokens``, or raise InvalidInputError if it is too small."""
    if chunk_tokens < MIN_CHUNK_TOKENS:
        raise InvalidInputError(f"chunk_tokens is {chunk_tokens}, but it must be at least {MIN_CHUNK_TOKENS}.")
    return chunk_tokens


def split_text(text: str, kind: Kind, chunk_tokens: int, count_tokens: Callable[[str], int]) -> list[Chunk]:
    """Split ``text`` into chunks of at most ``chunk_tokens`` tokens, without overlap. Blank chunks are dropped."""
    try:
        from semantic_text_splitter import MarkdownSplitter, TextSplitter
    except ImportError as error:
        raise MissingDependencyError(
            'splitting texts needs semantic-text-splitter: pip install "kvfusion-rag[rag]".'
        ) from error
    splitter = MarkdownSplitter if kind == "markdown" else TextSplitter
    pieces = splitter.from_callback(count_tokens, chunk_tokens).chunk_indices(text)
    return [Chunk(piece, start, start + len(piece)) for start, piece in pieces if piece.strip()]
