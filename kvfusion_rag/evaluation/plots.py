"""Plots a measure by gold slot, one line per system with 95 % intervals as bars, and the curves of support.

matplotlib comes with the extra ``evaluation`` and is imported when a plot is drawn. No window is opened.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from math import ceil
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

from ..errors import InvalidInputError, MissingDependencyError
from ..plotting.style import COLORS, MARKERS, new_figure, plot_style, save
from .orders import SHUFFLED, Condition

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from .summary import Cell, Summary
    from .support import Point

SUFFIXES = (".png", ".svg", ".pdf")
LEGEND_COLUMNS = 4
LABELS = {"em": "exact match", "answer_in_text": "answer in text"}  # measures that can be drawn


def require_plotting(path: Path) -> None:
    """Check, before a long run, that a plot can be drawn after it.

    Raises:
        InvalidInputError: the suffix is not one of ``SUFFIXES``.
        MissingDependencyError: matplotlib is not installed.
    """
    if path.suffix not in SUFFIXES:
        raise InvalidInputError(f"the plot is {path.name!r}, but it must end in one of {', '.join(SUFFIXES)}.")
    if find_spec("matplotlib") is None:
        raise MissingDependencyError.of_extra("a plot", "matplotlib", "evaluation")


def plot_slots(summary: Summary, path: Path, *, title: str) -> None:
    """Draw exact match by gold slot, and shuffled if it was run, into ``path``. Its suffix decides the format.

    Raises:
        InvalidInputError: the run has no slots, or the suffix is unknown.
        MissingDependencyError: matplotlib is not installed.
    """
    require_plotting(path)
    if not summary.slots:
        raise InvalidInputError("there is nothing to plot: the run has no condition with the gold document at a slot.")
    save(slots_figure(summary, title=title), path)


@plot_style()
def slots_figure(
    summary: Summary, *, title: str, measure: str = "em", names: Mapping[str, str] = MappingProxyType({})
) -> Figure:
    """Return the figure of ``plot_slots``, with the slots in ascending order.

    Args:
        measure: a key of ``LABELS``.
        names: what the legend calls a system instead of its name.
    """
    slots = sorted(summary.slots, key=lambda slot: slot.number)
    columns = [*slots, *([SHUFFLED] if SHUFFLED in summary.conditions else [])]
    figure, (axes,) = new_figure(title, size=(max(6.4, 1.6 + 0.9 * len(columns)), 4.4))
    step = min(0.07, 0.8 / len(summary.systems))  # distance between intervals side by side
    for number, system in enumerate(summary.systems):
        shift = step * (number - (len(summary.systems) - 1) / 2)
        cells = [summary.cell(system, column) for column in columns]
        _draw(axes, cells, measure, names.get(system, system), number, shift)
    labels = [str(column.number) if column.kind == "slot" else column.label for column in columns]
    axes.set_xticks(range(len(columns)), labels)
    axes.set_xlim(-0.5, len(columns) - 0.5)
    top = _top(summary, columns, measure)
    axes.set_ylim(-0.02 * top, top)  # slightly below 0, so that points at 0 are not cut
    axes.set_xlabel("slot of the gold document")
    axes.set_ylabel(f"{LABELS[measure]}, % (95 % interval)")
    _add_legend(figure, len(summary.systems))
    return figure


@plot_style()
def plot_support(curve: Sequence[Point], path: Path, *, title: str) -> None:
    """Draw refused questions and accuracy by the share of answerable questions that are answered, into ``path``.

    Raises:
        InvalidInputError: the suffix is unknown.
        MissingDependencyError: matplotlib is not installed.
    """
    require_plotting(path)
    figure, (refused, accuracy) = new_figure(title, size=(6.4, 6.4), panels=2)
    kept = [100 * point.kept for point in curve]
    refused.plot(kept, [100 * point.refused for point in curve], color=COLORS[0], linewidth=1.8)
    refused.set_ylabel("unanswerable refused, %")
    for name, values, color in (
        ("all questions", [point.accuracy for point in curve], COLORS[0]),
        ("answerable questions", [point.accuracy_answerable for point in curve], COLORS[1]),
    ):
        accuracy.plot(kept, [100 * value for value in values], color=color, linewidth=1.8, label=name)
    accuracy.set_ylabel("right among the answered, %")
    accuracy.set_xlabel("answerable questions that are answered, %")
    for panel in (refused, accuracy):
        panel.set_ylim(0, 101)
    _add_legend(figure, 2)
    save(figure, path)


def _add_legend(figure: Figure, entries: int) -> None:
    """Add a legend below the panel, with as many columns as fit beside each other, and make room for its lines."""
    for columns in range(min(LEGEND_COLUMNS, entries), 0, -1):
        legend = figure.legend(loc="outside lower center", ncols=columns)
        if columns == 1 or legend.get_window_extent().width <= figure.bbox.width:
            figure.set_figheight(figure.get_figheight() + 0.2 * (ceil(entries / columns) - 1))
            return
        legend.remove()


def _top(summary: Summary, columns: list[Condition], measure: str) -> float:
    """Return the upper end of the axis: the next multiple of ten above all intervals."""
    figures = [summary.cell(system, column).figures for system in summary.systems for column in columns]
    highest = max((found[measure].high for found in figures if found), default=0.0)
    return min(10 * (highest // 10 + 1), 100.0) * 1.01


def _draw(axes: Axes, cells: Sequence[Cell], measure: str, name: str, number: int, shift: float) -> None:
    """Draw one system: a line over the slots, and a separate point for the shuffled order."""
    color, marker = COLORS[number % len(COLORS)], MARKERS[number % len(MARKERS)]
    left_out = max(cell.not_fitting for cell in cells)
    label = name if not left_out else f"{name} ({left_out} of {cells[0].rows} do not fit)"
    points = [
        (place + shift, cell.figures[measure], cell.condition.kind == "slot")
        for place, cell in enumerate(cells)
        if cell.figures
    ]
    line = [(x, found.mean) for x, found, is_slot in points if is_slot]
    axes.plot([x for x, _ in line], [y for _, y in line], color=color, linewidth=1.8)
    axes.errorbar(
        [x for x, _, _ in points], [found.mean for _, found, _ in points],
        yerr=[[found.mean - found.low for _, found, _ in points], [found.high - found.mean for _, found, _ in points]],
        fmt=marker, color=color, markersize=5, capsize=2.5, elinewidth=1, label=label,
    )  # fmt: skip
