"""Finds the gold passage of a question: the one that came with it, or the best one in the corpus that has the answer.

It is cut to size around the answer. For rows that share their passages, it is taken from the pool unchanged.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from ..errors import InvalidInputError
from .formats import Example
from .mining import MatchText, Pool, Ranking, text_key
from .recipe import BETWEEN_PIECES, NO_GOLD, NOT_FOUND, NOT_IN_CONTEXT, SEVERAL_GOLDS, TOO_LONG, DroppedError
from .rows import Passage
from .windows import Fits, Span, cut_around, find_answer, split_passage

SEARCHED_FOR_GOLD = 100  # passages searched for a question that came without a context


@dataclass(frozen=True, slots=True)
class Gold:
    """The passage that a question is answered from.

    Attributes:
        passage: passage cut to size around the answer, or a piece from the pool.
        key: key of its uncut text.
        numbers: numbers of the pool's passages that were cut from the same text.
        answers: all accepted answers, those in the passage first.
        span: span of the first answer in the passage, if known.
        number: number of the passage in the pool, if it is from there.
        found: whether it was found in the corpus, because it did not come with the question.
    """

    passage: Passage
    key: bytes
    numbers: tuple[int, ...]
    answers: tuple[str, ...]
    span: Span | None
    number: int | None = None
    found: bool = False


class GoldFinder:
    """Finds the gold passages of questions.

    Args:
        rankings: rankings by the name of their source. The first of "bm25" and "dense" searches for questions without
            a context.
        fits: function that takes a title and returns whether a text fits into a passage with it.
    """

    def __init__(self, pool: Pool, rankings: Mapping[str, Ranking], fits: Callable[[str | None], Fits]) -> None:
        self._pool, self._rankings, self._fits = pool, rankings, fits

    def find(self, example: Example, answers: list[MatchText], rng: random.Random, *, cut: bool) -> Gold:
        """Return the gold passage of ``example``.

        Args:
            answers: the answers of ``example``, prepared for matching.
            cut: cut the passage around the answer; otherwise it is a piece from the pool, unchanged.

        Raises:
            DroppedError: there is not exactly one gold passage, or the answer is not in it.
            InvalidInputError: the question has no context, and no ranking can search for one.
        """
        if len(example.golds) > 1:
            raise DroppedError(SEVERAL_GOLDS)
        if not example.golds:
            if example.others:
                raise DroppedError(NO_GOLD)
            return self._search_corpus(example, answers, rng)
        contained, start = self._contained_answers(example, answers)
        ordered = _contained_first(example.answers, contained)
        if cut:
            return self._cut(example.golds[0], ordered, start, answers[contained[0]], rng)
        return self._piece(example.golds[0], ordered, start, answers[contained[0]])

    def _contained_answers(self, example: Example, answers: list[MatchText]) -> tuple[list[int], int | None]:
        """Return which answers are in the file's gold passage, and the start of the first one if the file gives it."""
        text, start = example.golds[0].text, example.answer_start
        literal = start is not None and start >= 0 and text.startswith(example.answers[0], start)
        literal = literal and not answers[0].blank
        match = MatchText.of(text)
        contained = [n for n, answer in enumerate(answers) if (n == 0 and literal) or match.holds([answer])]
        if not contained:
            raise DroppedError(NOT_IN_CONTEXT)
        return contained, start if contained[0] == 0 else None

    def _cut(
        self, whole: Passage, answers: tuple[str, ...], start: int | None, match: MatchText, rng: random.Random
    ) -> Gold:
        """Return as much of the passage around the answer as fits."""
        fits = self._fits(whole.title)
        span = find_answer(whole.text, [answers[0]], start)
        if span is None:  # the passage contains the answer only in normalised form
            pieces = split_passage(whole.text, fits)
            text = next((piece for piece in pieces if MatchText.of(piece).holds([match])), None)
        else:
            window = cut_around(whole.text, span, fits, rng)
            text = whole.text[slice(*window)] if window else None
            span = (span[0] - window[0], span[1] - window[0]) if window else None
        if text is None:
            raise DroppedError(TOO_LONG)
        key = text_key(whole.text)
        return Gold(Passage(text, whole.title, True), key, self._pool.numbers(key), answers, span)

    def _piece(self, whole: Passage, answers: tuple[str, ...], start: int | None, match: MatchText) -> Gold:
        """Return the pool's piece of the passage that contains the answer."""
        key = text_key(whole.text)
        numbers = self._pool.numbers(key)
        places = [_place_in(self._pool.passages[n].text, whole.text, start, len(answers[0])) for n in numbers]
        # A given start is trusted, even within a word. Without one, or if it is in no piece, whole words are compared.
        for number, place in sorted(zip(numbers, places, strict=True), key=lambda one: one[1] is None):
            piece = self._pool.passages[number]
            if place is not None or self._pool.matches[number].holds([match]):
                span = find_answer(piece.text, [answers[0]], place)
                return Gold(replace(piece, gold=True), key, numbers, answers, span, number)
        raise DroppedError(BETWEEN_PIECES)

    def _search_corpus(self, example: Example, answers: list[MatchText], rng: random.Random) -> Gold:
        """Return the best passage of the corpus that contains an answer, by the first ranking that reads questions."""
        ranking = next((one for name, one in self._rankings.items() if name in ("bm25", "dense")), None)
        if ranking is None:
            raise InvalidInputError(
                f"{example.where} has no context, and random negatives cannot find one for it; add bm25 or dense."
            )
        for number in itertools.islice(ranking.rank(example.question, rng), SEARCHED_FOR_GOLD):
            match = self._pool.matches[number]
            contained = [n for n, answer in enumerate(answers) if match.holds([answer])]
            if contained:
                found, ordered = self._pool.passages[number], _contained_first(example.answers, contained)
                span = find_answer(found.text, [ordered[0]])
                gold = replace(found, gold=True)
                return Gold(gold, text_key(found.text), (number,), ordered, span, number, found=True)
        raise DroppedError(NOT_FOUND)


def _place_in(piece: str, whole: str, start: int | None, length: int) -> int | None:
    """Return the offset in ``piece`` of the ``length`` characters at ``start`` in ``whole``, or None."""
    if start is None:
        return None
    begin = whole.find(piece, max(0, start + length - len(piece)), start + len(piece))
    return None if begin < 0 else start - begin


def _contained_first(answers: tuple[str, ...], contained: list[int]) -> tuple[str, ...]:
    """Return ``answers`` with those numbered in ``contained`` first, otherwise in order."""
    return tuple(answers[n] for n in sorted(range(len(answers)), key=lambda n: (n not in contained, n)))
