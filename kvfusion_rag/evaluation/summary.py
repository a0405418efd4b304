"""Computes figures from predictions: shares in per cent with 95 % intervals, and differences on the same rows.

Rows whose documents do not fit into a system's window are counted and excluded from its figures. Two systems are
compared on the rows that both could answer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from ..data.answer_match import abstains, answer_in_text, exact_match, token_f1
from ..data.rows import QARow
from .bootstrap import Bootstrap, Interval
from .orders import NO_GOLD, ORIGINAL, SHUFFLED, Condition
from .predictions import Prediction, Predictions

METRICS = ("em", "em_cited", "answer_in_text", "f1", "abstained")
Scores = Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Cell:
    """One system under one condition. ``figures`` (per cent, by metric) is empty if no row fits."""

    system: str
    condition: Condition
    rows: int
    not_fitting: int
    figures: Mapping[str, Interval] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class TokenMatch:
    """Share of rows (per cent) with the same token ids in the original and the shuffled order."""

    system: str
    rows: int
    figure: Interval | None


@dataclass(frozen=True, slots=True)
class SlotSpread:
    """Best minus worst exact match over the gold slots, in points, or None if a slot has no figure."""

    system: str
    points: float | None


@dataclass(frozen=True, slots=True)
class Difference:
    """Exact match of ``system`` minus ``reference`` (points, abstentions for ``no-gold``) on the rows of both."""

    system: str
    reference: str
    condition: Condition
    rows: int
    figure: Interval | None


@dataclass(frozen=True, slots=True)
class Summary:
    """All figures of one run."""

    systems: tuple[str, ...]
    conditions: tuple[Condition, ...]
    cells: tuple[Cell, ...]
    token_match: tuple[TokenMatch, ...]
    slot_spread: tuple[SlotSpread, ...]
    differences: tuple[Difference, ...]

    def cell(self, system: str, condition: Condition) -> Cell:
        return next(cell for cell in self.cells if (cell.system, cell.condition) == (system, condition))

    @property
    def slots(self) -> tuple[Condition, ...]:
        return tuple(condition for condition in self.conditions if condition.kind == "slot")

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON, with conditions by name."""
        lists = {
            "cells": self.cells,
            "token_match": self.token_match,
            "slot_spread": self.slot_spread,
            "differences": self.differences,
        }
        return {name: [_plain(asdict(item)) for item in items] for name, items in lists.items()}


def main_metric(condition: Condition) -> str:
    """Return the main metric of a condition: abstentions if there is no gold document, else exact match."""
    return "abstained" if condition == NO_GOLD else "em"


def score(prediction: Prediction, row: QARow, condition: Condition) -> Scores:
    """Return each metric of one answer, 0 to 1. If there is no answer, only abstaining is right."""
    answers = () if condition == NO_GOLD else row.answers
    abstained = float(abstains(prediction.text))
    if not answers:
        return dict.fromkeys(METRICS, abstained)
    return {
        "em": float(exact_match(prediction.text, answers)),
        "em_cited": float(exact_match(prediction.cited_text, answers)),
        "answer_in_text": float(answer_in_text(prediction.text, answers)),
        "f1": token_f1(prediction.text, answers),
        "abstained": abstained,
    }


def summarize(rows: Sequence[QARow], predictions: Predictions, bootstrap: Bootstrap) -> Summary:
    """Return the figures of all systems and conditions. The others are compared with the first system."""
    systems = tuple(dict.fromkeys(system for system, _ in predictions))
    conditions = tuple(dict.fromkeys(condition for _, condition in predictions))
    scores = {
        (system, condition): _scores(rows, found, condition) for (system, condition), found in predictions.items()
    }
    cells = tuple(_cell(system, condition, array, bootstrap) for (system, condition), array in scores.items())
    matches = ()
    if ORIGINAL in conditions and SHUFFLED in conditions:
        pairs = [(name, predictions[name, ORIGINAL], predictions[name, SHUFFLED]) for name in systems]
        matches = tuple(_token_match(name, first, second, bootstrap) for name, first, second in pairs)
    differences = tuple(
        _difference(name, systems[0], condition, scores, bootstrap) for name in systems[1:] for condition in conditions
    )
    return Summary(systems, conditions, cells, matches, _slot_spreads(systems, cells), differences)


Array = npt.NDArray[np.float64]  # (rows, metrics); NaN in rows that do not fit


def _scores(rows: Sequence[QARow], predictions: Sequence[Prediction | None], condition: Condition) -> Array:
    return np.array(
        [
            [np.nan] * len(METRICS) if one is None else [score(one, row, condition)[metric] for metric in METRICS]
            for row, one in zip(rows, predictions, strict=True)
        ]
    )


def _cell(system: str, condition: Condition, scores: Array, bootstrap: Bootstrap) -> Cell:
    fitting = scores[~np.isnan(scores[:, 0])]
    columns = fitting.T if len(fitting) else []
    metrics = (main_metric(condition),) if condition == NO_GOLD else METRICS
    figures = {
        metric: bootstrap.interval(100 * column)
        for metric, column in zip(METRICS, columns, strict=False)
        if metric in metrics
    }
    return Cell(system, condition, len(scores), len(scores) - len(fitting), figures)


def _token_match(
    system: str, first: Sequence[Prediction | None], second: Sequence[Prediction | None], bootstrap: Bootstrap
) -> TokenMatch:
    same = [
        100.0 * (a.token_ids == b.token_ids)
        for a, b in zip(first, second, strict=True)
        if a is not None and b is not None and a.documents != b.documents  # shuffling may not change the order
    ]
    return TokenMatch(system, len(same), bootstrap.interval(same) if same else None)


def _slot_spreads(systems: Sequence[str], cells: Sequence[Cell]) -> tuple[SlotSpread, ...]:
    spreads = []
    for name in systems:
        slots = [cell for cell in cells if cell.system == name and cell.condition.kind == "slot"]
        means = [cell.figures["em"].mean for cell in slots if cell.figures]
        if slots:
            spreads.append(SlotSpread(name, max(means) - min(means) if len(means) == len(slots) else None))
    return tuple(spreads)


def _difference(
    system: str,
    reference: str,
    condition: Condition,
    scores: Mapping[tuple[str, Condition], Array],
    bootstrap: Bootstrap,
) -> Difference:
    metric = METRICS.index(main_metric(condition))
    first, second = (100 * scores[name, condition][:, metric] for name in (system, reference))
    both = ~(np.isnan(first) | np.isnan(second))
    figure = bootstrap.difference(first[both], second[both]) if both.any() else None
    return Difference(system, reference, condition, int(both.sum()), figure)


def _plain(item: dict[str, Any]) -> dict[str, Any]:
    if "condition" in item:
        item["condition"] = Condition(**item["condition"]).name
    return item
