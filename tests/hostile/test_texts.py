"""What models write and what documents contain: citations, reasoning and pieces of long documents of any text."""

from __future__ import annotations

import pytest
import tiny
from fuzzing import TEXTS, examples, ours
from growth import growth_of_time
from hypothesis import given
from hypothesis import strategies as st

from kvfusion_rag import Document
from kvfusion_rag.text.citations import find_citations, find_shared_phrases
from kvfusion_rag.text.encoder import PlainEncoder, TextDocuments
from kvfusion_rag.text.splitting import encode_up_to, split_document
from tests.text.test_reasoning import TOKENIZERS, start_of

PARTS = st.sampled_from(
    ["the ", "mill", "Mill", "é", "e\u0301", "ß", "ﬁ", "東", "1874", "_", "-", " ", "\n", "İ", "\ud800"]
)
PLAIN = PlainEncoder(tiny.tokenizer("byte-bpe"))
PHRASES = st.lists(PARTS, max_size=14).map("".join)


@examples(80)
@given(PHRASES | TEXTS, st.lists(PHRASES | TEXTS, max_size=3), PHRASES)
def test_citations_are_places_in_their_documents(answer, texts, question):
    documents = [(str(n), Document(text)) for n, text in enumerate(texts)]
    for found in (find_citations(answer, documents), find_shared_phrases(answer, question, documents)):
        assert all(texts[int(one.document_id)][one.start : one.end] == one.text for one in found)
        assert len(found) <= len(texts) and all(one.start < one.end for one in found)


def longest_run(words: list[str], text: list[str], known: set[str]) -> int:
    """Return the length of the longest run of words with a new one, by comparing all runs."""
    runs = {tuple(text[a:b]) for a in range(len(text)) for b in range(a + 1, len(text) + 1)}
    own = {tuple(words[a:b]) for a in range(len(words)) for b in range(a + 1, len(words) + 1)}
    return max((len(run) for run in runs & own if any(w not in known and len(w) >= 4 for w in run)), default=0)


@examples(60)
@given(st.lists(st.sampled_from(["mill", "river", "old", "lamp"]), max_size=8), st.lists(st.sampled_from(
    ["mill", "river", "old", "lamp"]), max_size=12))  # fmt: skip
def test_shared_phrase_is_the_longest_of_all(words, text):
    found = find_shared_phrases(" ".join(words), "the river", [("d", Document(" ".join(text)))])
    longest = longest_run(words, text, {"the", "river"})
    assert [len(one.text.split()) for one in found] == ([longest] if longest >= 2 else [])


def test_time_of_phrases_depends_on_the_words_that_are_shared():
    documents = [("d", Document("some other words of a long report " * 4_000))]
    assert growth_of_time(lambda size: find_shared_phrases("nobody knows that here " * size, "", documents), 20) < 2


@pytest.mark.parametrize("name", TOKENIZERS)
@examples(25)
@given(data=st.data())
def test_reader_of_reasoning_reads_any_tokens(name, data):
    prompt = data.draw(
        st.sampled_from(["<|start|>assistant", "<|start|>x<|channel|>", "assistant\n<think>\n", "a", ""])
    )
    start = start_of(name, prompt)
    if start is None:
        return
    reader, added = start.reader(), 0
    tokens = data.draw(st.lists(st.integers(0, len(TOKENIZERS[name]) - 1), max_size=40))
    for token in tokens:
        if reader.stage == "answer":
            break
        added += len(reader.read(token))
        assert len(reader.held) <= 16 and len(reader.closing()) <= 60
    assert added <= 4 * len(tokens)


@examples(40)
@given(PHRASES | st.text(st.characters(), max_size=200), st.integers(12, 40), st.none() | TEXTS)
def test_pieces_of_a_document_fit_and_lose_nothing(text, limit, title):
    encoder = TextDocuments(PLAIN, separator="\n\n", titles=True, continues=False)
    document = Document(text, title=title)
    pieces = ours(lambda: list(split_document(encoder, document, limit, 10**6)))
    assert pieces is None or all(0 < len(piece) <= limit for piece in pieces)
    whole = encode_up_to(encoder, document, limit)
    assert whole is None or len(whole) <= limit
