"""Plots the loss of each step, and below it the exact match on the dev rows.

matplotlib comes with the extra ``evaluation`` and is imported when a plot is drawn.
"""

from __future__ import annotations

from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING

from ..evaluation.plots import require_plotting
from ..plotting.style import COLORS, new_figure, plot_style, save
from .progress import Progress

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SMOOTHED_OVER = 20  # steps of the exponential moving average


def plot_losses(progress: Progress, path: Path, *, title: str) -> None:
    """Draw the curve into ``path``, whose suffix decides the format.

    Raises:
        InvalidInputError: the suffix is unknown.
        MissingDependencyError: matplotlib is not installed.
    """
    require_plotting(path)
    save(losses_figure(progress, title=title), path)


@plot_style()
def losses_figure(progress: Progress, *, title: str) -> Figure:
    """Return the figure of ``plot_losses``."""
    from matplotlib.ticker import MaxNLocator

    panels = 2 if progress.scores else 1
    figure, axes = new_figure(title, size=(6.4, 2.6 + 1.8 * panels), panels=panels)
    steps, losses = [step for step, _ in progress.losses], [loss for _, loss in progress.losses]
    axes[0].plot(steps, losses, color=COLORS[0], linewidth=0.8, alpha=0.4, label="each step")
    axes[0].plot(steps, smoothed(losses), color=COLORS[0], linewidth=1.8, label=f"mean of about {SMOOTHED_OVER} steps")
    axes[0].set_ylabel("loss, nats per token")
    axes[0].legend()
    if progress.scores:
        axes[1].plot(*zip(*progress.scores, strict=True), color=COLORS[1], marker="o", markersize=4)
        axes[1].set_ylabel("exact match on dev, %")
        axes[1].set_ylim(bottom=0)
    axes[-1].set_xlabel("step")
    axes[-1].xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    return figure


def smoothed(values: list[float]) -> list[float]:
    """Return the exponential moving average, starting at the first value."""
    share = 2 / (SMOOTHED_OVER + 1)
    return list(accumulate(values, lambda mean, value: mean + share * (value - mean)))
