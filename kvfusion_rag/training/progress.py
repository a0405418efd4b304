"""What a run has done so far, and its loss curve as a file. Plain data."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

LOSSES = "losses.json"

Series = list[tuple[int, float]]  # step, value


@dataclass(slots=True)
class Progress:
    """Steps made, and by step: losses (nats a token), learning rates, seconds since the start, dev exact match (%).

    A run that is taken up again goes on counting seconds where it had stopped.
    """

    step: int = 0
    losses: Series = field(default_factory=list)
    learning_rates: Series = field(default_factory=list)
    seconds: Series = field(default_factory=list)
    scores: Series = field(default_factory=list)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Back from ``asdict`` by way of JSON."""
        names = ("losses", "learning_rates", "seconds", "scores")
        return cls(data["step"], *([(step, value) for step, value in data[name]] for name in names))

    @property
    def best(self) -> float | None:
        """The highest dev exact match so far, in %."""
        return max((score for _, score in self.scores), default=None)

    @property
    def best_step(self) -> int | None:
        """The first step that had it: the decoder in ``best/`` is that step's."""
        return next((step for step, score in self.scores if score == self.best), None)

    @property
    def elapsed(self) -> float:
        """Seconds up to the last step."""
        return self.seconds[-1][1] if self.seconds else 0.0

    def note(self, loss: float, learning_rate: float, seconds: float) -> None:
        """One step more."""
        self.step += 1
        self.losses.append((self.step, loss))
        self.learning_rates.append((self.step, learning_rate))
        self.seconds.append((self.step, round(seconds, 3)))


def write_losses(folder: Path, progress: Progress) -> None:
    """The curve as ``losses.json``: lists of equal length, and the dev scores."""
    curve = {
        "steps": [step for step, _ in progress.losses],
        "losses_nats_per_token": [loss for _, loss in progress.losses],
        "learning_rates": [rate for _, rate in progress.learning_rates],
        "seconds": [seconds for _, seconds in progress.seconds],
        "dev_exact_match_percent": [{"step": step, "value": score} for step, score in progress.scores],
        "best": {"step": progress.best_step, "value": progress.best},
    }
    fresh = folder / f"{LOSSES}.new"
    fresh.write_text(json.dumps(curve, indent=1) + "\n", encoding="utf-8")
    os.replace(fresh, folder / LOSSES)
