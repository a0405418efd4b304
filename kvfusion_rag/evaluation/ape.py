"""Searches APE's temperature and scale in a small grid on rows that are not evaluated.

The paper (arXiv 2502.05431) sets both for each task, so a fair comparison must choose them on other questions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from ..errors import InvalidInputError
from .orders import ORIGINAL, plan_conditions
from .runner import predict
from .summary import score
from .systems import GeneratorSystem

if TYPE_CHECKING:
    from ..data.rows import QARow
    from ..generator import KVFusionGenerator
    from .journal import Journal

TEMPERATURES = (1.0, 0.9, 0.8, 0.6)
SCALES = (1.0, 0.9, 0.8, 0.6)


@dataclass(frozen=True, slots=True)
class Trial:
    """Exact match (%) with one temperature and one scale."""

    temperature: float
    scale: float
    exact_match: float

    @property
    def change(self) -> float:
        """Distance of temperature and scale from 1. If both are 1, APE equals plain fusion."""
        return abs(self.temperature - 1) + abs(self.scale - 1)


@dataclass(frozen=True, slots=True)
class ApeSearch:
    """All trials on ``rows`` questions, and the chosen one."""

    rows: int
    trials: tuple[Trial, ...]

    @property
    def chosen(self) -> Trial:
        """Trial with the best exact match. Of equal ones, it is the nearest to plain fusion."""
        return max(self.trials, key=lambda trial: (trial.exact_match, -trial.change))

    @property
    def settings(self) -> dict[str, Any]:
        """The chosen trial as fields of ``ModelSettings``."""
        return {"ape_temperature": self.chosen.temperature, "ape_scale": self.chosen.scale}

    @property
    def note(self) -> str:
        """One sentence for the report."""
        best, plain = self.chosen, next(trial for trial in self.trials if trial.change == 0)
        return (
            f"ape: temperature {best.temperature:g} and scale {best.scale:g}, the best of {len(self.trials)} pairs "
            f"on {self.rows} other questions (exact match {best.exact_match:.1f}; {plain.exact_match:.1f} with both "
            "at 1)."
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the search as plain data for JSON."""
        return {
            "rows": self.rows,
            "trials": [asdict(trial) for trial in self.trials],
            "temperature": self.chosen.temperature,
            "scale": self.chosen.scale,
        }


def require_search_rows(rows: Sequence[QARow], evaluated: Sequence[QARow], documents: int) -> None:
    """Check, before a model is loaded, that ``rows`` can be searched on.

    Raises:
        InvalidInputError: there are no rows, a question is also evaluated, or a row has fewer passages than
            ``documents``.
    """
    plan_conditions(rows, [ORIGINAL.name], documents)
    questions = {row.question for row in evaluated}
    if shared := sum(row.question in questions for row in rows):
        raise InvalidInputError(
            f"{shared} of the {len(rows)} questions to search temperature and scale on are also evaluated, but the "
            "search must use different ones."
        )


def search_ape(
    rows: Sequence[QARow],
    generator: KVFusionGenerator,
    *,
    documents: int | None = None,
    batch_size: int = 8,
    max_new_tokens: int | None = None,
    progress: bool = False,
    journal: Journal | None = None,
) -> ApeSearch:
    """Try all pairs of ``TEMPERATURES`` and ``SCALES`` on ``rows``, each question in one order of its documents.

    The order does not matter in mode "ape". A question that does not fit counts as wrong for all pairs.

    Args:
        documents: documents per question; by default as many as every row has.
        batch_size: questions answered together.
        max_new_tokens: maximum tokens of an answer; None for the model's own limit.
        progress: whether to show a progress bar if stderr is a terminal.
        journal: journal of these rows; see ``predict``.

    Raises:
        InvalidInputError: there are no rows, or a row has fewer passages than ``documents``.
    """
    plan = plan_conditions(rows, [ORIGINAL.name], documents)
    systems = [
        GeneratorSystem(
            f"ape {temperature:g} {scale:g}",
            generator.with_settings(ape_temperature=temperature, ape_scale=scale),
            "ape",
            max_new_tokens=max_new_tokens,
        )
        for temperature in TEMPERATURES
        for scale in SCALES
    ]
    if journal is not None:
        journal.require(systems)
    predictions = predict(rows, systems, plan, batch_size=batch_size, progress=progress, journal=journal)
    trials = []
    for system in systems:
        answers = predictions[system.name, ORIGINAL]
        right = sum(score(p, row, ORIGINAL)["em"] for row, p in zip(rows, answers, strict=True) if p is not None)
        settings = system.generator.settings
        trials.append(Trial(settings.ape_temperature, settings.ape_scale, 100 * right / len(rows)))
    return ApeSearch(len(rows), tuple(trials))
