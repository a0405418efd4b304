"""Exact match, F1 and answer-in-text on answers normalised as in SQuAD (Rajpurkar et al. 2016)."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalize_answer(text: str) -> str:
    """Return ``text`` in lower case, without ASCII punctuation, English articles and repeated white space."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def exact_match(prediction: str, answers: Sequence[str]) -> bool:
    """Return whether the normalised prediction is one of the normalised answers, or empty if there are none."""
    return normalize_answer(prediction) in {normalize_answer(answer) for answer in answers or [""]}


def abstains(prediction: str) -> bool:
    """Return whether the prediction is empty or "unanswerable", the paper's word for it."""
    return normalize_answer(prediction) in ("", "unanswerable")


def is_right(prediction: str, answers: Sequence[str]) -> bool:
    """Return whether the prediction is an exact match or, if there are no answers, whether it abstains."""
    return exact_match(prediction, answers) if answers else abstains(prediction)


def answer_in_text(prediction: str, answers: Sequence[str]) -> bool:
    """Return whether the prediction contains an answer as whole words."""
    words = f" {normalize_answer(prediction)} "
    return any(f" {normalize_answer(answer)} " in words for answer in answers)


def token_f1(prediction: str, answers: Sequence[str]) -> float:
    """Return the best word F1 (0 to 1) over the answers. If there are none, an empty prediction scores 1.0."""
    return max(_f1(normalize_answer(prediction).split(), normalize_answer(a).split()) for a in answers or [""])


def _f1(found: list[str], expected: list[str]) -> float:
    if not found or not expected:
        return float(found == expected)
    common = (Counter(found) & Counter(expected)).total()
    return 2 * common / (len(found) + len(expected))
