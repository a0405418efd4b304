"""Calibrates support, and measures it: questions refused without their gold document, and kept with it.

Every question is answered over its documents and over the same documents without the gold ones. The calibration is
fitted on one half of the questions, and measured on the other.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
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

REGULARIZATION = 1.0  # on the standardized weights, in observations
NEWTON_STEPS = 25
FITTED = (  # signals of each calibration: the first that all questions have, and those after it for other questions
    ("explained", "rare_coverage", "focus_lead"),
    ("explained", "rare_coverage", "lead"),
    ("explained", "coverage"),
)
SHARES = tuple(share / 100 for share in range(100, 49, -1))  # answerable questions kept at the points of the curve

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
class Figures:
    """How well one calibration works.

    Attributes:
        signals: names of its signals.
        auc, kept, refused, refused_at_share: as in ``SupportReport``.
    """

    signals: tuple[str, ...]
    auc: float
    kept: Interval
    refused: Interval
    refused_at_share: Interval


@dataclass(frozen=True, slots=True)
class SupportReport:
    """How well support works on questions on which it was not fitted.

    Attributes:
        questions: measured questions, each answerable once and unanswerable once.
        auc: probability that a random answerable question has more support than a random unanswerable one.
        auc_of: the same for each signal on its own that all these questions have.
        kept, refused: shares in per cent at the calibration's threshold, with 95 % intervals.
        refused_at_share: share of unanswerable questions (%) refused at the threshold that keeps exactly the wanted
            share of these answerable questions.
        brier: mean squared difference between support and whether the question was answerable.
        curve: points from the lowest threshold to the highest.
        fallbacks: figures of the calibrations for questions that lack a signal, on these questions, which have all.
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
    fallbacks: tuple[Figures, ...]

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

    The signals are the first of ``FITTED`` that all questions with an answer have. Those after them are fitted for
    questions that lack one.
    """
    known = _signals_of_all(measured)
    found: SupportCalibration | None = None
    for names in reversed(FITTED):
        if set(names) <= set(known):
            found = _fit(measured, names, share, without=found)
    assert found is not None  # every question has the last ones
    return found


def _fit(
    measured: Sequence[tuple[Measured, Measured]],
    names: Sequence[str],
    share: float,
    *,
    without: SupportCalibration | None,
) -> SupportCalibration:
    """Fit ``names`` by Newton's method on standardized signals, with a quadratic penalty."""
    known = [(one, one.signals) for pair in measured for one in pair if one.signals is not None]
    signals = np.array([[own[name] for name in names] for _, own in known])
    labels = np.array([float(one.answerable) for one, _ in known])
    if len(set(labels.tolist())) < 2:
        raise InvalidInputError("all questions with an answer are of one kind, so support cannot be calibrated.")
    mean, scale = signals.mean(axis=0), signals.std(axis=0) + 1e-12  # a constant signal gets no weight
    inputs = np.column_stack([np.ones(len(known)), (signals - mean) / scale])
    penalty = np.diag([1e-9] + [REGULARIZATION] * len(names))
    weights = np.zeros(inputs.shape[1])
    for _ in range(NEWTON_STEPS):
        chances = 1 / (1 + np.exp(-(inputs @ weights)))
        gradient = inputs.T @ (chances - labels) + penalty @ weights
        weights -= np.linalg.solve((inputs.T * (chances * (1 - chances))) @ inputs + penalty, gradient)
    own = weights[1:] / scale
    named = dict(zip(names, own.tolist(), strict=True))
    fitted = SupportCalibration(named, float(weights[0] - own @ mean), 0.0, without)
    kept = [support_of(fitted, with_gold) for with_gold, _ in measured]
    return replace(fitted, threshold=threshold_keeping(kept, share))


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
    all_of = [calibration]
    while (other := all_of[-1].without) is not None:
        all_of.append(other)
    labels = np.r_[np.ones(len(kept)), np.zeros(len(left))]
    signals, figures = (
        _signals_of_all(measured),
        [_figures(one, with_gold, without, share, bootstrap) for one in all_of],
    )
    return SupportReport(
        calibration,
        questions=len(measured),
        auc=figures[0].auc,
        auc_of={name: _auc(*(_values(part, name) for part in (with_gold, without))) for name in signals},
        kept=figures[0].kept,
        refused=figures[0].refused,
        refused_at_share=figures[0].refused_at_share,
        brier=float(np.mean((np.r_[kept, left] - labels) ** 2)),
        curve=tuple(_point(threshold_keeping(kept.tolist(), one), kept, left, right) for one in SHARES),
        fallbacks=tuple(figures[1:]),
    )


def _figures(
    calibration: SupportCalibration,
    with_gold: Sequence[Measured],
    without: Sequence[Measured],
    share: float,
    bootstrap: Bootstrap,
) -> Figures:
    kept, left = ([support_of(calibration, one) for one in part] for part in (with_gold, without))
    at_share = threshold_keeping(kept, share)
    return Figures(
        tuple(calibration.weights),
        auc=_auc(np.array(kept), np.array(left)),
        kept=bootstrap.interval([100.0 * (one >= calibration.threshold) for one in kept]),
        refused=bootstrap.interval([100.0 * (one < calibration.threshold) for one in left]),
        refused_at_share=bootstrap.interval([100.0 * (one < at_share) for one in left]),
    )


def _signals_of_all(measured: Sequence[tuple[Measured, Measured]]) -> list[str]:
    """Return the names of the signals that all questions with an answer have."""
    signals = [one.signals for pair in measured for one in pair if one.signals is not None]
    return [name for name in SIGNALS if all(name in own for own in signals)]


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
