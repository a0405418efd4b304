"""Compares ways to answer held-out rows with the model's own answers from the gold passage only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..data.answer_match import token_f1
from ..data.rows import QARow
from ..generator import KVFusionGenerator
from ..schema import Mode
from .filtering import says

FOCUS = 1  # documents that the systems with focus fuse: each question was written about one passage


@dataclass(frozen=True, slots=True)
class System:
    """A way to answer.

    Attributes:
        name: name in tables.
        stage: name of the stage with its answers.
        adapted: whether the adapter answers.
        mode, focus: as in ``KVFusionGenerator.answer``.
    """

    name: str
    stage: str
    adapted: bool = False
    mode: Mode = "fusion"
    focus: int | None = None


UNTUNED = System("fusion, untuned", "judged-untuned")
ADAPTED = System("fusion, adapted", "judged-adapted", adapted=True)
UNTUNED_FOCUS = System(f"focus {FOCUS}, untuned", "judged-untuned-focus", focus=FOCUS)
ADAPTED_FOCUS = System(f"focus {FOCUS}, adapted", "judged-adapted-focus", adapted=True, focus=FOCUS)
CONCAT = System("concat", "judged-concat", mode="concat")
SYSTEMS = (UNTUNED, ADAPTED, UNTUNED_FOCUS, ADAPTED_FOCUS, CONCAT)


@dataclass(frozen=True, slots=True)
class Verdict:
    """Figures of one system.

    Attributes:
        right: share of answers (%) that say the same as the gold-passage answer (``filtering.says``).
        f1: mean word F1 (%) against it.
    """

    system: str
    right: float
    f1: float

    def beats(self, other: Verdict) -> bool:
        """Return whether this system has more right answers, or equally many with a higher F1."""
        return (self.right, self.f1) > (other.right, other.f1)


def answer_rows(
    generator: KVFusionGenerator, rows: Sequence[QARow], mode: Mode, answer_tokens: int, focus: int | None = None
) -> list[str]:
    """Return greedy answers to ``rows`` over all their passages, or the best ``focus`` of them, in the rows' order."""
    answers = generator.answer_batch(
        [row.question for row in rows],
        [[passage.document(str(number)) for number, passage in enumerate(row.passages)] for row in rows],
        mode=mode,
        focus=focus,
        max_new_tokens=answer_tokens,
        max_reasoning_tokens=0,
    )
    return [answer.text for answer in answers]


def right_answers(rows: Sequence[QARow], answers: Sequence[str]) -> list[bool]:
    """Return for each answer of one system whether it says the same as the gold-passage answer."""
    return [says(text, row.answers[0], row.question) for text, row in zip(answers, rows, strict=True)]


def judge(system: System, rows: Sequence[QARow], answers: Sequence[str]) -> Verdict:
    """Score the answers of one system."""
    right = 100 * sum(right_answers(rows, answers)) / len(rows)
    f1 = 100 * sum(token_f1(text, row.answers) for text, row in zip(answers, rows, strict=True)) / len(rows)
    return Verdict(system.name, right, f1)


def wins(verdicts: Mapping[System, Verdict]) -> bool:
    """Return whether to keep the adapter: it beats the untuned model over all documents, or over the best one."""
    pairs = ((ADAPTED, UNTUNED), (ADAPTED_FOCUS, UNTUNED_FOCUS))
    return any(verdicts[adapted].beats(verdicts[untuned]) for adapted, untuned in pairs)


def best_system(verdicts: Mapping[System, Verdict]) -> System:
    """Return the best system; of equal ones the first in ``SYSTEMS``."""
    best = SYSTEMS[0]
    for system in SYSTEMS[1:]:
        if verdicts[system].beats(verdicts[best]):
            best = system
    return best


def best_focus(verdicts: Mapping[System, Verdict]) -> int | None:
    """Return the number of documents with which the adapter is better: FOCUS, or None for all."""
    return FOCUS if verdicts[ADAPTED_FOCUS].beats(verdicts[ADAPTED]) else None
