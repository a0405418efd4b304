"""Scores of passages as a retriever would give them, for systems that weigh them (focus)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from ..qa import Passage, QARow

if TYPE_CHECKING:
    from ..retrieval import Embedder


def with_scores(rows: Sequence[QARow], embedder: Embedder) -> Iterator[QARow]:
    """The rows with the cosine similarity of question and passage (title and text) as each passage's score."""
    texts = sorted({_text(passage) for row in rows for passage in row.passages})
    place = {text: number for number, text in enumerate(texts)}
    vectors = embedder.embed_documents(texts)
    questions = embedder.embed_questions([row.question for row in rows])
    for row, question in zip(rows, questions, strict=True):
        scores = vectors[[place[_text(passage)] for passage in row.passages]] @ question
        scored = zip(row.passages, scores, strict=True)
        yield replace(row, passages=tuple(replace(passage, score=float(score)) for passage, score in scored))


def _text(passage: Passage) -> str:
    return f"{passage.title}\n{passage.text}" if passage.title else passage.text
