"""The progress of a run, and its loss curve as a file. Plain data."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from ..data.writing import write_atomically

LOSSES = "losses.json"

Series = list[tuple[int, float]]  # step, value


@dataclass(slots=True)
class Progress:
    """Number of steps, and values by step.

    Attributes:
        losses: nats per token.
        seconds: seconds since the start; a resumed run continues the count.
        scores: exact match (%) on the dev rows.
    """

    step: int = 0
    losses: Series = field(default_factory=list)
    learning_rates: Series = field(default_factory=list)
    seconds: Series = field(default_factory=list)
    scores: Series = field(default_factory=list)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Return the progress that was saved with ``asdict`` as JSON."""
        names = ("losses", "learning_rates", "seconds", "scores")
        return cls(data["step"], *([(step, value) for step, value in data[name]] for name in names))

    @property
    def best(self) -> float | None:
        """Highest exact match (%) on the dev rows so far."""
        return max((score for _, score in self.scores), default=None)

    @property
    def best_step(self) -> int | None:
        """First step with the best exact match, whose decoder is in ``best/``."""
        return next((step for step, score in self.scores if score == self.best), None)

    @property
    def elapsed(self) -> float:
        """Seconds until the last step."""
        return self.seconds[-1][1] if self.seconds else 0.0

    def add_step(self, loss: float, learning_rate: float, seconds: float) -> None:
        self.step += 1
        self.losses.append((self.step, loss))
        self.learning_rates.append((self.step, learning_rate))
        self.seconds.append((self.step, round(seconds, 3)))


def write_losses(folder: Path, progress: Progress) -> None:
    """Write the curve as ``losses.json``: lists of equal length, and the dev scores."""
    curve = {
        "steps": [step for step, _ in progress.losses],
        "losses_nats_per_token": [loss for _, loss in progress.losses],
        "learning_rates": [rate for _, rate in progress.learning_rates],
        "seconds": [seconds for _, seconds in progress.seconds],
        "dev_exact_match_percent": [{"step": step, "value": score} for step, score in progress.scores],
        "best": {"step": progress.best_step, "value": progress.best},
    }
    write_atomically(folder / LOSSES, json.dumps(curve, indent=1) + "\n")
