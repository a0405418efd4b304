"""Draw the pictures of README and docs from committed figures: ``python benchmarks/plots.py`` (``make plots``).

Needs the extra ``evaluation``. Nothing is measured. New rows of the files below appear in the pictures.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator

from kvfusion_rag.engine.attribution import Attribution, Influence
from kvfusion_rag.evaluation.bootstrap import Interval
from kvfusion_rag.evaluation.orders import Condition
from kvfusion_rag.evaluation.plots import slots_figure
from kvfusion_rag.evaluation.summary import Cell, Summary
from kvfusion_rag.plotting.style import COLORS, MARKERS, new_figure, plot_style, save
from kvfusion_rag.training.curve import losses_figure
from kvfusion_rag.training.progress import Progress

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
SLOTS = RESULTS / "default_model_dev_nq_20_slots.json"
SPEED = "answer_speed_qwen2.5-0.5b_float32_avx2*.json"
ATTRIBUTION = RESULTS / "attribution_lighthouse.json"
CURVE = ROOT / "recipes" / "smollm2" / "curve.json"
DOCUMENT_TOKENS = 256
READERS = {"focus": "focus: fused, with the adapter", "concat": "concat: one joined prompt, without an adapter"}
SYSTEMS = {
    "generate": "transformers' generate, joined prompt",
    "cold": "kvfusion-rag, nothing stored",
    "disk": "kvfusion-rag, KVs on disk",
    "memory": "kvfusion-rag, KVs in memory",
}


def slots() -> Figure:
    """Return how often the answer contains a right one, by the slot of the gold document, for all systems in the file.

    Exact match would be 0 for a system without an adapter, which answers in sentences.
    """
    data = json.loads(SLOTS.read_text(encoding="utf-8"))
    conditions = tuple(_condition(name) for name in data["conditions"])
    cells = tuple(
        Cell(
            cell["system"],
            _condition(cell["condition"]),
            cell["rows"],
            cell["not_fitting"],
            {name: Interval(**values) for name, values in cell["figures"].items()},
        )
        for cell in data["cells"]
    )
    names = tuple(system["name"] for system in data["systems"])
    title = f"{data['systems'][0]['model_id']}, {data['rows']} questions of Natural Questions, "
    return slots_figure(
        Summary(names, conditions, cells, (), (), ()),
        title=title + f"{data['documents']} documents",
        measure="answer_in_text",
        names=READERS,
    )


@plot_style()
def first_token() -> Figure:
    """Return the time to the first token by the number of documents. The newest of several runs is shown."""
    points: dict[tuple[str, int], tuple[str, dict[str, float]]] = {}
    for path in sorted(RESULTS.glob(SPEED)):
        data = json.loads(path.read_text(encoding="utf-8"))
        for row in data["rows"]:
            usual = (row["document_tokens"], row["batch"], row["hit_rate"]) == (DOCUMENT_TOKENS, 1, 1.0)
            key = (row["system"], row["documents"])
            if usual and points.get(key, ("",))[0] < data["run"]["date"]:
                points[key] = (data["run"]["date"], row["seconds_to_first_token"])
    title = f"Documents of {DOCUMENT_TOKENS} tokens, Qwen2.5-0.5B's shape, float32, two threads of an AMD EPYC"
    figure, (axes,) = new_figure(title, size=(6.4, 4.4))
    for place, (system, label) in enumerate(SYSTEMS.items()):
        counts = sorted(number for name, number in points if name == system)
        times = [points[system, number][1] for number in counts]
        medians = [time["median"] for time in times]
        errors = [[t["median"] - t["least"] for t in times], [t["most"] - t["median"] for t in times]]
        axes.errorbar(
            counts, medians, yerr=errors, marker=MARKERS[place], color=COLORS[place], capsize=2.5, markersize=6,
            linewidth=1.8, label=label,
        )  # fmt: skip
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.xaxis.set_major_locator(FixedLocator(sorted({number for _, number in points})))
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(FuncFormatter(lambda value, place: f"{value:g}"))
        axis.set_minor_locator(NullLocator())
    axes.set_xlabel("documents")
    axes.set_ylabel("seconds to the first token")
    figure.legend(loc="outside lower center", ncols=2)
    return figure


def training() -> Figure:
    """Return the loss curve of the default model's adapter."""
    data = json.loads(CURVE.read_text(encoding="utf-8"))
    losses = list(zip(data["steps"], data["losses_nats_per_token"], strict=True))
    scores = [(score["step"], score["value"]) for score in data["dev_exact_match_percent"]]
    return losses_figure(
        Progress(data["steps"][-1], losses, scores=scores),
        title=f"The adapter of the default model, {data['steps'][-1]} steps",
    )


def attribution() -> Figure:
    """Return what each document contributed to the answer of the quick start."""
    data = json.loads(ATTRIBUTION.read_text(encoding="utf-8"))["attribution"]
    documents = tuple(Influence(**document) for document in data.pop("documents"))
    figure = Attribution(**data, documents=documents).plot().figure
    assert isinstance(figure, Figure)
    return figure


PLOTS: dict[str, Callable[[], Figure]] = {
    "slots": slots, "first_token": first_token, "training": training, "attribution": attribution
}  # fmt: skip


def _condition(name: str) -> Condition:
    kind, _, number = name.partition(":")
    return Condition(kind, int(number or 0))  # pyright: ignore[reportArgumentType]  # checked when the file was written


def main(argv: list[str] | None = None) -> None:
    """Write every picture as an SVG file."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "images", help="folder (default: docs/images)")
    args: Any = parser.parse_args(argv)
    for name, draw in PLOTS.items():
        save(draw(), args.output / f"{name}.svg")


if __name__ == "__main__":
    main()
