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


LONG_RUNS = [
    "a",
    "灯塔守护人每天晚上走到港口",
    " ",
    "\n",
    "x\n",
    "word ",
    "A. ",
    "👩‍🚀",
    "e\u0301",
    "- ",
    "# ",
    "> ",
    "```\n",
    "|a",
    "[",
    "*a ",
]


@pytest.mark.parametrize("kind", ["text", "markdown"])
@pytest.mark.parametrize("unit", LONG_RUNS)
def test_counted_characters_grow_in_step_with_the_text(unit: str, kind: Kind):
    """Counting tokens takes nearly all the time of splitting."""

    def counted(size: int) -> int:
        total = 0

        def count(text: str) -> int:
            nonlocal total
            total += len(text)
            return (len(text.encode()) + 3) // 4

        text = unit * (size // len(unit))
        chunks = split_text(text, kind, 32, count)
        assert "".join(chunk.text for chunk in chunks).replace("\n", "").replace(" ", "") == "".join(text.split())
        return total

    large = counted(120_000)
    assert large <= 5 * counted(30_000) + 30_000
    assert large <= 60 * 120_000


def test_windows_do_not_change_the_chunks_of_prose(monkeypatch):
    text = "".join(
        f"The keeper {n} walks down. The lamp burns{' all night' * (n % 5)}.{chr(10) * (n % 4)} " for n in range(900)
    )
    in_windows = split_text(text, "text", 64, count_bytes)
    monkeypatch.setattr("kvfusion_rag.retrieval.splitting.MIN_WINDOW", len(text))
    assert split_text(text, "text", 64, count_bytes) == in_windows


def test_huge_chunk_size_is_accepted():
    assert [chunk.text for chunk in split_text("A. B.", "text", 10**30, count_bytes)] == ["A. B."]


def test_chunk_size_below_one_character_is_rejected():
    with pytest.raises(InvalidInputError, match="at least 8"):
        open_index(chunk_tokens=7)
