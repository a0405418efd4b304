"""The style of plots, and the pictures of README and docs."""

from __future__ import annotations

import ast
import re
import runpy
from pathlib import Path
from xml.etree import ElementTree

import pytest

from kvfusion_rag.plotting.style import COLORS, TEXT, new_figure, plot_style, save

matplotlib = pytest.importorskip("matplotlib")
ROOT = Path(__file__).parent.parent.parent
SCRIPT = ROOT / "benchmarks" / "plots.py"
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def luminance(colour: str) -> float:
    parts = matplotlib.colors.to_rgb(colour)
    linear = [part / 12.92 if part <= 0.03928 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def contrast(first: str, second: str) -> float:
    """Return the contrast of two colours, as WCAG defines it."""
    dark, light = sorted((luminance(first), luminance(second)))
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("page", ["#FFFFFF", "#0D1117"], ids=["light", "dark"])
def test_text_and_the_first_colours_stand_out_from_the_page(page):
    assert contrast(TEXT, page) > 4
    assert min(contrast(colour, page) for colour in COLORS[:3]) > 3
    assert min(contrast(colour, page) for colour in COLORS[:8]) > 1.9


def test_other_plots_keep_their_settings():
    before = dict(matplotlib.rcParams)
    with plot_style():
        new_figure("t", size=(4, 3))
    assert dict(matplotlib.rcParams) == before


def test_all_text_of_a_figure_has_the_colour_of_the_style():
    @plot_style()
    def draw():
        figure, (axes,) = new_figure("title", size=(4, 3))
        axes.plot([1, 2], label="line")
        axes.set_xlabel("x")
        axes.legend()
        figure.canvas.draw()
        return figure

    texts = [text for text in draw().findobj(matplotlib.text.Text) if text.get_text()]
    assert len(texts) > 5 and {matplotlib.colors.to_hex(text.get_color()) for text in texts} == {TEXT}


def test_figure_has_no_background_and_the_same_bytes_again(tmp_path):
    for name in ("a.svg", "b.svg", "a.png"):
        figure, (axes,) = new_figure("title", size=(4, 3))
        axes.plot([1, 2])
        save(figure, tmp_path / name)
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()
    assert matplotlib.image.imread(tmp_path / "a.png")[0, 0, 3] == 0


def test_one_command_draws_every_picture_from_the_committed_figures(tmp_path):
    script = runpy.run_path(str(SCRIPT))
    script["main"](["--output", str(tmp_path)])
    drawn = {path.name for path in tmp_path.iterdir()}
    assert drawn == {path.name for path in (ROOT / "docs" / "images").glob("*.svg")}
    for path in tmp_path.iterdir():
        size = [ElementTree.parse(one).getroot().get("viewBox") for one in (path, ROOT / "docs/images" / path.name)]
        assert size[0] == size[1], "the committed picture is of the same kind; make plots draws it again"
    assert {node.name for node in ast.parse(SCRIPT.read_text()).body if isinstance(node, ast.FunctionDef)} > set(
        script["PLOTS"]
    )


def test_speed_is_that_of_the_newest_run(tmp_path):
    script = runpy.run_path(str(SCRIPT))
    row = {"system": "memory", "documents": 20, "document_tokens": 256, "batch": 1, "hit_rate": 1.0}
    data = [("2026-01-02", 2.0), ("2026-01-03", 3.0), ("2026-01-01", 1.0)]
    for number, (date, median) in enumerate(data):
        rows = [row | {"seconds_to_first_token": dict.fromkeys(("median", "least", "most"), median)}]
        text = str({"rows": rows, "run": {"date": date}}).replace("'", '"')
        (tmp_path / f"answer_speed_qwen2.5-0.5b_float32_avx2_{number}.json").write_text(text)
    script["first_token"].__wrapped__.__globals__["RESULTS"] = tmp_path
    (axes,) = script["first_token"]().axes
    (line,) = [line for line in axes.lines if len(line.get_xdata()) and line.get_marker() == "D"]
    assert list(line.get_ydata()) == [3.0]


@pytest.mark.parametrize("name", [path.name for path in (ROOT / "docs" / "images").iterdir()])
def test_every_picture_is_on_a_page_with_a_description(name):
    found = [
        alt for page in PAGES for alt in re.findall(rf"!\[([^\]]*)\]\([\w/]*{re.escape(name)}\)", page.read_text())
    ]
    assert found and all(len(alt.split()) >= 4 for alt in found)
