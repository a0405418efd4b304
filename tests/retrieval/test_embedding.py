"""The real embedding model, and the example questions."""

from __future__ import annotations

import json
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from indexes import EXAMPLES, LIGHTHOUSE, count_words, load_minilm

from kvfusion_rag import RetrievalError
from kvfusion_rag.retrieval import DocumentIndex, SentenceTransformerEmbedder, read_document
from kvfusion_rag.retrieval.loaders import KINDS


@pytest.fixture
def minilm() -> SentenceTransformerEmbedder:
    return load_minilm()


def example_questions() -> list[dict]:
    return [json.loads(line) for line in (EXAMPLES / "questions.jsonl").read_text(encoding="utf-8").splitlines()]


def test_example_documents_contain_the_answers():
    rows = example_questions()
    assert len(rows) >= 12
    assert {row["source"] for row in rows} == {path.name for path in LIGHTHOUSE.iterdir() if path.suffix in KINDS}
    for row in rows:
        text = " ".join(read_document(LIGHTHOUSE / row["source"]).text.split())
        assert any(answer in text for answer in row["answers"]), row


def test_example_questions_find_their_documents(minilm):
    with DocumentIndex(count_tokens=count_words, chunk_tokens=150, embedder=minilm) as index:
        assert not index.update(LIGHTHOUSE).skipped
        for row in example_questions():
            assert row["source"] in [d.metadata["file"] for d in index.search(row["question"], 5)]


@pytest.mark.slow
@pytest.mark.default_model
def test_default_model_answers_example_questions(default_model):
    rows = example_questions()
    texts = [read_document(LIGHTHOUSE / row["source"]).text for row in rows]
    answers = [
        default_model.answer(row["question"], [text], max_new_tokens=32).text
        for row, text in zip(rows, texts, strict=True)
    ]
    right = [
        any(right.casefold() in answer.casefold() for right in row["answers"])
        for row, answer in zip(rows, answers, strict=True)
    ]
    assert sum(right) > len(rows) / 2, answers


def test_vectors_have_unit_length_and_a_stable_fingerprint(minilm):
    vectors = minilm.embed_documents(["a lighthouse", "a whale"])
    assert vectors.dtype == np.float32
    assert vectors.shape == (2, 384)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, rtol=1e-5)
    np.testing.assert_allclose(minilm.embed_question("a whale"), vectors[1], atol=1e-6)
    together = minilm.embed_questions(["a whale", "why does a lamp burn so long in winter?"])
    np.testing.assert_allclose(together[0], vectors[1], atol=1e-6)
    assert SentenceTransformerEmbedder(device="cpu").fingerprint == minilm.fingerprint


def test_chunks_longer_than_the_embedding_model_reads_are_reported(minilm, caplog):
    minilm.embed_documents(["short", "word " * 400])
    assert "1 of 2 chunks are longer than the 256 tokens" in caplog.text


def test_invalid_embedding_model_raises_an_error(tmp_path):
    with pytest.raises(RetrievalError, match="cannot be loaded"):
        SentenceTransformerEmbedder(tmp_path)


def test_threads_can_share_an_embedder(minilm):
    """Its tokenizer has one setting of padding and truncation, which embedding changes."""

    def embed(number: int) -> np.ndarray:
        if number % 2:
            return minilm.embed_questions(["who? " * (number % 50 + 1), "what?"])
        return minilm.embed_documents(["text " * 9, "x"])

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(8) as pool:
            assert all(vectors.shape == (2, 384) for vectors in pool.map(embed, range(200)))
    finally:
        sys.setswitchinterval(interval)
