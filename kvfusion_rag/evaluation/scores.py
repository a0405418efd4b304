"""Scores of passages as a retriever gives them, for systems that use them (focus)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from ..data.rows import Passage, QARow
from ..retrieval.embedding import embed_in_steps
from ..schema import Document

if TYPE_CHECKING:
    from ..retrieval import Embedder


def with_scores(rows: Sequence[QARow], embedder: Embedder, *, progress: bool = False) -> Iterator[QARow]:
    """Yield the rows with each passage's cosine similarity to the question as its score (title and text)."""
    found = similarities([row.question for row in rows], [row.passages for row in rows], embedder, progress=progress)
    for row, scores in zip(rows, found, strict=True):
        scored = zip(row.passages, scores, strict=True)
        yield replace(row, passages=tuple(replace(passage, score=score) for passage, score in scored))


def similarities(
    questions: Sequence[str],
    texts: Sequence[Sequence[Passage | Document]],
    embedder: Embedder,
    *,
    progress: bool = False,
) -> Iterator[list[float]]:
    """Yield the cosine similarities of each question to its own texts. Equal texts are embedded once."""
    distinct = sorted({_text(one) for row in texts for one in row})
    index = {text: number for number, text in enumerate(distinct)}
    vectors = embed_in_steps(embedder, distinct, progress=progress)
    for question, row in zip(embedder.embed_questions(questions), texts, strict=True):
        yield (vectors[[index[_text(one)] for one in row]] @ question).tolist()


def _text(one: Passage | Document) -> str:
    return f"{one.title}\n{one.text}" if one.title else one.text
