"""Calibrates support, and measures what it is worth: questions refused without their gold document, and kept with it.

Every question is answered over its documents and over the same documents without the gold ones. One half of the
questions fits the calibration, and the other half measures it.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from ..data.answer_match import is_right
from ..data.rows import QARow
from ..errors import InvalidInputError
from ..text.support import SIGNALS, Signals, SupportCalibration
from .bootstrap import Bootstrap, Interval
from .orders import NO_GOLD, ORIGINAL, arrange

if TYPE_CHECKING:
    from ..generator import KVFusionGenerator

REGULARIZATION = 1.0  # of the standardized weights, in observations
NEWTON_STEPS = 25
SHARES = tuple(share / 100 for share in range(100, 49, -1))  # of answerable questions kept, points of the curve

Array = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Measured:
    """A question with its gold document or without it.

    Attributes:
        answerable: whether the gold document was among the documents.
        right: whether the answer was an exact match; False without the gold document.
        signals: signals of support; None for an empty answer, which counts as refused.
    """

    id: str
    answerable: bool
    right: bool
    signals: Signals | None


@dataclass(frozen=True, slots=True)
class Point:
    """Shares at one threshold.

    Attributes:
        threshold: support from which a question is answered.
        kept: share of the answerable questions that are answered.
        refused: share of the unanswerable questions that are refused.
        answered: share of all questions that are answered.
        accuracy: share of the answered questions whose answer is right.
        accuracy_answerable: the same for the answerable questions only.
    """

    threshold: float
    kept: float
    refused: float
    answered: float
    accuracy: float
    accuracy_answerable: float


@dataclass(frozen=True, slots=True)
class SupportReport:
    """What support is worth on questions that did not fit its calibration.

    Attributes:
        questions: measured questions, each answerable once and unanswerable once.
        auc: probability that a random answerable question has more support than a random unanswerable one.
        auc_of: the same for each signal on its own.
        kept, refused: shares in per cent at the calibration's threshold, with 95 % intervals.
        refused_at_share: share of unanswerable questions (%) refused at the threshold that keeps exactly the wanted
            share of these answerable questions.
        brier: mean squared difference between support and whether the question was answerable.
        curve: points from the lowest threshold to the highest.
    """

    calibration: SupportCalibration
    questions: int
    auc: float
    auc_of: Mapping[str, float]
    kept: Interval
    refused: Interval
    refused_at_share: Interval
    brier: float
    curve: tuple[Point, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return asdict(self)


def require_calibration_rows(rows: Sequence[QARow], documents: int) -> None:
    """Raise InvalidInputError unless there are questions to calibrate and to measure, each with and without gold."""
    if len(rows) < 4:
        raise InvalidInputError(f"there are {len(rows)} rows, but a calibration needs at least 4.")
    for row in rows:
        others = len(row.passages) - len(row.gold)
        if not row.gold or not row.answers or not others or len(row.gold) >= documents:
            raise InvalidInputError(
                f"row {row.id!r} has {len(row.answers)} answers, {len(row.gold)} gold passages and {others} others, "
                f"but a calibration needs an answer, and a gold passage and another one among {documents} documents."
            )


def measure_rows(
    generator: KVFusionGenerator, rows: Sequence[QARow], documents: int, *, batch_size: int = 8, progress: bool = False
) -> Iterator[tuple[Measured, Measured]]:
    """Yield each row as an answerable and as an unanswerable question, answered from ``documents`` documents."""
    with tqdm(total=len(rows), desc="support", unit="question", disable=None if progress else True) as bar:
        for start in range(0, len(rows), batch_size):
            batch = rows[start : start + batch_size]
            with_gold, without = (_measure(generator, batch, documents, answerable=a) for a in (True, False))
            yield from zip(with_gold, without, strict=True)
            bar.update(len(batch))


def _measure(
    generator: KVFusionGenerator, rows: Sequence[QARow], documents: int, *, answerable: bool
) -> list[Measured]:
    condition = ORIGINAL if answerable else NO_GOLD
    orders = [arrange(row, condition, documents, 0) for row in rows]
    given = [[row.passages[n].document(str(n + 1)) for n in order] for row, order in zip(rows, orders, strict=True)]
    found = generator.support_signals([row.question for row in rows], given)
    return [
        Measured(row.id, answerable, answerable and is_right(answer.text, row.answers), signals)
        for row, (answer, signals) in zip(rows, found, strict=True)
    ]


def halves(
    measured: Sequence[tuple[Measured, Measured]], seed: int
) -> tuple[list[tuple[Measured, Measured]], list[tuple[Measured, Measured]]]:
    """Return a random half of the questions to fit a calibration, and the other half to measure it."""
    order = random.Random(seed).sample(range(len(measured)), len(measured))
    middle = len(measured) // 2
    return [measured[n] for n in sorted(order[:middle])], [measured[n] for n in sorted(order[middle:])]


def fit_calibration(measured: Sequence[tuple[Measured, Measured]], share: float) -> SupportCalibration:
    """Return the logistic regression of answerable on the signals, with a threshold that keeps ``share`` of them.

    Weights are found by Newton's method on standardized signals, with a quadratic penalty.
    """
    known = [one for pair in measured for one in pair if one.signals is not None]
    signals = np.array([[(one.signals or {})[name] for name in SIGNALS] for one in known])
    labels = np.array([float(one.answerable) for one in known])
    if len(set(labels.tolist())) < 2:
        raise InvalidInputError("all questions with an answer are of one kind, so support cannot be calibrated.")
    mean, scale = signals.mean(axis=0), signals.std(axis=0) + 1e-12  # a constant signal gets no weight
    inputs = np.column_stack([np.ones(len(known)), (signals - mean) / scale])
    penalty = np.diag([1e-9] + [REGULARIZATION] * len(SIGNALS))
    weights = np.zeros(inputs.shape[1])
    for _ in range(NEWTON_STEPS):
        chances = 1 / (1 + np.exp(-(inputs @ weights)))
        gradient = inputs.T @ (chances - labels) + penalty @ weights
        weights -= np.linalg.solve((inputs.T * (chances * (1 - chances))) @ inputs + penalty, gradient)
    own = weights[1:] / scale
    named = dict(zip(SIGNALS, own.tolist(), strict=True))
    fitted = SupportCalibration(named, float(weights[0] - own @ mean), 0.0)
    kept = [support_of(fitted, with_gold) for with_gold, _ in measured]
    return SupportCalibration(named, fitted.bias, threshold_keeping(kept, share))


def support_of(calibration: SupportCalibration, one: Measured) -> float:
    """Return the support of a measured question, 0 for an empty answer."""
    return 0.0 if one.signals is None else calibration.probability(one.signals)


def threshold_keeping(supports: Sequence[float], share: float) -> float:
    """Return the highest threshold that at least ``share`` of ``supports`` reach."""
    ranked = sorted(supports, reverse=True)
    return ranked[max(1, int(np.ceil(share * len(ranked) - 1e-9))) - 1]


def report_of(
    calibration: SupportCalibration, measured: Sequence[tuple[Measured, Measured]], share: float, bootstrap: Bootstrap
) -> SupportReport:
    """Return the figures of ``calibration`` on questions that it was not fitted on."""
    with_gold, without = ([pair[n] for pair in measured] for n in (0, 1))
    kept, left = (np.array([support_of(calibration, one) for one in part], float) for part in (with_gold, without))
    right = np.array([one.right for one in with_gold])
    at_share = threshold_keeping(kept.tolist(), share)
    labels = np.r_[np.ones(len(kept)), np.zeros(len(left))]
    return SupportReport(
        calibration,
        questions=len(measured),
        auc=_auc(kept, left),
        auc_of={name: _auc(*(_values(part, name) for part in (with_gold, without))) for name in SIGNALS},
        kept=bootstrap.interval([100.0 * (one >= calibration.threshold) for one in kept.tolist()]),
        refused=bootstrap.interval([100.0 * (one < calibration.threshold) for one in left.tolist()]),
        refused_at_share=bootstrap.interval([100.0 * (one < at_share) for one in left.tolist()]),
        brier=float(np.mean((np.r_[kept, left] - labels) ** 2)),
        curve=tuple(_point(threshold_keeping(kept.tolist(), one), kept, left, right) for one in SHARES),
    )


def _values(part: Sequence[Measured], name: str) -> Array:
    return np.array([-np.inf if one.signals is None else one.signals[name] for one in part])


def _auc(higher: Array, lower: Array) -> float:
    """Return how often a value of ``higher`` exceeds one of ``lower``; equal values count half."""
    return float(np.mean((higher[:, None] > lower) + 0.5 * (higher[:, None] == lower)))


def _point(threshold: float, kept: Array, left: Array, right: npt.NDArray[np.bool_]) -> Point:
    answered, wrong = kept >= threshold, left >= threshold
    number = int(answered.sum() + wrong.sum())
    good = int((answered & right).sum())
    return Point(
        threshold,
        kept=float(answered.mean()),
        refused=float(1 - wrong.mean()),
        answered=number / (len(kept) + len(left)),
        accuracy=good / number,
        accuracy_answerable=good / int(answered.sum()),
    )
