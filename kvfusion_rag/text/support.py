"""Support: how probable it is that the documents contain what an answer says, from signals that a model measures.

A logistic function of the signals gives the probability. Its weights are fitted on questions with and without their
gold document (``kvfusion calibrate``), and belong to one model, adapter and mode.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Literal

from ..errors import InvalidInputError, NotCalibratedError
from ..schema import MODES, Mode
from .json_text import is_number

SIGNALS = ("question", "prior", "answer")
MinSupport = float | Literal["auto"] | None  # "auto" is the calibration's own threshold, None measures nothing
Signals = Mapping[str, float]


@dataclass(frozen=True, slots=True)
class SupportCalibration:
    """Weights that turn signals into a probability.

    Signals are in nats per token: log p(question | best document), log p(question | no document) and
    log p(answer | question, documents).

    Attributes:
        weights: weight of each signal.
        bias: added to the weighted signals.
        threshold: support from which ``min_support="auto"`` takes an answer as found.
        mode: mode in which the signals were measured.
    """

    weights: Mapping[str, float] = field(hash=False)
    bias: float
    threshold: float
    mode: Mode = "fusion"

    def __post_init__(self) -> None:
        """Raise InvalidInputError for a value that is not allowed."""
        if not isinstance(self.weights, Mapping) or set(self.weights) != set(SIGNALS):
            raise InvalidInputError(f"weights of support are {self.weights!r}, but they must be for {SIGNALS}.")
        for name, value in {**self.weights, "bias": self.bias}.items():
            if not is_number(value):
                raise InvalidInputError(f"{name} of support is {value!r}, but it must be a finite number.")
        if not is_share(self.threshold):
            raise InvalidInputError(f"threshold of support is {self.threshold!r}, but it must be from 0 to 1.")
        if self.mode not in MODES:
            raise InvalidInputError(f"mode of support is {self.mode!r}, but it must be one of {', '.join(MODES)}.")

    @classmethod
    def of(cls, data: object) -> SupportCalibration:
        """Return the calibration in the JSON object ``data``.

        Raises:
            InvalidInputError: a field is missing, unknown or wrong.
        """
        names = [one.name for one in fields(cls)]
        if not isinstance(data, Mapping) or not {"weights", "bias", "threshold"} <= set(data) <= set(names):
            raise InvalidInputError(f"support is {data!r}, but it must be an object with {', '.join(names)}.")
        return cls(**data)

    def probability(self, signals: Signals) -> float:
        """Return the support, 0 to 1. Exact sums do not depend on the order of the signals."""
        score = math.fsum([self.bias, *(self.weights[name] * signals[name] for name in SIGNALS)])
        return 1 / (1 + math.exp(-score)) if score >= 0 else math.exp(score) / (1 + math.exp(score))


def require_min_support(value: object) -> None:
    """Raise InvalidInputError unless ``value`` is a probability, "auto" or None."""
    if not (value is None or value == "auto" or is_share(value)):
        raise InvalidInputError(f"min_support is {value!r}, but it must be a number from 0 to 1, 'auto' or None.")


def threshold_of(
    min_support: MinSupport, calibration: SupportCalibration | None, mode: Mode, model_id: str
) -> float | None:
    """Return the support that an answer in ``mode`` needs to be found, or None if it is not measured.

    Raises:
        InvalidInputError: ``min_support`` is neither a probability, nor "auto", nor None.
        NotCalibratedError: the model has no calibration, or one for another mode.
    """
    require_min_support(min_support)
    if min_support is None:
        return None
    if calibration is None:
        raise NotCalibratedError(
            f"min_support is {min_support!r}, but {model_id} has no calibration of support; measure one with "
            "kvfusion calibrate, or leave out min_support."
        )
    if calibration.mode != mode:
        raise NotCalibratedError(
            f"min_support is {min_support!r} in mode {mode!r}, but support of {model_id} was calibrated in mode "
            f"{calibration.mode!r}; use that mode, or leave out min_support."
        )
    return calibration.threshold if min_support == "auto" else float(min_support)


def is_share(value: object) -> bool:
    """Whether ``value`` is a number from 0 to 1."""
    return is_number(value) and 0 <= value <= 1
