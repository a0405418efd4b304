"""Builds rows for the trainer from questions, their passages and negatives from the same documents."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace

from ..data.mining import FILLED, BM25Ranking, MatchText, RandomRanking, take_turns
from ..data.rows import Passage, QARow


class NegativeMiner:
    """Finds negatives in a pool of passages by BM25, and random ones when those are exhausted.

    Args:
        seed: seed of the random ones, combined with each question.
    """

    def __init__(self, passages: Sequence[Passage], seed: int) -> None:
        self._passages, self._seed = passages, seed
        self._matches = [MatchText.of(f"{passage.title or ''} {passage.text}") for passage in passages]
        self._bm25, self._random = BM25Ranking(passages), RandomRanking(len(passages))

    def best(self, question: str) -> int | None:
        """Return the number of the passage that BM25 ranks first, or None if none shares a word with the question."""
        return next(self._bm25.rank(question, random.Random(self._seed)), None)

    def negatives(self, question: str, answer: str, gold: int, count: int) -> list[Passage]:
        """Return up to ``count`` passages that do not contain the answer, the most similar to the question first."""
        rng, answers = random.Random(f"{self._seed} {question}"), [MatchText.of(answer)]
        rankings = {"bm25": self._bm25.rank(question, rng), FILLED: self._random.rank(question, rng)}
        chosen = take_turns(count, rankings, {gold}, lambda number: self._matches[number].holds(answers))
        return [self._passages[number] for number in chosen]


def make_row(number: int, question: str, answer: str, gold: Passage, negatives: Sequence[Passage], seed: int) -> QARow:
    """Return a row with its passages in an order drawn by ``seed``."""
    passages = [replace(gold, gold=True), *negatives]
    random.Random(f"{seed} {question}").shuffle(passages)
    return QARow(str(number), question, (answer,), tuple(passages))


def number_of_documents(question: str, most: int, seed: int) -> int:
    """Return the number of documents of a training row, from 1 to ``most``, all equally often.

    Rows with one document keep the adapter close to the base model where focus leaves only one.
    """
    return random.Random(f"{seed} {question} documents").randint(1, most)
