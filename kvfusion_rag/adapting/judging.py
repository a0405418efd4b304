"""Compares systems on held-out rows with the model's own answers from the gold passage only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..data.answer_match import token_f1
from ..data.rows import QARow
from ..generator import KVFusionGenerator
from ..schema import Mode
from .filtering import says

UNTUNED, ADAPTED, CONCAT = "fusion, untuned", "fusion, adapted", "concat"


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


def answer_rows(generator: KVFusionGenerator, rows: Sequence[QARow], mode: Mode, answer_tokens: int) -> list[str]:
    """Return greedy answers to ``rows`` over all their passages, in the rows' order."""
    answers = generator.answer_batch(
        [row.question for row in rows],
        [[passage.document(str(number)) for number, passage in enumerate(row.passages)] for row in rows],
        mode=mode,
        max_new_tokens=answer_tokens,
        max_reasoning_tokens=0,
    )
    return [answer.text for answer in answers]


def right_answers(rows: Sequence[QARow], answers: Sequence[str]) -> list[bool]:
    """Return for each answer of one system whether it says the same as the gold-passage answer."""
    return [says(text, row.answers[0], row.question) for text, row in zip(answers, rows, strict=True)]


def judge(system: str, rows: Sequence[QARow], answers: Sequence[str]) -> Verdict:
    """Score the answers of one system."""
    right = 100 * sum(right_answers(rows, answers)) / len(rows)
    f1 = 100 * sum(token_f1(text, row.answers) for text, row in zip(answers, rows, strict=True)) / len(rows)
    return Verdict(system, right, f1)


def wins(adapted: Verdict, untuned: Verdict) -> bool:
    """Return whether to keep the adapter: it has more right answers, or equally many with a higher F1."""
    return (adapted.right, adapted.f1) > (untuned.right, untuned.f1)
