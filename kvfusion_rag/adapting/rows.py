"""Questions with their passage and negatives from the same documents, as rows that the trainer reads."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace

from ..data.mining import FILLED, BM25Ranking, MatchText, RandomRanking, take_turns
from ..data.rows import Passage, QARow


class NegativeMiner:
    """Finds negatives in a pool of passages by BM25, and by chance where those run out.

    Args:
        seed: of the chance; each question draws its own.
    """

    def __init__(self, passages: Sequence[Passage], seed: int) -> None:
        self._passages, self._seed = passages, seed
        self._matches = [MatchText.of(f"{passage.title or ''} {passage.text}") for passage in passages]
        self._bm25, self._chance = BM25Ranking(passages), RandomRanking(len(passages))

    def best(self, question: str) -> int | None:
        """The number of the passage that BM25 ranks first; None if none shares a word with the question."""
        return next(self._bm25.rank(question, random.Random(self._seed)), None)

    def negatives(self, question: str, answer: str, gold: int, count: int) -> list[Passage]:
        """Up to ``count`` passages for a question, the likeliest first, that do not hold the answer."""
        rng, wanted = random.Random(f"{self._seed} {question}"), [MatchText.of(answer)]
        rankings = {"bm25": self._bm25.rank(question, rng), FILLED: self._chance.rank(question, rng)}
        chosen = take_turns(count, rankings, {gold}, lambda number: self._matches[number].holds(wanted))
        return [self._passages[number] for number in chosen]


def make_row(number: int, question: str, answer: str, gold: Passage, negatives: Sequence[Passage], seed: int) -> QARow:
    """A row with its passages in an order drawn by ``seed``."""
    passages = [replace(gold, gold=True), *negatives]
    random.Random(f"{seed} {question}").shuffle(passages)
    return QARow(str(number), question, (answer,), tuple(passages))


def number_of_documents(question: str, most: int, seed: int) -> int:
    """How many documents a training row has, from 1 to ``most``; the larger numbers more often."""
    rng = random.Random(f"{seed} {question} documents")
    return max(rng.randint(1, most), rng.randint(1, most))
