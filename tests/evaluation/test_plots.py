"""The plot of exact match by gold slot, judged by the objects of its figure."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace

import pytest

from kvfusion_rag.evaluation.bootstrap import Interval
from kvfusion_rag.evaluation.orders import SHUFFLED, Condition
from kvfusion_rag.evaluation.plots import plot_slots, slots_figure
from kvfusion_rag.evaluation.summary import Cell, Summary
from kvfusion_rag.evaluation.systems import SYSTEMS

pytest.importorskip("matplotlib")


def summary(systems: Sequence[str], slots: Sequence[int], *, not_fitting: int = 0) -> Summary:
    conditions = (*(Condition("slot", slot) for slot in slots), SHUFFLED)
    cells = tuple(
        Cell(system, condition, 500, not_fitting, {"em": Interval(float(condition.number), 0.0, 60.0)})
        for system, condition in itertools.product(systems, conditions)
    )
    return Summary(tuple(systems), conditions, cells, (), (), ())


def require_inside(artist, figure) -> None:
    box, area = artist.get_window_extent(), figure.bbox
    assert area.x0 <= box.x0 and box.x1 <= area.x1 and area.y0 <= box.y0 and box.y1 <= area.y1


@pytest.mark.parametrize("slots", list(itertools.permutations([1, 5, 20])))
def test_slots_are_in_ascending_order_whatever_the_order_of_the_conditions(slots):
    (axes,) = slots_figure(summary(["fusion"], slots), title="t").axes
    assert [label.get_text() for label in axes.get_xticklabels()] == ["1", "5", "20", "shuffled"]
    assert list(axes.lines[0].get_ydata()) == [1, 5, 20]


def test_all_systems_have_different_colours_and_markers():
    (axes,) = slots_figure(summary(list(SYSTEMS), [1, 2]), title="t").axes
    points = [container.lines[0] for container in axes.containers]
    assert len(points) == len(SYSTEMS)
    assert len({line.get_color() for line in points}) == len({line.get_marker() for line in points}) == len(SYSTEMS)


@pytest.mark.parametrize("not_fitting", [0, 499])
@pytest.mark.parametrize("number", [1, 2, 5, len(SYSTEMS)])
@pytest.mark.parametrize("slots", [[1], [1, 5, 10, 15, 20, 40]])
def test_title_and_legend_are_whole_and_leave_room_for_the_panel(number, slots, not_fitting):
    names = sorted(SYSTEMS, key=len, reverse=True)[:number]
    figure = slots_figure(summary(names, slots, not_fitting=not_fitting), title="a model on rows.jsonl.gz " * 5)
    figure.canvas.draw()
    (axes,), (legend,) = figure.axes, figure.legends
    assert len(legend.get_texts()) == number
    for artist in (legend, *legend.get_texts(), axes.title, axes._left_title, axes.xaxis.label):
        require_inside(artist, figure)
    assert legend.get_window_extent().y1 <= axes.xaxis.label.get_window_extent().y0
    assert axes.bbox.height >= 2 * figure.dpi  # two inches


def test_another_measure_and_other_names_can_be_drawn():
    found = summary(["focus", "concat"], [1, 5])
    cells = [
        replace(cell, figures={"em": Interval(0, 0, 0), "answer_in_text": Interval(7.0 + number, 2, 40)})
        for number, cell in enumerate(found.cells)
    ]
    figure = slots_figure(
        replace(found, cells=tuple(cells)), title="t", measure="answer_in_text", names={"concat": "one prompt"}
    )
    (axes,), (legend,) = figure.axes, figure.legends
    assert [list(line.get_ydata()) for line in axes.lines if line.get_linewidth() == 1.8] == [[7, 8], [10, 11]]
    assert axes.get_ylabel() == "answer in text, % (95 % interval)"
    assert [text.get_text() for text in legend.get_texts()] == ["focus", "one prompt"]


def test_file_has_the_size_of_the_figure(tmp_path):
    from matplotlib.image import imread

    found = summary(list(SYSTEMS), [1, 5])
    plot_slots(found, tmp_path / "a.png", title="t")
    figure = slots_figure(found, title="t")
    height, width = imread(tmp_path / "a.png").shape[:2]
    assert (width, height) == tuple(round(160 * inches) for inches in figure.get_size_inches())
