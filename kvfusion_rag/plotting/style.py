"""One style for all plots: readable on light and dark pages, in grey print, and for colour-blind readers."""

from __future__ import annotations

import textwrap
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

TEXT = "#777777"  # a contrast of about 4.4 with white and with GitHub's dark page
GRID = "#77777755"
TITLE_CHARACTERS = 70  # per line
# Okabe and Ito's colours come first, because colour-blind readers can distinguish them. Markers differ for grey print.
COLORS = (
    "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7F7F7F", "#6A5ACD", "#B03A66", "#999933",
    "#8C510A", "#2E8B57", "#DDCC77", "#A0522D",
)  # fmt: skip
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*", "<", ">", "p", "h", "d")


@contextmanager
def plot_style() -> Generator[None, None, None]:
    """Draw in this style until the block, or the decorated function, ends. Settings of other plots do not change."""
    import matplotlib

    with matplotlib.rc_context({
        "text.color": TEXT, "axes.labelcolor": TEXT, "axes.edgecolor": TEXT, "axes.titlecolor": TEXT,
        "xtick.color": TEXT, "ytick.color": TEXT, "grid.color": GRID, "grid.linewidth": 0.8, "legend.frameon": False,
        "legend.fontsize": 9, "figure.facecolor": "none", "axes.facecolor": "none",
    }):  # fmt: skip
        yield


def new_figure(title: str, *, size: tuple[float, float], panels: int = 1) -> tuple[Figure, list[Axes]]:
    """Return a figure of ``size`` (inches) with ``panels`` stacked panels that share their horizontal axis."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    axes: list[Axes] = list(figure.subplots(panels, 1, sharex=True, squeeze=False)[:, 0])
    for panel in axes:
        panel.grid(axis="y")
        panel.set_axisbelow(True)
        panel.spines[["top", "right"]].set_visible(False)
    axes[0].set_title(textwrap.fill(title, TITLE_CHARACTERS), fontsize=10, loc="left", pad=10)
    return figure, axes


def save(figure: Figure, path: Path) -> None:
    """Write a figure without a background. The same figure gives the same bytes of an SVG file."""
    import matplotlib

    metadata = {"Date": None} if path.suffix == ".svg" else None
    with matplotlib.rc_context({"svg.hashsalt": "kvfusion-rag"}):
        figure.savefig(path, dpi=160, transparent=True, metadata=metadata)
