"""Support: how probable it is that the documents answer a question, from signals that a model measures.

A logistic function of the signals gives the probability. Its weights are fitted on questions with and without their
gold document (``kvfusion calibrate``), and belong to one base model and prompt.
"""

from __future__ import annotations

import math
import re
import unicodedata
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Literal

from ..errors import InvalidInputError, NotCalibratedError
from .json_text import is_number

SIGNALS: tuple[str, ...] = ("gain", "coverage")
MinSupport = float | Literal["auto"] | None  # "auto" is the calibration's own threshold, None measures nothing
Signals = Mapping[str, float]
WORD = re.compile(r"\w+")
STEM = 5  # letters; the rest of a word is often an ending


@dataclass(frozen=True, slots=True)
class SupportCalibration:
    """Weights that turn signals into a probability.

    Signals of a question and its documents:

    - gain: log p(question | document) - log p(question | no document) in nats, of the document with the largest one.
    - coverage: the question's words that occur in this document, as a share (0 to 1) of all its words, each weighted
      by its surprisal, -log p(word | no document).

    Attributes:
        weights: weight of each signal.
        bias: added to the weighted signals.
        threshold: support from which ``min_support="auto"`` takes an answer as found.
    """

    weights: Mapping[str, float] = field(hash=False)
    bias: float
    threshold: float

    def __post_init__(self) -> None:
        """Raise InvalidInputError for a value that is not allowed."""
        if not isinstance(self.weights, Mapping) or set(self.weights) != set(SIGNALS):
            raise InvalidInputError(
                f"weights of support are {self.weights!r}, but they must have one each for {', '.join(SIGNALS)}."
            )
        for name, value in {**self.weights, "bias": self.bias}.items():
            if not is_number(value):
                raise InvalidInputError(f"{name} of support is {value!r}, but it must be a finite number.")
        if not is_share(self.threshold):
            raise InvalidInputError(f"threshold of support is {self.threshold!r}, but it must be from 0 to 1.")

    @classmethod
    def of(cls, data: object) -> SupportCalibration:
        """Return the calibration in the JSON object ``data``.

        Raises:
            InvalidInputError: a field is missing, unknown or wrong.
        """
        names = [one.name for one in fields(cls)]
        if not isinstance(data, Mapping) or set(data) != set(names):
            raise InvalidInputError(f"support is {data!r}, but it must be an object with {', '.join(names)}.")
        return cls(**data)

    def probability(self, signals: Signals) -> float:
        """Return the support, 0 to 1. Exact sums do not depend on the order of the signals."""
        score = math.fsum([self.bias, *(self.weights[name] * signals[name] for name in SIGNALS)])
        return 1 / (1 + math.exp(-score)) if score >= 0 else math.exp(score) / (1 + math.exp(score))


def coverage(question: str, surprisals: Sequence[tuple[int, int, float]], document: str) -> float:
    """Return the share of the surprisal of the question's words that occur in ``document``; 0 if it has no words.

    Words are equal if their first ``STEM`` letters are, without case and accents.

    Args:
        surprisals: start and end in ``question``, and surprisal, of each of its tokens.
    """
    known = {stem(word) for word in WORD.findall(document)}
    words = list(WORD.finditer(question))
    ends = [word.end() for word in words]
    of_word = [0.0] * len(words)
    for start, end, value in surprisals:
        number = bisect_right(ends, start)  # the first word that ends behind the token's start
        while number < len(words) and words[number].start() < end:
            of_word[number] += value
            number += 1
    covered = math.fsum(value for word, value in zip(words, of_word, strict=True) if stem(word[0]) in known)
    total = math.fsum(of_word)
    return covered / total if total else 0.0


def stem(word: str) -> str:
    """Return the first ``STEM`` letters of a word, without case and accents."""
    plain = unicodedata.normalize("NFKD", word.casefold())
    return "".join(letter for letter in plain if not unicodedata.combining(letter))[:STEM]


def require_min_support(value: object) -> None:
    """Raise InvalidInputError unless ``value`` is a probability, "auto" or None."""
    if not (value is None or value == "auto" or is_share(value)):
        raise InvalidInputError(f"min_support is {value!r}, but it must be a number from 0 to 1, 'auto' or None.")


def threshold_of(min_support: MinSupport, calibration: SupportCalibration | None, model_id: str) -> float | None:
    """Return the support that an answer needs to count as found, or None if it is not measured.

    Raises:
        InvalidInputError: ``min_support`` is neither a probability, nor "auto", nor None.
        NotCalibratedError: the model has no calibration.
    """
    require_min_support(min_support)
    if min_support is None:
        return None
    if calibration is None:
        raise NotCalibratedError.of(min_support, model_id)
    return calibration.threshold if min_support == "auto" else float(min_support)


def is_share(value: object) -> bool:
    """Whether ``value`` is a number from 0 to 1."""
    return is_number(value) and 0 <= value <= 1
