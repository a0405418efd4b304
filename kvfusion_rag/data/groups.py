"""Rows in groups that share one set of passages, so that training prefills and fuses it once for all their questions.

A set is the gold passage of a question and passages near to it. Every question whose gold passage is in the set joins
it, unless another passage there holds an answer of it: such a question waits for a set of its own. Knows texts and
answers, neither files nor models.
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

NEIGHBOURHOOD = 5  # times the size of a set: how many of the nearest passages it is chosen from


@dataclass(frozen=True, slots=True)
class GroupQuestion:
    """A question that can be asked over any set of passages with its gold one in it.

    Attributes:
        number: of its gold passage in the pool.
        barred: numbers of passages that answer it too, or belong to the same text as its gold one.
        matches: its answers, ready to look for.
    """

    example: Example
    gold: Gold
    number: int
    barred: frozenset[int]
    matches: tuple[MatchText, ...]


class Grouping:
    """Makes groups out of all questions together.

    Args:
        rankings: of the pool, by the name of their source, with the one of chance that fills up.
        report: is told of rows, groups and what was left out.
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
        """Rows of one group after the other; each question in one of them at most."""
        for number in list(self._waiting):
            if number in self._waiting:  # and its questions have not all joined another group
                yield from self._group(number)

    def _group(self, number: int) -> list[QARow]:
        """The set around passage ``number``, which suits all questions that still wait for it, and who joins it."""
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
        """Passages near to ``number`` that answer none of ``seeds``, each with its source; None if there are too few.

        Of a wider neighbourhood those come first that questions wait for. Otherwise the nearest of all would be taken
        again and again, when their own questions have long been asked, and most groups would be of one question.
        """
        wanted = self._options.passages[0] - 1
        taken = {number}.union(*(question.barred for question in seeds))
        answers = list(dict.fromkeys(match for question in seeds for match in question.matches))

        def take(count: int, names: Iterable[str]) -> dict[int, str]:
            rankings = {name: self._rankings[name].near(number, rng) for name in names}
            return take_turns(count, rankings, taken, lambda n: self._pool.shows(n, answers))

        near = take(NEIGHBOURHOOD * wanted, [name for name in self._rankings if name != FILLED])
        chosen = dict(sorted(near.items(), key=lambda item: item[0] not in self._waiting)[:wanted])
        chosen |= take(wanted - len(chosen), [FILLED])
        if len(chosen) < wanted:
            return None
        return chosen

    def _suits(self, question: GroupQuestion, slots: list[int]) -> bool:
        """Whether its gold passage is the only one of the set that answers it."""
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
