"""Cuts a text into chunks at its semantic borders, sized in the tokens of the model that will read them.

A thin layer over semantic-text-splitter. Sizes come from the caller's function: exact for every model, and
as quick as the splitter's own tokenizer mode, which counts special tokens that documents do not get.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ..errors import InvalidInputError, MissingDependencyError
from .loaders import Kind

# The splitter never cuts inside a character, and one character takes up to four byte-level tokens.
MIN_CHUNK_TOKENS = 8


@dataclass(frozen=True, slots=True)
class Chunk:
    """A piece of a text: ``whole[start:end] == text``."""

    text: str
    start: int
    end: int


def check_chunk_tokens(chunk_tokens: int) -> int:
    """Returns ``chunk_tokens``; raises InvalidInputError where it is below the smallest useful size."""
    if chunk_tokens < MIN_CHUNK_TOKENS:
        raise InvalidInputError(
            f"chunk_tokens is {chunk_tokens}, but a chunk needs at least {MIN_CHUNK_TOKENS} tokens."
        )
    return chunk_tokens


def split_text(text: str, kind: Kind, chunk_tokens: int, count_tokens: Callable[[str], int]) -> list[Chunk]:
    """Chunks of at most ``chunk_tokens`` tokens, in order, without overlap and without blank ones."""
    try:
        from semantic_text_splitter import MarkdownSplitter, TextSplitter
    except ImportError as error:
        raise MissingDependencyError(
            'splitting texts needs semantic-text-splitter: pip install "kvfusion-rag[rag]".'
        ) from error
    splitter = MarkdownSplitter if kind == "markdown" else TextSplitter
    pieces = splitter.from_callback(count_tokens, chunk_tokens).chunk_indices(text)
    return [Chunk(piece, start, start + len(piece)) for start, piece in pieces if piece.strip()]
