"""Splits a text into chunks at paragraphs and sentences, with semantic-text-splitter.

The caller's function counts tokens, because the splitter's own tokenizer mode also counts special tokens, which
documents do not have. It reads a text in windows, because the splitter counts the rest of an unbroken text again for
each chunk, in time that grows with the square of the text.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from ..errors import InvalidInputError, MissingDependencyError
from .files.kinds import Kind

MIN_CHUNK_TOKENS = 8  # the splitter does not split characters, and a character has up to four byte-level tokens
MAX_CHUNK_TOKENS = 2**31  # more does not fit the splitter's numbers
WINDOW_CHARACTERS = 32  # per token of a chunk; ordinary tokens have up to 8
MIN_WINDOW = 2_000  # characters
MARKDOWN_KINDS: frozenset[Kind] = frozenset({"markdown", "word", "slides", "notebook"})
KEPT_INDENTS: frozenset[Kind] = frozenset({"code"})  # kinds in which the spaces in front of a line have a meaning

_BLANK_LINES = re.compile(r"(?:[^\S\n]*\n)*")


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
    """Split ``text`` into chunks of at most ``chunk_tokens`` tokens, without overlap. Blank chunks are dropped.

    Time grows linearly with the length of the text. No chunk is longer than a window.
    """
    try:
        from semantic_text_splitter import MarkdownSplitter, TextSplitter
    except ImportError as error:
        raise MissingDependencyError.of_extra("splitting texts", "semantic-text-splitter", "rag") from error
    kind_of_splitter = MarkdownSplitter if kind in MARKDOWN_KINDS else TextSplitter
    splitter = kind_of_splitter.from_callback(
        count_tokens, min(chunk_tokens, MAX_CHUNK_TOKENS), trim=kind not in KEPT_INDENTS
    )
    window = max(MIN_WINDOW, WINDOW_CHARACTERS * chunk_tokens)
    chunks: list[Chunk] = []
    start = 0
    while start < len(text):
        pieces = splitter.chunk_indices(text[start : start + window])
        if start + window < len(text) and len(pieces) > 1:
            pieces.pop()  # this chunk may continue after the window
        chunks += [_chunk(piece, start + at) for at, piece in pieces if piece.strip()]
        start += window if not pieces or start + window >= len(text) else pieces[-1][0] + len(pieces[-1][1])
    return chunks


def _chunk(piece: str, start: int) -> Chunk:
    """Return a piece without blank lines and spaces at its ends, except the indentation of its first line."""
    blank = _BLANK_LINES.match(piece)
    assert blank is not None  # it may be empty
    text = piece[blank.end() :].rstrip()
    return Chunk(text, start + blank.end(), start + blank.end() + len(text))
