"""Splitting texts into chunks."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from indexes import open_index
from tiny import TOKENIZER_KINDS, tokenizer

from kvfusion_rag import InvalidInputError
from kvfusion_rag.retrieval.loaders import Kind
from kvfusion_rag.retrieval.splitting import MIN_CHUNK_TOKENS, split_text
from kvfusion_rag.text.encoder import PlainEncoder

PIECES = st.sampled_from(
    [
        *("word ", "é", "🙂", "👩‍🚀", "\u0301", "日本", "a" * 30, ". ", "\n", "\n\n", "\r\n", "\t"),
        *("# Head\n", "- item\n", "`code`", "**b**", "| a | b |\n", "```\n", "[x](y) ", "> q\n"),
    ]
)


def count_bytes(text: str) -> int:
    """Count tokens like a byte-level tokenizer in the worst case, where one character may be four tokens."""
    return len(text.encode())


@settings(max_examples=50)
@given(
    pieces=st.lists(PIECES, max_size=60),
    kind=st.sampled_from(["text", "markdown"]),
    limit=st.integers(MIN_CHUNK_TOKENS, 60),
)
def test_chunks_cover_the_text_within_the_limit(pieces: list[str], kind: Kind, limit: int):
    text = "".join(pieces)
    chunks = split_text(text, kind, limit, count_bytes)
    end = 0
    for chunk in chunks:
        assert text[chunk.start : chunk.end] == chunk.text
        assert chunk.text.strip()
        assert count_bytes(chunk.text) <= limit
        assert not text[end : chunk.start].strip()  # only white space may be lost, and nothing may be repeated
        end = chunk.end
    assert not text[end:].strip()


@settings(max_examples=50)
@given(
    text=st.text(st.characters(exclude_categories=["Cs"]), max_size=200),
    limit=st.integers(MIN_CHUNK_TOKENS, 40),
    kind=st.sampled_from(TOKENIZER_KINDS),
)
def test_chunks_fit_the_limit_in_tokens_of_any_tokenizer(text: str, limit: int, kind: str):
    encoder = PlainEncoder(tokenizer(kind))

    def count(text: str) -> int:
        return len(encoder.encode(text))

    for chunk in split_text(text, "text", limit, count):
        assert text[chunk.start : chunk.end] == chunk.text
        assert count(chunk.text) <= limit


def test_chunk_size_below_one_character_is_rejected():
    with pytest.raises(InvalidInputError, match="at least 8"):
        open_index(chunk_tokens=7)
