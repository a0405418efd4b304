"""Exact match, F1 and answer-in-text, normalised as in SQuAD (Rajpurkar et al. 2016). Pure functions on text."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalize_answer(text: str) -> str:
    """Lower case, without ASCII punctuation, English articles and repeated white space."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def exact_match(prediction: str, answers: Sequence[str]) -> bool:
    """Whether the normalised prediction is one of the normalised answers; without answers, whether it is empty."""
    return normalize_answer(prediction) in {normalize_answer(answer) for answer in answers or [""]}


def abstains(prediction: str) -> bool:
    """Whether the prediction says that nothing can be answered, in the paper's word or by saying nothing."""
    return normalize_answer(prediction) in ("", "unanswerable")


def is_right(prediction: str, answers: Sequence[str]) -> bool:
    """Exact match; where there are no answers, abstaining alone is right."""
    return exact_match(prediction, answers) if answers else abstains(prediction)


def answer_in_text(prediction: str, answers: Sequence[str]) -> bool:
    """Whether an answer stands in the prediction, on whole words."""
    words = f" {normalize_answer(prediction)} "
    return any(f" {normalize_answer(answer)} " in words for answer in answers)


def token_f1(prediction: str, answers: Sequence[str]) -> float:
    """Best F1 of words over the answers; without answers, 1.0 for an empty prediction."""
    return max(_f1(normalize_answer(prediction).split(), normalize_answer(a).split()) for a in answers or [""])


def _f1(found: list[str], expected: list[str]) -> float:
    if not found or not expected:
        return float(found == expected)
    common = (Counter(found) & Counter(expected)).total()
    return 2 * common / (len(found) + len(expected))
