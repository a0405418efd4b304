"""Calibrate support, the probability that documents answer a question, and measure how well it works.

Each question is answered over its documents and over the same ones without the gold document. One half of the
questions fits the calibration, and the figures are those of the other half.
"""

from __future__ import annotations

import argparse
import json
import random
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...errors import InvalidInputError
from ...home import absolute
from ..arguments.paths import existing_file, output_file, plot_file
from ..arguments.values import count, positive, share
from ..console import say, say_json
from ..options import add_model_arguments, add_model_name, add_store_arguments, load_generator, require_store

if TYPE_CHECKING:
    from ...data.rows import QARow
    from ...evaluation.support import SupportReport


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    rows = "rows of build-data with gold passages (.jsonl, .json, .gz)"
    add("rows", nargs="+", type=existing_file, metavar="ROWS", help=rows)
    add_model_name(parser)
    add_model_arguments(parser)
    add_store_arguments(parser)
    add("--limit", type=positive, metavar="N", help="use a random sample of N rows of each file (default: all)")
    add("--documents", type=positive, default=20, metavar="N", help="documents per question (default: 20)")
    add(
        "--score-passages", action="store_true",
        help="score passages with the offline embedding model, like a retriever, for a model with focus",
    )  # fmt: skip
    add(
        "--share", type=share, default=0.95, metavar="P",
        help="share of the answerable questions that the threshold keeps, from 0 to 1 (default: 0.95)",
    )  # fmt: skip
    add("--seed", type=count, default=0, metavar="N", help="seed of sample, halves and intervals (default: 0)")
    add("--batch-size", type=positive, default=8, metavar="N", help="questions answered together (default: 8)")
    for option, kind, text in (
        ("--output", output_file, "write figures and curve as JSON"),
        ("--plot", plot_file, "draw the curve (png, svg, pdf)"),
        ("--settings", output_file, "write the model's settings with the calibration, as its kvfusion.json,"),
    ):
        add(option, type=kind, metavar="FILE", help=f"{text} to this file (default: not written)")
    add("--force", action="store_true", help="overwrite files that exist")


def run(args: argparse.Namespace) -> int:
    from ...evaluation.bootstrap import Bootstrap
    from ...evaluation.support import fit_calibration, halves, measure_rows, report_of, require_calibration_rows

    require_store(args)
    _require_outputs(args)
    bootstrap = Bootstrap(args.seed)
    rows = [row for path in args.rows for row in _sample(path, args)]
    require_calibration_rows(rows, args.documents)
    if args.score_passages:
        rows = _scored(rows, args)
    generator = load_generator(args)
    found = measure_rows(generator, rows, args.documents, batch_size=args.batch_size, progress=True)
    fitting, measuring = halves(list(found), args.seed)
    calibration = fit_calibration(fitting, args.share)
    report = report_of(calibration, measuring, args.share, bootstrap)
    data = _data(args, report, len(rows), generator.identity())
    settings = replace(generator.settings, support=calibration)
    for path, written in ((args.output, data), (args.settings, settings.to_dict())):
        if path is not None:
            path.write_text(json.dumps(written, indent=2) + "\n", encoding="utf-8")
    if args.plot is not None:
        from ...evaluation.plots import plot_support

        plot_support(report.curve, args.plot, title=f"{generator.model_id}, {report.questions} questions")
    if args.json:
        say_json(data)
    else:
        _say(report, args.share)
    return 0


def _sample(path: Path, args: argparse.Namespace) -> list[QARow]:
    """Return a random sample of ``--limit`` rows in the file's order, or all rows."""
    from ...data import read_ready_rows

    rows = list(read_ready_rows(path))
    if args.limit is None or args.limit >= len(rows):
        return rows
    return [rows[index] for index in sorted(random.Random(args.seed).sample(range(len(rows)), args.limit))]


def _scored(rows: list[QARow], args: argparse.Namespace) -> list[QARow]:
    from ...evaluation.scores import with_scores
    from ...retrieval import SentenceTransformerEmbedder

    return list(with_scores(rows, SentenceTransformerEmbedder(device=args.device), progress=True))


def _require_outputs(args: argparse.Namespace) -> None:
    """Check, before a long run, that its output files can be written."""
    from ...data import check_output
    from ...evaluation.plots import require_plotting

    outputs = [absolute(path) for path in (args.output, args.plot, args.settings) if path is not None]
    inputs = [absolute(path) for path in args.rows]
    if len(inputs) != len(set(inputs)):
        raise InvalidInputError("a file of rows is named twice, but its questions may be used only once.")
    for place, path in enumerate(outputs):
        if path in outputs[:place]:
            raise InvalidInputError(f"{path.name} is named twice, but all files must differ.")
        check_output(path, force=args.force, inputs=inputs)
    if args.plot is not None:
        require_plotting(args.plot)


def _data(args: argparse.Namespace, report: SupportReport, rows: int, identity: dict[str, Any]) -> dict[str, Any]:
    from ...evaluation.report import file_digest, run_facts

    names = ("limit", "documents", "score_passages", "share", "seed", "batch_size")
    return {
        "rows": rows,
        "files": [{"name": path.name, "sha256": file_digest(path)} for path in args.rows],
        "settings": {name: getattr(args, name) for name in names},
        "model": identity,
        "run": run_facts(),
        **report.to_dict(),
    }


def _say(report: SupportReport, share: float) -> None:
    calibration = report.calibration
    say(f"{report.questions} questions, each with its gold document and without it")
    say(f"threshold {calibration.threshold:.3f}, which kept {share:.0%} of the questions that fitted it")
    for text, figure in (
        ("answerable questions that are answered", report.kept),
        ("unanswerable questions that are refused", report.refused),
        (f"refused if exactly {share:.0%} of these are answered", report.refused_at_share),
    ):
        say(f"  {text:45} {figure.mean:5.1f} % ({figure.low:.1f} to {figure.high:.1f})")
    alone = ", ".join(f"{name} {value:.3f}" for name, value in report.auc_of.items())
    say(f"  area under the curve {report.auc:.3f} (alone: {alone}), mean squared error {report.brier:.3f}")
    for one in report.fallbacks:
        say(
            f"  with {', '.join(one.signals)} only: refused at {share:.0%} {one.refused_at_share.mean:.1f} %, "
            f"area under the curve {one.auc:.3f}"
        )
    say("  answered  refused  right among the answered")
    for point in report.curve[::5]:
        say(f"  {point.kept:7.0%}  {point.refused:7.0%}  {point.accuracy:7.0%}")
