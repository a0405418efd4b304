"""Builds groups of rows that share one set of passages, so that training prefills and fuses it once for all of them.

A set is the gold passage of a question and passages similar to it. Every question whose gold passage is in the set
joins the group, unless another passage of the set contains one of its answers. Such a question waits for another
group.
"""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

from .formats import Example
from .golds import Gold
from .mining import FILLED, MatchText, Pool, Ranking, take_turns
from .recipe import SMALL_GROUP, TOO_FEW, DataOptions, DataReport
from .rows import QARow
from .windows import evidence_of

NEIGHBOURHOOD = 5  # a set is chosen from this many times its size of nearest passages


@dataclass(frozen=True, slots=True)
class GroupQuestion:
    """A question that can be asked over any set of passages with its gold passage.

    Attributes:
        number: number of its gold passage in the pool.
        barred: numbers of passages that answer it too, or were cut from the same text as its gold passage.
        matches: its answers, prepared for matching.
    """

    example: Example
    gold: Gold
    number: int
    barred: frozenset[int]
    matches: tuple[MatchText, ...]


class Grouping:
    """Builds groups from all questions.

    Args:
        rankings: rankings of the pool by the name of their source, including the random one, which fills up a set.
        report: counts rows, groups and dropped questions.
    """

    def __init__(
        self,
        questions: Iterable[GroupQuestion],
        pool: Pool,
        rankings: Mapping[str, Ranking],
        options: DataOptions,
        report: DataReport,
    ) -> None:
        self._pool, self._rankings, self._options, self._report = pool, rankings, options, report
        self._waiting: defaultdict[int, list[GroupQuestion]] = defaultdict(list)
        for question in questions:
            self._waiting[question.number].append(question)

    def rows(self) -> Iterator[QARow]:
        """Yield the rows group by group. A question is in one group at most."""
        for number in list(self._waiting):
            if number in self._waiting:  # false if all its questions have joined other groups
                yield from self._group(number)

    def _group(self, number: int) -> list[QARow]:
        """Return the rows of the group around passage ``number``, for its waiting questions and those that join."""
        seeds = self._waiting.pop(number)
        rng = random.Random(f"{self._options.seed}/group {number}")
        chosen = self._nearest(number, seeds, rng)
        if chosen is None:
            for question in seeds:
                self._report.drop(question.example, TOO_FEW, strict=self._options.strict)
            return []
        slots = [number, *chosen]
        joined = list(seeds)
        for other in chosen:
            for question in self._waiting.pop(other, []):
                if self._suits(question, slots):
                    joined.append(question)
                else:
                    self._report.passed_over += 1
                    self._waiting[other].append(question)
        if len(joined) < self._options.group_questions:
            for question in joined:
                self._report.drop(question.example, SMALL_GROUP, strict=self._options.strict)
            return []
        self._report.groups += 1
        self._report.negatives += Counter(chosen.values())
        rng.shuffle(slots)
        return [self._row(question, slots) for question in joined]

    def _nearest(self, number: int, seeds: list[GroupQuestion], rng: random.Random) -> dict[int, str] | None:
        """Return passages near ``number`` that answer none of ``seeds``, with their sources, or None if too few.

        From a wider neighbourhood, passages with waiting questions are preferred. Otherwise the same nearest passages
        would be used repeatedly after their own questions are done, and most groups would have one question.
        """
        size = self._options.passages[0] - 1
        taken = {number}.union(*(question.barred for question in seeds))
        answers = list(dict.fromkeys(match for question in seeds for match in question.matches))

        def take(count: int, names: Iterable[str]) -> dict[int, str]:
            rankings = {name: self._rankings[name].near(number, rng) for name in names}
            return take_turns(count, rankings, taken, lambda n: self._pool.shows(n, answers))

        near = take(NEIGHBOURHOOD * size, [name for name in self._rankings if name != FILLED])
        chosen = dict(sorted(near.items(), key=lambda item: item[0] not in self._waiting)[:size])
        chosen |= take(size - len(chosen), [FILLED])
        return chosen if len(chosen) == size else None

    def _suits(self, question: GroupQuestion, slots: list[int]) -> bool:
        """Return whether its gold passage is the only passage of the set that answers it."""
        others = [n for n in slots if n != question.number]
        return not (question.barred.intersection(others) or any(self._pool.shows(n, question.matches) for n in others))

    def _row(self, question: GroupQuestion, slots: list[int]) -> QARow:
        gold, example = question.gold, question.example
        passages = tuple(replace(self._pool.passages[n], gold=n == question.number) for n in slots)
        evidence = evidence_of(gold.passage.text, gold.span) if gold.span else None
        self._report.kept += 1
        self._report.gold_found += gold.found
        self._report.evidence += evidence is not None
        return QARow(example.id, example.question, gold.answers, passages, evidence)
