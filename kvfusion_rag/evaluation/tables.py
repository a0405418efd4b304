"""Shows the figures of a run as Markdown tables."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .bootstrap import Interval
from .orders import NO_GOLD, ORIGINAL, SHUFFLED, Condition
from .summary import Summary, main_metric

NO_FIT = "does not fit"


def markdown(summary: Summary, report: dict[str, Any]) -> str:
    """Return all tables under a headline. ``report`` comes from ``make_report``."""
    head = f"**{headline(report)}** Per cent with 95 % bootstrap intervals over questions."
    parts = [head, _gold_table(summary), _top_table(summary), _no_gold_table(summary)]
    parts += [_metrics_table(summary), _difference_table(summary), _foot(summary, report)]
    return "\n\n".join(part for part in parts if part) + "\n"


def headline(report: dict[str, Any]) -> str:
    """Return one sentence with models, questions and documents."""
    models = dict.fromkeys(system["model_id"] for system in report["systems"] if "model_id" in system)
    documents = f"{report['documents']} document{'s' * (report['documents'] != 1)}"
    rows = f"{report['rows']} question{'s' * (report['rows'] != 1)}"
    return f"{', '.join(models) or 'evaluation'} on {report['settings']['file']}: {rows}, {documents} each."


def _gold_table(summary: Summary) -> str:
    columns = [*summary.slots, *(c for c in (ORIGINAL, SHUFFLED) if c in summary.conditions)]
    if not columns:
        return ""
    heads = [f"gold at {c.number}" if c.kind == "slot" else c.label for c in columns]
    spreads = {one.system: one.points for one in summary.slot_spread} if len(summary.slots) > 1 else {}
    matches = {one.system: one.figure for one in summary.token_match}
    heads += ["spread over slots"] * bool(spreads) + ["token match"] * bool(matches)
    lines = []
    for name in summary.systems:
        cells = [_cell(summary, name, column) for column in columns]
        if spreads:
            points = spreads[name]
            cells.append("-" if points is None else f"{points:.1f}")
        if matches:
            cells.append(_shown(matches[name]))
        lines.append([name, *cells])
    return titled("Exact match by slot of the gold document", ["system", *heads], lines)


def _top_table(summary: Summary) -> str:
    columns = [condition for condition in summary.conditions if condition.kind == "top"]
    if not columns:
        return ""
    lines = [[name, *(_cell(summary, name, column) for column in columns)] for name in summary.systems]
    return titled("Exact match from the first k documents", ["system", *(f"k = {c.number}" for c in columns)], lines)


def _no_gold_table(summary: Summary) -> str:
    if NO_GOLD not in summary.conditions:
        return ""
    lines = [[name, _cell(summary, name, NO_GOLD)] for name in summary.systems]
    return titled('No gold document: empty or "unanswerable" answers', ["system", "abstained"], lines)


def _metrics_table(summary: Summary) -> str:
    """Return all metrics under one condition: shuffled, else the first one with a gold document."""
    answerable = [condition for condition in summary.conditions if condition != NO_GOLD]
    if not answerable:
        return ""
    condition = SHUFFLED if SHUFFLED in answerable else answerable[0]
    metrics = {"em": "EM", "em_cited": "EM, source's spelling", "answer_in_text": "answer in text", "f1": "F1",
               "abstained": "abstained"}  # fmt: skip
    lines = [[name, *(_cell(summary, name, condition, metric) for metric in metrics)] for name in summary.systems]
    return titled(f"All metrics, {condition.label}", ["system", *metrics.values()], lines)


def _difference_table(summary: Summary) -> str:
    if not summary.differences:
        return ""
    columns = summary.conditions
    figures = {(one.system, one.condition): one.figure for one in summary.differences}
    lines = [[name, *(_shown(figures[name, column], sign="+") for column in columns)] for name in summary.systems[1:]]
    title = f"Points above {summary.systems[0]} on the same questions (exact match; no-gold: abstained)"
    return titled(title, ["system", *(column.label for column in columns)], lines)


def _foot(summary: Summary, report: dict[str, Any]) -> str:
    notes = [f"- {note}" for note in report["notes"]]
    if any(cell.not_fitting for cell in summary.cells):
        notes.append(
            f"- {NO_FIT}: documents, question and answer together exceed the model's window; such questions are "
            "excluded from a system's figures, and differences use the questions that both systems could answer"
        )
    shown = [*(found for cell in summary.cells for found in cell.figures.values())]
    shown += [one.figure for one in (*summary.token_match, *summary.differences) if one.figure is not None]
    if any(figure.low == figure.high for figure in shown):
        notes.append("- no interval: all questions have the same value, so resampling shows no spread")
    return "\n".join([*notes, *run_notes(report["run"])])


def run_notes(run: dict[str, Any]) -> list[str]:
    """Return the facts of ``run_facts`` as list items."""
    versions = ", ".join(f"{name} {number}" for name, number in run["versions"].items())
    hardware = run["hardware"]
    threads = f"{hardware['threads']} thread{'s' * (hardware['threads'] != 1)}"
    where = hardware["accelerator"] or f"{hardware['processor']}, {threads}"
    commit = f", commit {run['commit']}" if run["commit"] else ""
    return [f"- {run['date']}{commit}; {where}; {versions}", f"- `{run['command']}`"]


def _cell(summary: Summary, system: str, condition: Condition, metric: str | None = None) -> str:
    cell = summary.cell(system, condition)
    if not cell.figures:
        return NO_FIT
    text = _shown(cell.figures[metric or main_metric(condition)])
    return f"{text}, {cell.not_fitting} of {cell.rows} do not fit" if cell.not_fitting else text


def _shown(figure: Interval | None, sign: str = "") -> str:
    if figure is None:
        return "-"
    if figure.low == figure.high:
        return f"{figure.mean:{sign}.1f}"
    return f"{figure.mean:{sign}.1f} ({figure.low:{sign}.1f} to {figure.high:{sign}.1f})"


def titled(title: str, heads: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """Return a titled table whose columns are also aligned in a terminal."""
    widths = [max(len(row[column]) for row in [heads, *lines]) for column in range(len(heads))]
    rows = [" | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in [heads, *lines]]
    rule = " | ".join("-" * max(width, 3) for width in widths)
    return "\n".join([f"### {title}", "", *(f"| {row} |" for row in [rows[0], rule, *rows[1:]])])
