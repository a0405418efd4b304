"""Shows the figures of a speed run as Markdown: a line per system and case, with times and ratios to the floor."""

from __future__ import annotations

from typing import Any

from ..evaluation.tables import run_notes, titled

HEADS = (
    "system", "documents", "questions", "hits", "first token, ms", "x floor", "ms per token", "x floor", "total, ms",
    "tokens/s", "peak, MB", "first token, x faster", "total, x faster",
)  # fmt: skip


def markdown(figures: dict[str, Any]) -> str:
    """Return the table of ``AnswerRun.facts`` with its ``rows`` and ``run``."""
    options, peaks = figures["options"], figures["peaks"]
    weights = f" and {options['weights']}" if options.get("weights") else ""
    about = (
        f"**{options['shape']} in {options['dtype']}{weights}, random weights, {options['device']}.** Medians of "
        f"{options['repeats']} (least to most). x floor: ratio to the machine's limit, measured in this run as "
        f"{peaks['gflops']:,} GFLOP/s, {peaks['memory_gb_per_second']:,} GB/s of memory and "
        f"{peaks['load_gb_per_second']:,} GB/s into it. Peak: memory in addition to weights and stores. "
        "Faster: than generate."
    )
    table = titled("Answers", HEADS, [_cells(row) for row in figures["rows"]])
    return "\n\n".join([about, table, "\n".join(run_notes(figures["run"]))]) + "\n"


def _cells(row: dict[str, Any]) -> list[str]:
    documents = f"{row['documents']} x {row['document_tokens']}"
    questions = f"{row['batch']} x {row['question_tokens']} + {row['answer_tokens']}"
    questions += f", {row['over']}" if row["batch"] > 1 else ""
    if "left_out" in row:
        return [row["system"], documents, questions, row["left_out"], *["-"] * (len(HEADS) - 4)]
    faster = row.get("times_faster_than_generate", {})
    return [
        row["system"],
        documents,
        questions,
        f"{100 * row['hit_share']:.0f} %",
        _milliseconds(row["seconds_to_first_token"]),
        f"{row['times_floor']['first_token']:.2f}",
        _milliseconds(row["seconds_per_token"]),
        f"{row['times_floor']['token']:.2f}",
        _milliseconds(row["seconds_in_all"]),
        f"{row['tokens_per_second']:.4g}",
        f"{row['peak_memory_growth_bytes'] / 1e6:,.0f}",
        f"{faster['first_token']:.2f}" if faster else "-",
        f"{faster['in_all']:.2f}" if faster else "-",
    ]


def _milliseconds(spread: dict[str, float]) -> str:
    median, least, most = (_three_digits(1000 * spread[name]) for name in ("median", "least", "most"))
    return f"{median} ({least} to {most})"


def _three_digits(figure: float) -> str:
    return f"{figure:,.0f}" if figure >= 100 else f"{figure:.3g}"
