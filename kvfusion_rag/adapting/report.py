"""What an adaptation came to, as plain data: counts, figures, and whether the adapter was kept."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Self

from .judging import Verdict

FILE = "report.json"


@dataclass(frozen=True, slots=True)
class AdaptReport:
    """The outcome of one run.

    Attributes:
        passages, files: that the documents have.
        asked: questions before any was dropped; ``dropped`` has the reasons.
        trained, judged: questions that the adapter was trained on, and judged by.
        documents: most documents of a question.
        steps: of the optimiser; ``losses`` are the means (nats a token) of its first and last tenth.
        seconds: of the call that ended the run.
        verdicts: of untuned fusion, adapted fusion and concat.
        margin: share (%) of right answers of adapted fusion minus that of untuned fusion, with the borders of its 95 %
            interval.
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
    kept: bool
    run: Mapping[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Back from ``to_dict`` by way of JSON."""
        verdicts = tuple(Verdict(**verdict) for verdict in data["verdicts"])
        return cls(**{**data, "verdicts": verdicts, "losses": tuple(data["losses"]), "margin": tuple(data["margin"])})


def table(report: AdaptReport) -> str:
    """The verdicts as lines of text."""
    lines = [f"{'system':16} {'right':>7} {'F1':>6}"]
    lines += [f"{one.system:16} {one.right:5.1f} % {one.f1:6.1f}" for one in report.verdicts]
    return "\n".join(lines)
