"""Builds training rows: one gold passage among negatives without an answer. This is the paper's recipe without its
judges.

Rows come in the order of their questions, or in groups that share their passages (``groups``). The same input, options
and seed give the same bytes.
"""

from __future__ import annotations

import itertools
import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from ..errors import InvalidInputError
from ..retrieval.embedding import Embedder
from .exclusion import Exclusion
from .formats import Example
from .golds import Gold, GoldFinder
from .groups import Grouping, GroupQuestion
from .mining import (
    FILLED,
    BM25Ranking,
    DenseRanking,
    MatchText,
    Pool,
    RandomRanking,
    Ranking,
    shows_answer,
    take_turns,
    text_key,
)
from .recipe import (  # fmt: skip
    EXCLUDED_CONTEXT,
    EXCLUDED_QUESTION,
    REPEATED,
    TOO_FEW,
    UNANSWERABLE_IN_GROUP,
    DataOptions,
    DataReport,
    DroppedError,
)
from .rows import Passage, QARow
from .windows import Fits, evidence_of, split_passage

Made = TypeVar("Made")

PREPARED = 256  # number of questions for which the rankings prepare together


class DataBuilder:
    """Turns questions into training rows.

    Args:
        examples: function that returns all questions in the same order. It is called twice, so that they need not fit
            into memory.
        corpus: source of negatives, and of gold passages for questions without context; None for the questions' own
            passages.
        exclude: evaluation questions and contexts that must not be in a row. Truncated contexts are found too.
        count_tokens: required for ``max_tokens``.
        embedder: required for negatives "dense".
        progress: whether the embedding of the pool shows its progress.

    Raises:
        InvalidInputError: there are too few passages for rows of the given size, or a required argument is missing.
    """

    def __init__(
        self,
        examples: Callable[[], Iterable[Example]],
        options: DataOptions,
        *,
        corpus: Iterable[Passage] | None = None,
        exclude: Iterable[Example] = (),
        count_tokens: Callable[[str], int] | None = None,
        embedder: Embedder | None = None,
        progress: bool = False,
    ) -> None:
        if options.max_tokens is not None and count_tokens is None:
            raise InvalidInputError(
                "max_tokens is set, but count_tokens is missing; pass a function that counts the tokens of a text."
            )
        if "dense" in options.negatives and embedder is None:
            raise InvalidInputError("negatives has 'dense', but embedder is missing; pass one to compute vectors.")
        self.report = DataReport()
        self._examples, self._options, self._count_tokens = examples, options, count_tokens
        self._exclusion = Exclusion(exclude)
        self._own_corpus = corpus is None
        self._contexts_of: dict[bytes, set[bytes]] = {}
        self._pool = self._make_pool(corpus)
        self._check_size()
        self._rankings = self._make_rankings(embedder, progress)
        self._golds = GoldFinder(self._pool, self._rankings, self._fits)

    def rows(self) -> Iterator[QARow]:
        """Yield one row for each usable question, in order or group by group.

        Raises:
            InvalidInputError: a question is not usable and ``strict`` is set. Names its place and the cause.
        """
        if self._options.grouped:
            questions = self._each(self._group_question)
            yield from Grouping(questions, self._pool, self._rankings, self._options, self.report).rows()
        else:
            for row in self._each(self._row):
                self.report.kept += 1
                yield row

    def _each(self, make: Callable[[Example, random.Random, set[tuple[bytes, bytes]]], Made]) -> Iterator[Made]:
        """Yield what ``make`` returns for each usable question, and count the others."""
        seen: set[tuple[bytes, bytes]] = set()
        numbered = enumerate(self._examples())
        while chunk := list(itertools.islice(numbered, PREPARED)):
            self._prepare([example for _, example in chunk])
            for number, example in chunk:
                self.report.read += 1
                try:
                    yield make(example, random.Random(f"{self._options.seed}/{number}"), seen)
                except DroppedError as dropped:
                    self.report.drop(example, str(dropped), strict=self._options.strict)

    def _prepare(self, examples: list[Example]) -> None:
        """Let the rankings prepare for the questions that need one."""
        ranked = [e.question for e in examples if e.answers and not (self._options.grouped and e.golds)]
        for ranking in self._rankings.values():
            ranking.prepare(list(dict.fromkeys(ranked)))

    # The pool

    def _make_pool(self, corpus: Iterable[Passage] | None) -> Pool:
        """Collect distinct passages that are not excluded, cut to size."""
        pool = Pool()
        excluded: set[bytes] = set()
        for passage in itertools.chain(self._own_passages(needed=corpus is None), corpus or ()):
            key = text_key(passage.text)
            if self._exclusion.has_context(key, passage.text):
                excluded.add(key)
            elif key not in pool:
                pool.add(key, self._pieces(passage))
        self.report.pool, self.report.pool_excluded = len(pool), len(excluded)
        return pool

    def _own_passages(self, *, needed: bool) -> Iterator[Passage]:
        """Yield the questions' own passages if they are ``needed``, and record the gold contexts of each question.

        Groups are built around gold passages, which are therefore always in the pool.
        """
        for example in self._examples():
            if needed and not example.passages:
                raise InvalidInputError(
                    f"{example.where} has no context, and there is no corpus to find its passage in; add a corpus."
                )
            # A passage that answers a question in one place must not be a negative for it in another.
            if keys := {text_key(passage.text) for passage in example.golds}:
                self._contexts_of.setdefault(text_key(example.question), set()).update(keys)
            if needed:
                yield from example.passages
            elif self._options.grouped:
                yield from example.golds

    def _pieces(self, passage: Passage) -> list[Passage]:
        if self._options.max_tokens is None:
            return [Passage(passage.text, passage.title)]
        return [Passage(text, passage.title) for text in split_passage(passage.text, self._fits(passage.title))]

    def _fits(self, title: str | None) -> Fits:
        count, most = self._count_tokens, self._options.max_tokens
        return lambda text: count is None or most is None or count(f"{title}\n{text}" if title else text) <= most

    def _check_size(self) -> None:
        most, size = self._options.passages[1], len(self._pool)
        outside = not (self._own_corpus or self._options.grouped)  # the gold passage may come from outside the corpus
        if not size or most > size + outside:
            excluded = self.report.pool_excluded
            raise InvalidInputError(
                f"passages is {most}, but the corpus has {size} distinct passages"
                f"{f' (and {excluded} excluded ones)' if excluded else ''}; ask for fewer or add a corpus."
            )

    def _make_rankings(self, embedder: Embedder | None, progress: bool) -> dict[str, Ranking]:
        rankings: dict[str, Ranking] = {}
        for name in self._options.negatives:
            if name == "bm25":
                rankings[name] = BM25Ranking(self._pool.passages)
            elif name == "dense" and embedder is not None:
                rankings[name] = DenseRanking(self._pool.passages, embedder, progress=progress)
            else:
                rankings[name] = RandomRanking(len(self._pool))
        return rankings | {FILLED: RandomRanking(len(self._pool))}

    # One row

    def _row(self, example: Example, rng: random.Random, seen: set[tuple[bytes, bytes]]) -> QARow:
        count = rng.randint(*self._options.passages)
        without_gold = rng.random() < self._options.no_gold
        question = text_key(example.question)
        self._refuse_excluded(example, question)
        answers = [MatchText.of(answer) for answer in example.answers]
        gold = self._golds.find(example, answers, rng, cut=True) if answers else None
        context = gold.key if gold else text_key(" ".join(passage.text for passage in example.others))
        if (question, context) in seen:
            raise DroppedError(REPEATED)
        seen.add((question, context))
        passages = [gold.passage] if gold and not without_gold else []
        passages += self._negatives(example, gold, answers, count - len(passages), rng)
        rng.shuffle(passages)
        if gold is None or without_gold:
            self.report.unanswerable += gold is None
            self.report.no_gold += gold is not None
            return QARow(example.id, example.question, (), tuple(passages))
        evidence = evidence_of(gold.passage.text, gold.span) if gold.span else None
        self.report.gold_found += gold.found
        self.report.evidence += evidence is not None
        return QARow(example.id, example.question, gold.answers, tuple(passages), evidence)

    def _group_question(self, example: Example, rng: random.Random, seen: set[tuple[bytes, bytes]]) -> GroupQuestion:
        """Return a question with its gold passage in the pool, ready to be put into a group."""
        question = text_key(example.question)
        self._refuse_excluded(example, question)
        if not example.answers:
            raise DroppedError(UNANSWERABLE_IN_GROUP)
        answers = [MatchText.of(answer) for answer in example.answers]
        gold = self._golds.find(example, answers, rng, cut=False)
        if (question, gold.key) in seen:
            raise DroppedError(REPEATED)
        seen.add((question, gold.key))
        number = gold.number
        assert number is not None, "a gold passage that is not cut comes from the pool"
        barred = {n for key in self._contexts_of.get(question, ()) for n in self._pool.numbers(key)} | {*gold.numbers}
        return GroupQuestion(example, gold, number, frozenset(barred - {number}), tuple(answers))

    def _refuse_excluded(self, example: Example, question: bytes) -> None:
        if self._exclusion.has_question(question):
            raise DroppedError(EXCLUDED_QUESTION)
        own = example.golds or (() if example.answers else example.others)
        if any(self._exclusion.has_context(text_key(passage.text), passage.text) for passage in own):
            raise DroppedError(EXCLUDED_CONTEXT)

    def _negatives(
        self, example: Example, gold: Gold | None, answers: list[MatchText], count: int, rng: random.Random
    ) -> list[Passage]:
        """Return ``count`` passages without the answer: those that came with the question, then mined ones."""
        keys = set(self._contexts_of.get(text_key(example.question), ())) | ({gold.key} if gold else set())
        given = self._given_negatives(example, answers, count, keys)
        taken = {number for key in keys for number in self._pool.numbers(key)} | set(gold.numbers if gold else ())
        # If no answers are known, a similar passage may answer the question, but a random one is unlikely to.
        names = self._rankings if answers else {"random": self._rankings[FILLED]}
        missing = count - len(given)
        rankings = {name: one.rank(example.question, rng) for name, one in names.items()} if missing else {}
        mined = take_turns(missing, rankings, taken, lambda n: self._pool.shows(n, answers))
        if len(mined) < missing:
            raise DroppedError(TOO_FEW)
        self.report.negatives += Counter(mined.values()) + Counter(given=len(given))
        return given + [self._pool.passages[number] for number in mined]

    def _given_negatives(
        self, example: Example, answers: list[MatchText], count: int, keys: set[bytes]
    ) -> list[Passage]:
        """Return up to ``count`` of the passages that came with the question, and add their keys to ``keys``."""
        given: list[Passage] = []
        for passage in example.others:
            key = text_key(passage.text)
            if len(given) == count or key in keys or self._exclusion.has_context(key, passage.text):
                continue
            pieces = self._pieces(passage)[:1]
            if pieces and not shows_answer(pieces[0], answers):
                keys.add(key)
                given += pieces
        return given
