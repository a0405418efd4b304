"""The result of an adaptation as plain data: counts, figures, and whether the adapter was kept."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Self

from .judging import Verdict

FILE = "report.json"


@dataclass(frozen=True, slots=True)
class AdaptReport:
    """The result of one run.

    Attributes:
        files, passages: number of files read, and of their passages.
        asked: number of questions before any was dropped.
        dropped: number of dropped questions by reason.
        trained, judged: number of questions that the adapter was trained on, and judged on.
        documents: maximum number of documents per question.
        steps: number of optimiser steps.
        losses: mean losses (nats per token) of the first and the last tenth of the steps.
        seconds: duration of the call that finished the run.
        verdicts: figures of all systems.
        margin: right answers of adapted minus untuned fusion (points), with the bounds of its 95 % interval.
        focus_margin: the same over the document that focus chooses.
        best: name of the best system.
        focus: documents to which focus limits the adapter by default, or None for all.
        kept: whether the adapter was kept.
        run: date, command, versions and hardware.
    """

    model_id: str
    dtype: str
    files: int
    passages: int
    asked: int
    dropped: Mapping[str, int]
    trained: int
    judged: int
    documents: int
    steps: int
    losses: tuple[float, float]
    seconds: float
    verdicts: tuple[Verdict, ...]
    margin: tuple[float, float, float]
    focus_margin: tuple[float, float, float]
    best: str
    focus: int | None
    kept: bool
    run: Mapping[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain data for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Return the report that was saved with ``to_dict`` as JSON."""
        verdicts = tuple(Verdict(**verdict) for verdict in data["verdicts"])
        tuples = {name: tuple(data[name]) for name in ("losses", "margin", "focus_margin")}
        return cls(**{**data, **tuples, "verdicts": verdicts})


def table(report: AdaptReport) -> str:
    """Return the verdicts as lines of text."""
    lines = [f"{'system':16} {'right':>7} {'F1':>6}"]
    lines += [f"{verdict.system:16} {verdict.right:5.1f} % {verdict.f1:6.1f}" for verdict in report.verdicts]
    return "\n".join(lines)


def points(margin: tuple[float, float, float]) -> str:
    """Return a difference with its interval as text."""
    mean, low, high = margin
    return f"{mean:+.1f} points (95 % interval {low:+.1f} to {high:+.1f})"
