"""Options for building training rows, the report on all questions, and the reasons for dropping one. Plain data."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, get_args

from ..errors import InvalidInputError
from .formats import Example

NegativeSource = Literal["bm25", "dense", "random"]

EXCLUDED_QUESTION = "question is in an excluded file"
EXCLUDED_CONTEXT = "context is in an excluded file"
REPEATED = "repeats an earlier question and context"
NOT_IN_CONTEXT = "answer is not in its context"
NO_GOLD = "no passage is marked gold"
SEVERAL_GOLDS = "more than one passage is marked gold"
NOT_FOUND = "no passage found for the question contains the answer"
TOO_LONG = "answer is longer than max_tokens"
TOO_FEW = "too few passages without the answer"
SMALL_GROUP = "belongs to a group of too few questions"
BETWEEN_PIECES = "answer is split over two pieces of its context"
UNANSWERABLE_IN_GROUP = "has no answer, so the passages near its context may answer it"
HARMLESS = (EXCLUDED_QUESTION, EXCLUDED_CONTEXT, REPEATED, SMALL_GROUP)


@dataclass(frozen=True, slots=True)
class DataOptions:
    """How rows are built.

    Attributes:
        passages: minimum and maximum number of passages per row, including the gold one, drawn uniformly.
        negatives: sources of negatives, used in turn. Random passages fill up the rest.
        no_gold: share (0 to 1) of answerable questions that lose their gold passage and their answers.
        max_tokens: maximum tokens of a passage with its title; None cuts nothing.
        strict: whether an unusable question raises an error instead of being dropped.
        grouped: whether rows come in groups that share one set of passages, so that training fuses them once.
        group_questions: minimum questions per group; training a small group costs as much as a large one.
    """

    passages: tuple[int, int] = (20, 20)
    negatives: tuple[NegativeSource, ...] = ("bm25",)
    no_gold: float = 0.0
    max_tokens: int | None = None
    seed: int = 0
    strict: bool = False
    grouped: bool = False
    group_questions: int = 1

    def __post_init__(self) -> None:
        least, most = self.passages
        if not 1 <= least <= most:
            raise InvalidInputError(f"passages is {least}-{most}, but it must be a range from 1.")
        known = get_args(NegativeSource)
        if not self.negatives or set(self.negatives) - set(known) or len(set(self.negatives)) < len(self.negatives):
            raise InvalidInputError(
                f"negatives is {','.join(self.negatives)!r}, but it must be some of {', '.join(known)}, each once."
            )
        if not 0 <= self.no_gold <= 1:
            raise InvalidInputError(f"no_gold is {self.no_gold}, but it must be a share from 0 to 1.")
        if self.max_tokens is not None and self.max_tokens < 1:
            raise InvalidInputError(f"max_tokens is {self.max_tokens}, but it must be a whole number from 1.")
        if self.group_questions < 1 or (self.group_questions > 1 and not self.grouped):
            raise InvalidInputError(
                f"group_questions is {self.group_questions}, but it must be a whole number from 1, and 1 unless rows "
                "are grouped."
            )
        if self.grouped and (least < most or self.no_gold):
            raise InvalidInputError(
                f"passages is {least}-{most} and no_gold is {self.no_gold}, but the rows of a group share one set of "
                "passages, so passages must be one number and no_gold 0."
            )


@dataclass
class DataReport:
    """Counts of questions and rows, complete after all rows were read.

    Attributes:
        read: questions read.
        kept: rows built.
        no_gold: rows whose gold passage was removed.
        unanswerable: rows whose question has no answer.
        gold_found: rows whose gold passage was found in the corpus.
        evidence: rows whose answer was traced to a sentence.
        groups: sets of passages that rows share.
        passed_over: how often a question did not join the group with its gold passage, because another passage there
            contains one of its answers.
        pool: distinct passages in the pool.
        pool_excluded: passages left out of the pool because they are in an excluded file.
        dropped: dropped questions by reason.
        first_dropped: place of the first dropped question by reason.
        negatives: negatives by source. "given" ones came with the question, and "fill" ones are random because the
            sources were exhausted. Negatives of a group count once.
    """

    read: int = 0
    kept: int = 0
    no_gold: int = 0
    unanswerable: int = 0
    gold_found: int = 0
    evidence: int = 0
    groups: int = 0
    passed_over: int = 0
    pool: int = 0
    pool_excluded: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    first_dropped: dict[str, str] = field(default_factory=dict)
    negatives: Counter[str] = field(default_factory=Counter)

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain data for JSON."""
        return asdict(self) | {"dropped": dict(self.dropped), "negatives": dict(self.negatives)}

    def drop(self, example: Example, reason: str, *, strict: bool) -> None:
        """Count a dropped question.

        Raises: InvalidInputError: ``strict`` is set and the reason is not harmless. Names the question's place and the
            cause.
        """
        if strict and reason not in HARMLESS:
            raise InvalidInputError(
                f"{example.where} (id {example.id!r}): {reason}; if strict is not set, it is dropped."
            )
        self.dropped[reason] += 1
        self.first_dropped.setdefault(reason, example.where)


class DroppedError(Exception):
    """The question is not usable. The message is the reason."""
