"""What training rows are to be like, and what became of every question: options, report, reasons. Plain data."""

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
NOT_FOUND = "no passage found for the question holds the answer"
TOO_LONG = "answer is longer than max_tokens"
TOO_FEW = "too few passages without the answer"
SMALL_GROUP = "belongs to a group of too few questions"
BETWEEN_PIECES = "answer runs over the pieces that its context is cut into"
UNANSWERABLE_IN_GROUP = "has no answer, so the passages near its context may answer it"
HARMLESS = (EXCLUDED_QUESTION, EXCLUDED_CONTEXT, REPEATED, SMALL_GROUP)


@dataclass(frozen=True, slots=True)
class DataOptions:
    """What the rows are to be like.

    Attributes:
        passages: least and most passages of a row, the gold one included; drawn evenly for each row.
        negatives: where negatives come from, in turn; chance fills up what they leave.
        no_gold: share of the answerable questions that lose their gold passage and their answers.
        max_tokens: most tokens of a passage with its title; ``None`` cuts nothing.
        strict: a row that cannot be used is an error instead of being left out.
        grouped: rows come in groups that share one set of passages, so that training fuses them once.
        group_questions: fewest questions of a group; training reads a small one at the cost of a large one.
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
        if self.group_questions < 1 or (self.group_questions > 1 and not self.grouped):
            raise InvalidInputError(
                f"group_questions is {self.group_questions}, but it must be a number from 1, and only groups have one."
            )
        if self.grouped and (least < most or self.no_gold):
            raise InvalidInputError(
                f"passages is {least}-{most} and no_gold {self.no_gold}, but the rows of a group share one set of "
                "passages, each with its gold one: one number and 0."
            )


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
            others. Those of a group count once.
        groups: sets of passages that rows share, where rows are grouped.
        passed_over: how often a question was left out of a group that holds its gold passage, since another passage
            there holds an answer of it; it then waits for a group of its own.
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
        """Plain data for JSON."""
        return asdict(self) | {"dropped": dict(self.dropped), "negatives": dict(self.negatives)}

    def drop(self, example: Example, reason: str, *, strict: bool) -> None:
        """Count a question that is left out.

        Raises:
            InvalidInputError: ``strict``, and the reason is no harmless one; names the question's place and the cause.
        """
        if strict and reason not in HARMLESS:
            raise InvalidInputError(f"{example.where} (id {example.id!r}): {reason}; without strict it is left out.")
        self.dropped[reason] += 1
        self.first_dropped.setdefault(reason, example.where)


class DroppedError(Exception):
    """The question at hand is of no use; the message is the reason."""
