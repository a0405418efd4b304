"""Builds training rows: one gold passage among negatives that hold no answer, the paper's recipe without its judges.

Takes questions as ``formats.py`` reads them and passages to mine, and yields rows of ``qa.py`` in the order of the
questions, with a report of what became of every one. The same input, options and seed give the same bytes. Nothing
here knows a model: token counts and vectors come from the caller.
"""

from __future__ import annotations

import itertools
import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, get_args

from ..errors import InvalidInputError
from ..qa import Passage, QARow
from ..retrieval.embedding import Embedder
from .formats import Example
from .mining import FILLED, BM25Ranking, DenseRanking, MatchText, Pool, RandomRanking, Ranking, take_turns, text_key
from .windows import Span, cut_around, evidence_of, find_answer, split_passage

NegativeSource = Literal["bm25", "dense", "random"]

EXCLUDED_QUESTION = "question is in an excluded file"
EXCLUDED_CONTEXT = "context is in an excluded file"
REPEATED = "repeats an earlier question and context"
NOT_IN_CONTEXT = "answer is not in its context"
NO_GOLD = "no passage is marked gold"
SEVERAL_GOLDS = "more than one passage is marked gold"
NOT_FOUND = "no passage found for the question holds the answer"
TOO_LONG = "answer is longer than max_tokens"
TOO_FEW = "too few passages without the answer"
_HARMLESS = (EXCLUDED_QUESTION, EXCLUDED_CONTEXT, REPEATED)

SEARCHED_FOR_GOLD = 100  # passages looked at for a question that came without a context


@dataclass(frozen=True, slots=True)
class DataOptions:
    """What the rows are to be like.

    Attributes:
        passages: least and most passages of a row, the gold one included; drawn evenly for each row.
        negatives: where negatives come from, in turn; chance fills up what they leave.
        no_gold: share of the answerable questions that lose their gold passage and their answers.
        max_tokens: most tokens of a passage with its title; ``None`` cuts nothing.
        strict: a row that cannot be used is an error instead of being left out.
    """

    passages: tuple[int, int] = (20, 20)
    negatives: tuple[NegativeSource, ...] = ("bm25",)
    no_gold: float = 0.0
    max_tokens: int | None = None
    seed: int = 0
    strict: bool = False

    def __post_init__(self) -> None:
        least, most = self.passages
        if not 1 <= least <= most:
            raise InvalidInputError(f"passages is {least}-{most}, but it must be a range from 1 upwards.")
        known = get_args(NegativeSource)
        if not self.negatives or set(self.negatives) - set(known) or len(set(self.negatives)) < len(self.negatives):
            raise InvalidInputError(
                f"negatives is {','.join(self.negatives)!r}, but it must name some of {', '.join(known)}, each once."
            )
        if not 0 <= self.no_gold <= 1:
            raise InvalidInputError(f"no_gold is {self.no_gold}, but a share lies between 0 and 1.")
        if self.max_tokens is not None and self.max_tokens < 1:
            raise InvalidInputError(f"max_tokens is {self.max_tokens}, but it must be at least 1.")


@dataclass
class DataReport:
    """What became of the questions; complete once all rows were taken.

    Attributes:
        pool: distinct passages that were mined; ``pool_excluded`` more were in an excluded file.
        no_gold: rows whose gold passage was taken away; ``unanswerable`` ones never had an answer.
        gold_found: rows that came without a context, whose gold passage was found in the corpus.
        evidence: rows whose answer was traced to its sentence.
        dropped: how many questions were left out, by reason; ``first_dropped`` says where the first one stood.
        negatives: how many came from where; ``given`` came with the question, ``fill`` are random ones for want of
            others.
    """

    read: int = 0
    kept: int = 0
    no_gold: int = 0
    unanswerable: int = 0
    gold_found: int = 0
    evidence: int = 0
    pool: int = 0
    pool_excluded: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    first_dropped: dict[str, str] = field(default_factory=dict)
    negatives: Counter[str] = field(default_factory=Counter)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self) | {"dropped": dict(self.dropped), "negatives": dict(self.negatives)}


class _DroppedError(Exception):
    """The question at hand is of no use; the message is the reason."""


@dataclass(frozen=True, slots=True)
class _Gold:
    """The passage that a question is answered from.

    Attributes:
        passage: cut to size around the answer.
        key: that of its uncut text; ``numbers`` are the passages of the pool that it must not stand beside.
        answers: all accepted answers, those that stand in the passage first.
        span: where the first of them stands in it, if that is known.
        found: it did not come with the question.
    """

    passage: Passage
    key: bytes
    numbers: tuple[int, ...]
    answers: tuple[str, ...]
    span: Span | None
    found: bool = False


class DataBuilder:
    """Turns questions into training rows.

    Args:
        examples: called twice, each time for all questions in the same order, so that they need not fit into memory.
        corpus: passages to take negatives, and golds of questions without context, from; ``None`` for the questions'
            own passages.
        exclude: questions and contexts that no row may hold, those of evaluation files.
        count_tokens: needed for ``max_tokens``.
        embedder: needed for negatives ``"dense"``.

    Raises:
        InvalidInputError: rows of the wanted size cannot be made of so few passages, or something above is missing.
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
    ) -> None:
        if options.max_tokens is not None and count_tokens is None:
            raise InvalidInputError("max_tokens is set without count_tokens, which must say what a token is.")
        if "dense" in options.negatives and embedder is None:
            raise InvalidInputError("negatives is 'dense' without an embedder, which must make the vectors.")
        self.report = DataReport()
        self._examples, self._options, self._count_tokens = examples, options, count_tokens
        self._excluded_questions: set[bytes] = set()
        self._excluded_contexts: set[bytes] = set()
        for example in exclude:
            self._excluded_questions.add(text_key(example.question))
            self._excluded_contexts.update(text_key(passage.text) for passage in example.passages)
        self._own_corpus = corpus is None
        self._contexts_of: dict[bytes, set[bytes]] = {}
        self._pool = self._make_pool(corpus)
        self._check_size()
        self._rankings = self._make_rankings(embedder)

    def rows(self) -> Iterator[QARow]:
        """One row for each question that can be used, in their order.

        Raises:
            InvalidInputError: with ``strict``, at the first one that cannot; names its place and the cause.
        """
        seen: set[tuple[bytes, bytes]] = set()
        for number, example in enumerate(self._examples()):
            self.report.read += 1
            try:
                row = self._row(example, random.Random(f"{self._options.seed}/{number}"), seen)
            except _DroppedError as dropped:
                self._drop(example, str(dropped))
            else:
                self.report.kept += 1
                yield row

    # The pool

    def _make_pool(self, corpus: Iterable[Passage] | None) -> Pool:
        """Distinct passages that are not excluded, cut to size."""
        pool = Pool()
        excluded: set[bytes] = set()
        own = self._own_passages(needed=corpus is None)
        for passage in own if corpus is None else itertools.chain(own, corpus):
            key = text_key(passage.text)
            if key in self._excluded_contexts:
                excluded.add(key)
            elif key not in pool:
                pool.add(key, self._pieces(passage))
        self.report.pool, self.report.pool_excluded = len(pool), len(excluded)
        return pool

    def _own_passages(self, *, needed: bool) -> Iterator[Passage]:
        """The questions' own passages if they are ``needed``; notes on the way which contexts share a question."""
        for example in self._examples():
            if needed and not example.passages:
                raise InvalidInputError(
                    f"{example.where} has no context, and without a corpus there is nothing to find its passage in."
                )
            self._note(example)
            if needed:
                yield from example.passages

    def _note(self, example: Example) -> None:
        """A passage that answers a question somewhere must not be a wrong one for it elsewhere."""
        keys = {text_key(passage.text) for passage in example.golds}
        if keys:
            self._contexts_of.setdefault(text_key(example.question), set()).update(keys)

    def _pieces(self, passage: Passage) -> list[Passage]:
        if self._options.max_tokens is None:
            return [Passage(passage.text, passage.title)]
        return [Passage(text, passage.title) for text in split_passage(passage.text, self._fits(passage.title))]

    def _fits(self, title: str | None) -> Callable[[str], bool]:
        count, most = self._count_tokens, self._options.max_tokens
        return lambda text: count is None or most is None or count(f"{title}\n{text}" if title else text) <= most

    def _check_size(self) -> None:
        most, size = self._options.passages[1], len(self._pool)
        if not size or most > size + (not self._own_corpus):  # the gold passage may come from outside the corpus
            raise InvalidInputError(
                f"passages is {most}, but the corpus holds {size} distinct passages; ask for fewer or add a corpus."
            )

    def _make_rankings(self, embedder: Embedder | None) -> dict[str, Ranking]:
        made: dict[str, Ranking] = {}
        for name in self._options.negatives:
            if name == "bm25":
                made[name] = BM25Ranking(self._pool.passages)
            elif name == "dense" and embedder is not None:
                made[name] = DenseRanking(self._pool.passages, embedder)
            else:
                made[name] = RandomRanking(len(self._pool))
        return made | {FILLED: RandomRanking(len(self._pool))}

    # One row

    def _row(self, example: Example, rng: random.Random, seen: set[tuple[bytes, bytes]]) -> QARow:
        wanted = rng.randint(*self._options.passages)
        blanked = rng.random() < self._options.no_gold
        question = text_key(example.question)
        self._refuse_excluded(example, question)
        answers = [MatchText.of(answer) for answer in example.answers]
        gold = self._gold(example, answers, rng) if answers else None
        context = gold.key if gold else text_key(" ".join(passage.text for passage in example.others))
        if (question, context) in seen:
            raise _DroppedError(REPEATED)
        seen.add((question, context))
        passages = [gold.passage] if gold and not blanked else []
        passages += self._negatives(example, gold, answers, wanted - len(passages), rng)
        rng.shuffle(passages)
        if gold is None or blanked:
            self.report.unanswerable += gold is None
            self.report.no_gold += gold is not None
            return QARow(example.id, example.question, (), tuple(passages))
        evidence = evidence_of(gold.passage.text, gold.span) if gold.span else None
        self.report.gold_found += gold.found
        self.report.evidence += evidence is not None
        return QARow(example.id, example.question, gold.answers, tuple(passages), evidence)

    def _refuse_excluded(self, example: Example, question: bytes) -> None:
        if question in self._excluded_questions:
            raise _DroppedError(EXCLUDED_QUESTION)
        own = example.golds or (() if example.answers else example.others)
        if any(text_key(passage.text) in self._excluded_contexts for passage in own):
            raise _DroppedError(EXCLUDED_CONTEXT)

    def _gold(self, example: Example, answers: list[MatchText], rng: random.Random) -> _Gold:
        if len(example.golds) > 1:
            raise _DroppedError(SEVERAL_GOLDS)
        if example.golds:
            return self._given_gold(example, answers, rng)
        if example.others:
            raise _DroppedError(NO_GOLD)
        return self._searched_gold(example, answers, rng)

    def _given_gold(self, example: Example, answers: list[MatchText], rng: random.Random) -> _Gold:
        """The passage that the file calls gold, if the answer stands in it."""
        whole, start = example.golds[0], example.answer_start
        literal = start is not None and start >= 0 and whole.text.startswith(example.answers[0], start)
        match = MatchText.of(whole.text)
        literal = literal and not answers[0].blank
        held = [n for n, answer in enumerate(answers) if (n == 0 and literal) or match.holds([answer])]
        if not held:
            raise _DroppedError(NOT_IN_CONTEXT)
        ordered = _first_come(example.answers, held)
        span = find_answer(whole.text, [ordered[0]], start if held[0] == 0 else None)
        text, span = self._cut_gold(whole, span, [answers[held[0]]], rng)
        key = text_key(whole.text)
        return _Gold(Passage(text, whole.title, True), key, self._pool.numbers(key), ordered, span)

    def _cut_gold(
        self, whole: Passage, span: Span | None, answer: list[MatchText], rng: random.Random
    ) -> tuple[str, Span | None]:
        """The text of a gold passage that fits, and where the answer stands in it."""
        fits = self._fits(whole.title)
        if span is None:  # it is there, but only in the words of the metric
            pieces = split_passage(whole.text, fits)
            text = next((piece for piece in pieces if MatchText.of(piece).holds(answer)), None)
            if text is not None:
                return text, None
        else:
            cut = cut_around(whole.text, span, fits, rng)
            if cut is not None:
                return whole.text[slice(*cut)], (span[0] - cut[0], span[1] - cut[0])
        raise _DroppedError(TOO_LONG)

    def _searched_gold(self, example: Example, answers: list[MatchText], rng: random.Random) -> _Gold:
        """The passage of the corpus that is likeliest to answer, by the first ranking that reads the question."""
        ranking = next((self._rankings[name] for name in self._options.negatives if name != "random"), None)
        if ranking is None:
            raise InvalidInputError(
                f"{example.where} has no context, and random negatives cannot find it one; add bm25 or dense."
            )
        for number in itertools.islice(ranking.rank(example.question, rng), SEARCHED_FOR_GOLD):
            match = self._pool.matches[number]
            held = [n for n, answer in enumerate(answers) if match.holds([answer])]
            if held:
                found, ordered = self._pool.passages[number], _first_come(example.answers, held)
                span = find_answer(found.text, [ordered[0]])
                gold = Passage(found.text, found.title, True)
                return _Gold(gold, text_key(found.text), (number,), ordered, span, found=True)
        raise _DroppedError(NOT_FOUND)

    def _negatives(
        self, example: Example, gold: _Gold | None, answers: list[MatchText], count: int, rng: random.Random
    ) -> list[Passage]:
        """``count`` passages without the answer: those that came with the question first, then mined ones."""
        keys = set(self._contexts_of.get(text_key(example.question), ())) | ({gold.key} if gold else set())
        given = self._given_negatives(example, answers, count, keys)
        taken = {number for key in keys for number in self._pool.numbers(key)} | set(gold.numbers if gold else ())
        # Without an answer to look for, a likely passage may well answer the question; a random one hardly will.
        names = self._rankings if answers else {"random": self._rankings[FILLED]}
        missing = count - len(given)
        rankings = {name: one.rank(example.question, rng) for name, one in names.items()} if missing else {}
        mined, counts = take_turns(missing, rankings, taken, lambda n: self._pool.matches[n].holds(answers))
        if len(mined) < missing:
            raise _DroppedError(TOO_FEW)
        self.report.negatives += counts + Counter(given=len(given))
        return given + [self._pool.passages[number] for number in mined]

    def _given_negatives(
        self, example: Example, answers: list[MatchText], count: int, keys: set[bytes]
    ) -> list[Passage]:
        """Up to ``count`` of the passages that came with the question; their keys join ``keys``."""
        given: list[Passage] = []
        for passage in example.others:
            key = text_key(passage.text)
            if len(given) == count or key in keys or key in self._excluded_contexts:
                continue
            pieces = self._pieces(passage)[:1]
            if pieces and not MatchText.of(pieces[0].text).holds(answers):
                keys.add(key)
                given += pieces
        return given

    def _drop(self, example: Example, reason: str) -> None:
        if self._options.strict and reason not in _HARMLESS:
            raise InvalidInputError(f"{example.where} (id {example.id!r}): {reason}; without strict it is left out.")
        self.report.dropped[reason] += 1
        self.report.first_dropped.setdefault(reason, example.where)


def _first_come(answers: tuple[str, ...], held: list[int]) -> tuple[str, ...]:
    """``answers`` with those numbered in ``held`` in front, otherwise in their order."""
    return tuple(answers[n] for n in sorted(range(len(answers)), key=lambda n: (n not in held, n)))
