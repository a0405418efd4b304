"""Measure how well questions are answered wherever the gold document stands, for several systems side by side.

Rows are questions with answers and passages, the gold ones marked: this project's or lost-in-the-middle's. All
systems answer the same rows, so that their differences come with paired intervals.
"""

from __future__ import annotations

import argparse
import logging
import os
import random
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import InvalidInputError
from ..evaluation.orders import GROUPS
from ..evaluation.systems import (
    SYSTEMS,
    Models,
    default_systems,
    make_systems,
    possible_systems,
    require_inputs,
    require_systems,
)
from .console import say, say_json
from .options import add_model_arguments, add_model_name, count, load_generator, positive

if TYPE_CHECKING:
    from .. import KVFusionGenerator
    from ..data.rows import QARow
    from ..evaluation.ape import ApeSearch
    from ..evaluation.journal import Journal
    from ..evaluation.orders import Plan
    from ..evaluation.runner import Predictions
    from ..evaluation.summary import Summary
    from ..store import DocumentStore

logger = logging.getLogger(__name__)

SEARCH = ".search"  # ending of the file beside that of --resume, for the answers that --ape-search asks for


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("rows", metavar="ROWS", help="rows of build-data, or of lost-in-the-middle (.jsonl, .gz too)")
    add_model_name(parser)
    add_model_arguments(parser)
    parser.add_argument(
        "--systems",
        type=names,
        metavar="A,B",
        help=f"out of {', '.join(SYSTEMS)}; others are compared with the first (default: those whose inputs are "
        "given, and those with focus if --focus is; --adapter and --decoder may both be)",
    )
    parser.add_argument(
        "--focus",
        type=positive,
        metavar="N",
        help="documents that focus, focus-base and concat-focus keep (default: the model's own number, else 1)",
    )
    parser.add_argument(
        "--score-passages",
        action="store_true",
        help="score passages with the offline embedding model, as a retriever does, for focus to weigh",
    )
    parser.add_argument(
        "--focus-weight", type=weight, metavar="W", help="of these scores (default: the model's own, else 0)"
    )
    parser.add_argument(
        "--sft", metavar="DIR", help="adapter folder or whole model that was trained on joined prompts"
    )
    parser.add_argument("--concat-model", metavar="NAME", help="another base model for concat and sft")
    parser.add_argument(
        "--ape-search",
        metavar="ROWS",
        help="choose APE's temperature and scale on these rows (a sample of --limit), which are not evaluated",
    )
    parser.add_argument(
        "--conditions",
        type=names,
        metavar="A,B",
        help=f"out of {', '.join(GROUPS)}, slot:N and top:K (default: all that the rows allow)",
    )
    parser.add_argument(
        "--documents", type=positive, metavar="N", help="documents of a question (default: as many as every row has)"
    )
    parser.add_argument(
        "--skip-rows", action="store_true", help="leave out rows that lack passages for the conditions, and say so"
    )
    parser.add_argument("--limit", type=positive, metavar="N", help="evaluate a random sample of N rows")
    parser.add_argument("--seed", type=count, default=0, help="of sample, shuffled order and intervals (default: 0)")
    parser.add_argument(
        "--memory", type=positive, default=1, metavar="GIB",
        help="memory for the keys and values of passages, which rows may share (default: 1)",
    )  # fmt: skip
    parser.add_argument("--batch-size", type=positive, default=8, metavar="N", help="questions at once (default: 8)")
    parser.add_argument("--max-new-tokens", type=positive, metavar="N", help="longest answer in tokens")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write all figures as JSON")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the tables that are printed")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw exact match by gold slot (png, svg, pdf)")
    parser.add_argument("--predictions", type=Path, metavar="FILE", help="write every answer as JSON lines")
    parser.add_argument(
        "--resume",
        type=Path,
        metavar="FILE",
        help="keep answers in this file as they come, and go on from those in it (those of --ape-search: FILE.search)",
    )
    parser.add_argument("--force", action="store_true", help="overwrite files that exist")


def names(text: str) -> list[str]:
    """Argument type: names with commas between them."""
    found = [name.strip() for name in text.split(",") if name.strip()]
    if not found:
        raise argparse.ArgumentTypeError("no name is given")
    return found


def weight(text: str) -> float:
    """Argument type: a finite number from 0."""
    try:
        found = float(text)
    except ValueError:
        found = -1.0
    if not 0 <= found < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 0")
    return found


def run(args: argparse.Namespace) -> int:
    from ..evaluation.bootstrap import Bootstrap
    from ..evaluation.report import make_report
    from ..evaluation.runner import predict
    from ..evaluation.summary import summarize
    from ..evaluation.tables import markdown
    from ..store import DocumentStore, MemoryStore

    inputs = _inputs(args)
    chosen = args.systems or default_systems(inputs, focus=args.focus is not None)
    require_systems(chosen)
    require_inputs(chosen, inputs)
    _require_outputs(args)
    settings, searched = _settings(args), _file_facts(args.ape_search)  # of the files as they are read now
    rows, plan = _rows_and_plan(args)
    store = DocumentStore(MemoryStore(args.memory << 30))  # systems over the same base share its documents
    models = Models(
        lambda options: _load(args, options, store), inputs, args.max_new_tokens, args.focus, args.focus_weight
    )
    journal = _journal(args.resume, args, rows, plan)
    factories, search = dict(SYSTEMS), _ape_search(args, chosen, rows, plan, models)
    if search is not None:
        factories["ape"] = lambda models: models.system("ape", "ape", "base", **search.settings)
        plan = replace(plan, notes=(*plan.notes, search.note))
    systems, refused = possible_systems(make_systems(chosen, models, factories), named=args.systems is not None)
    for note in refused:
        logger.warning("%s", note)
    plan = replace(plan, notes=(*plan.notes, *refused))
    if journal is not None:
        journal.require(systems)
    predictions = predict(
        rows, systems, plan, batch_size=args.batch_size, seed=args.seed, progress=True, journal=journal
    )
    summary = summarize(rows, predictions, Bootstrap(args.seed))
    report = make_report(summary, plan, systems, rows, settings)
    if search is not None:
        report["ape_search"] = searched | search.to_dict()
    tables = markdown(summary, report)
    _write(args, rows, predictions, summary, report, tables)
    if args.json:
        say_json(report)
    else:
        say(tables, end="")
    return 0


def _inputs(args: argparse.Namespace) -> dict[str, str | None]:
    """What the command line names to be judged beside the base model."""
    from ..model.location import locate_model

    found = {name: getattr(args, name) for name in ("adapter", "decoder", "sft", "concat_model")}
    if args.adapter == "shipped":
        shipped = locate_model(args.model, gguf_file=args.gguf_file).adapter
        found["adapter"] = None if shipped is None else str(shipped)
    return found


def _rows_and_plan(args: argparse.Namespace) -> tuple[list[QARow], Plan]:
    """The rows to ask, in the file's order, and the conditions to ask them under."""
    from ..evaluation.orders import plan_conditions, usable_rows

    rows, notes = _read(Path(args.rows)), ()
    if args.skip_rows and rows:
        rows, notes = usable_rows(rows, args.conditions, args.documents)
    rows = _sample(rows, args)
    if args.score_passages:
        rows = _scored(rows, args)
    plan = plan_conditions(rows, args.conditions, args.documents)
    plan = replace(plan, notes=(*notes, *plan.notes))
    for note in plan.notes:
        logger.warning("%s", note)
    if args.plot and not any(condition.kind == "slot" for condition in plan.conditions):
        raise InvalidInputError("--plot draws exact match by gold slot, but no slot is among the conditions.")
    return rows, plan


def _sample(rows: list[QARow], args: argparse.Namespace) -> list[QARow]:
    """A random sample of ``--limit`` rows in the file's order, or all."""
    if args.limit is None or args.limit >= len(rows):
        return rows
    return [rows[index] for index in sorted(random.Random(args.seed).sample(range(len(rows)), args.limit))]


def _scored(rows: list[QARow], args: argparse.Namespace) -> list[QARow]:
    from ..evaluation.scores import with_scores
    from ..retrieval import SentenceTransformerEmbedder

    return list(with_scores(rows, SentenceTransformerEmbedder(device=args.device)))


def _ape_search(
    args: argparse.Namespace, chosen: list[str], rows: list[QARow], plan: Plan, models: Models
) -> ApeSearch | None:
    """The search that ``--ape-search`` asks for, on as many documents a question as are evaluated."""
    from ..evaluation.ape import require_search_rows, search_ape
    from ..evaluation.orders import ORIGINAL, usable_rows

    if args.ape_search is None:
        return None
    if "ape" not in chosen:
        raise InvalidInputError("--ape-search is given, but 'ape' is not among the systems.")
    others = _read(Path(args.ape_search))
    if args.skip_rows and others:
        others, _ = usable_rows(others, [ORIGINAL.name], plan.documents)
    others = _sample(others, args)
    require_search_rows(others, rows, plan.documents)
    kept = None if args.resume is None else args.resume.with_name(args.resume.name + SEARCH)
    return search_ape(
        others,
        models.generator("base"),
        documents=plan.documents,
        batch_size=args.batch_size,
        max_new_tokens=args.max_new_tokens,
        progress=True,
        journal=_journal(kept, args, others, plan),
    )


def _journal(path: Path | None, args: argparse.Namespace, rows: list[QARow], plan: Plan) -> Journal | None:
    """The answers that ``--resume`` goes on from; what decides them has to be the same."""
    from ..data.rows import rows_digest
    from ..evaluation.journal import Journal

    if path is None:
        return None
    facts = {"rows": rows_digest(rows), "documents": plan.documents, "seed": args.seed, "batch_size": args.batch_size}
    return Journal(path, facts)


def _read(path: Path) -> list[QARow]:
    from ..training import read_ready_rows

    return list(read_ready_rows(path))


def _load(args: argparse.Namespace, options: Mapping[str, str | None], store: DocumentStore) -> KVFusionGenerator:
    """The generator of the command line with ``options`` in place of its own."""
    own = {"gguf_file": None} if "model" in options else {}  # it is a file of the command line's model
    return load_generator(argparse.Namespace(**{**vars(args), **own, **options}), store)


def _outputs(args: argparse.Namespace) -> list[Path]:
    return [path for path in (args.output, args.markdown, args.plot, args.predictions) if path is not None]


def _require_outputs(args: argparse.Namespace) -> None:
    """Fail on what could not be written before the hours that it takes to have something to write."""
    from ..evaluation.plots import require_plotting

    kept = [] if args.resume is None else [args.resume.resolve()]
    places = [*(path.resolve() for path in _outputs(args)), *kept]
    read = [Path(path).resolve() for path in (args.rows, args.ape_search) if path is not None]
    if len(read) != len(set(read)):
        raise InvalidInputError(
            f"--ape-search has to name other rows than those evaluated, but both are {read[0].name}."
        )
    for number, path in enumerate(places):
        if path in [*places[:number], *read]:
            raise InvalidInputError(f"{path.name} is named twice, but every file has to be another one.")
        if path.is_dir() or (path.exists() and not args.force and path not in kept):
            raise InvalidInputError(f"{str(path)!r} exists; name another file or overwrite it with --force.")
        if not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
            raise InvalidInputError(f"{str(path.parent)!r} is no folder that can be written to.")
    if args.plot is not None:
        require_plotting(args.plot)


def _settings(args: argparse.Namespace) -> dict[str, Any]:
    names = ("limit", "seed", "batch_size", "score_passages", "focus", "focus_weight")
    facts = {name: getattr(args, name) for name in names}
    return _file_facts(args.rows) | facts


def _file_facts(name: str | None) -> dict[str, Any]:
    from ..evaluation.report import file_digest

    if name is None:
        return {}
    if not Path(name).is_file():
        raise InvalidInputError(f"there is no file {name!r} to read rows from.")
    return {"file": Path(name).name, "file_sha256": file_digest(Path(name))}


def _write(
    args: argparse.Namespace,
    rows: list[QARow],
    predictions: Predictions,
    summary: Summary,
    report: dict[str, Any],
    tables: str,
) -> None:
    import json

    from ..evaluation.plots import plot_slots
    from ..evaluation.report import prediction_lines
    from ..evaluation.tables import headline

    if args.output is not None:
        args.output.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    if args.markdown is not None:
        args.markdown.write_text(tables, encoding="utf-8")
    if args.predictions is not None:
        with args.predictions.open("w", encoding="utf-8") as out:
            out.writelines(prediction_lines(rows, predictions))
    if args.plot is not None:
        plot_slots(summary, args.plot, title=headline(report).rstrip("."))
