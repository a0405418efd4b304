"""Support: how probable it is that the documents answer a question, from signals that a model measures.

A logistic function of the signals gives the probability. Its weights are fitted on questions with and without their
gold document (``kvfusion calibrate``), and belong to one base model and prompt.
"""

from __future__ import annotations

import math
import re
import unicodedata
from bisect import bisect_right
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Literal

from ..errors import InvalidInputError, NotCalibratedError
from .json_text import is_a, is_mapping, is_number

OF_ONE = ("gain", "explained", "coverage")  # signals that every question with documents has
OF_SEVERAL = ("rare_coverage", "lead", "focus_lead")  # those that compare documents
SIGNALS = (*OF_ONE, *OF_SEVERAL)
MinSupport = float | Literal["auto"] | None  # "auto" is the calibration's own threshold, None measures nothing
Signals = Mapping[str, float]
WORD = re.compile(r"\w+")
STEM = 5  # letters; the rest of a word is often an ending
MAX_FALLBACKS = 16  # calibrations in ``without``, more than there are useful ones


@dataclass(frozen=True, slots=True)
class SupportCalibration:
    """Weights that turn signals into a probability.

    Signals of a question and its documents. The best document is the one with the highest score of focus, of those
    that the answer was read from:

    - gain: log p(question | best document) - log p(question | no document), in nats.
    - explained: gain as a share of the question's surprisal, -log p(question | no document).
    - coverage: the question's words that occur in the best document, as a share (0 to 1) of all its words, each
      weighted by its surprisal, -log p(word | no document).

    If there are several documents:

    - rare_coverage: the question's words that occur in the best document, as a share of all its words, each weighted
      by its rarity, ln((N + 1) / (n + 0.5)) for a word that n of the N other documents contain.
    - lead: log p(question | best document) minus that of the best other document, in nats.
    - focus_lead: the same for the scores of focus, which add the retriever's. Only if all documents have a score.

    Attributes:
        weights: weight of each signal that counts.
        bias: added to the weighted signals.
        threshold: support from which ``min_support="auto"`` takes an answer as found.
        without: calibration of questions that lack one of these signals; None if none can be lacking.
    """

    weights: Mapping[str, float] = field(hash=False)
    bias: float
    threshold: float
    without: SupportCalibration | None = None

    def __post_init__(self) -> None:
        """Raise InvalidInputError for a value that is not allowed."""
        if not is_mapping(self.weights) or not self.weights or not set(self.weights) <= set(SIGNALS):
            raise InvalidInputError(
                f"weights of support are {self.weights!r}, but they must have one or more of {', '.join(SIGNALS)}."
            )
        for name, value in {**self.weights, "bias": self.bias}.items():
            if not is_number(value):
                raise InvalidInputError(f"{name} of support is {value!r}, but it must be a finite number.")
        if not is_share(self.threshold):
            raise InvalidInputError(f"threshold of support is {self.threshold!r}, but it must be from 0 to 1.")
        if _fallbacks(self.without) > MAX_FALLBACKS:
            raise InvalidInputError(
                f"'without' of support is nested more than {MAX_FALLBACKS} levels deep, the limit."
            )
        if self.without is not None and not is_a(self.without, SupportCalibration):  # as JSON has it
            object.__setattr__(self, "without", SupportCalibration.of(self.without))
        if self.without is None and (lacking := set(self.weights) & set(OF_SEVERAL)):
            raise InvalidInputError(
                f"weights of support have {min(lacking)}, which some questions lack, so 'without' must have a "
                "calibration for those."
            )

    @classmethod
    def of(cls, data: object) -> SupportCalibration:
        """Return the calibration in the JSON object ``data``.

        Raises:
            InvalidInputError: a field is missing, unknown or wrong.
        """
        names = [one.name for one in fields(cls)]
        if not is_mapping(data) or {*data, "without"} != set(names):
            raise InvalidInputError(f"support is {data!r}, but it must be an object with {', '.join(names)}.")
        return cls(**data)

    def for_signals(self, signals: Signals) -> SupportCalibration:
        """Return this calibration, or the first in ``without`` whose signals were all measured."""
        if self.without is None or self.weights.keys() <= signals.keys():
            return self
        return self.without.for_signals(signals)

    def probability(self, signals: Signals) -> float:
        """Return the support, 0 to 1. Exact sums do not depend on the order of the signals."""
        used = self.for_signals(signals)
        score = math.fsum([used.bias, *(weight * signals[name] for name, weight in used.weights.items())])
        return 1 / (1 + math.exp(-score)) if score >= 0 else math.exp(score) / (1 + math.exp(score))


def _fallbacks(without: object) -> int:
    """Return how many calibrations are inside each other, in JSON that anybody may have written."""
    count = 0
    while is_mapping(without):
        without, count = without.get("without"), count + 1
    return count


def coverage(question: str, surprisals: Sequence[tuple[int, int, float]], document: str) -> float:
    """Return the share of the surprisal of the question's words that occur in ``document``; 0 if it has no words.

    Words are equal if their first ``STEM`` letters are, without case and accents.

    Args:
        surprisals: start and end in ``question``, and surprisal, of each of its tokens.
    """
    words = list(WORD.finditer(question))
    ends = [word.end() for word in words]
    of_word = [0.0] * len(words)
    for start, end, value in surprisals:
        number = bisect_right(ends, start)  # the first word that ends behind the token's start
        while number < len(words) and words[number].start() < end:
            of_word[number] += value
            number += 1
    return _share([stem(word[0]) for word in words], of_word, _stems(document))


def rare_coverage(question: str, document: str, others: Sequence[str]) -> float:
    """Return the share of the question's words that occur in ``document``, weighted by rarity; 0 if it has no words.

    Words are equal as for :func:`coverage`. The rarity of a word that n of the N other documents contain is
    ln((N + 1) / (n + 0.5)), so it depends on no order.
    """
    found_in = Counter(name for other in others for name in _stems(other))
    words = [stem(word) for word in WORD.findall(question)]
    rarities = [math.log((len(others) + 1) / (found_in[word] + 0.5)) for word in words]
    return _share(words, rarities, _stems(document))


def _share(words: Sequence[str], weights: Sequence[float], known: Collection[str]) -> float:
    """Return the share of the weights of the words that are ``known``."""
    covered = math.fsum(weight for word, weight in zip(words, weights, strict=True) if word in known)
    total = math.fsum(weights)
    return covered / total if total else 0.0


def _stems(text: str) -> set[str]:
    return {stem(word) for word in WORD.findall(text)}


def stem(word: str) -> str:
    """Return the first ``STEM`` letters of a word, without case and accents."""
    plain = unicodedata.normalize("NFKD", word.casefold())
    return "".join(letter for letter in plain if not unicodedata.combining(letter))[:STEM]


def require_min_support(value: object) -> None:
    """Raise InvalidInputError unless ``value`` is a probability, "auto" or None."""
    if not (value is None or value == "auto" or is_share(value)):
        raise InvalidInputError(f"min_support is {value!r}, but it must be a number from 0 to 1, 'auto' or None.")


def checked_min_support(min_support: MinSupport, calibration: SupportCalibration | None, model_id: str) -> MinSupport:
    """Return ``min_support``.

    Raises:
        InvalidInputError: ``min_support`` is neither a probability, nor "auto", nor None.
        NotCalibratedError: it is not None, and the model has no calibration.
    """
    require_min_support(min_support)
    if min_support is not None and calibration is None:
        raise NotCalibratedError.of(min_support, model_id)
    return min_support


def is_share(value: object) -> bool:
    """Whether ``value`` is a number from 0 to 1."""
    return is_number(value) and 0 <= value <= 1
