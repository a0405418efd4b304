"""Measure how well questions are answered with the gold document at every slot, for several systems side by side.

Rows are questions with answers and passages, the gold ones marked, as made by build-data or in lost-in-the-middle. All
systems answer the same rows, so that their differences have paired intervals. With --ray, workers on a Ray cluster
share the rows.
"""

from __future__ import annotations

import argparse
import logging
import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
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
from ..home import absolute
from .arguments.cluster import add_cluster_arguments, cluster_of
from .arguments.paths import existing_file, output_file, plot_file
from .arguments.values import count, names, number, plain_text, positive, whole
from .console import say, say_json
from .options import add_model_arguments, add_model_name, generator_spec, load_generator

if TYPE_CHECKING:
    from .. import KVFusionGenerator
    from ..cluster import ClusterOptions
    from ..data.rows import QARow
    from ..evaluation.ape import ApeSearch
    from ..evaluation.journal import Journal
    from ..evaluation.orders import Plan
    from ..evaluation.predictions import Predictions
    from ..evaluation.summary import Summary
    from ..evaluation.systems import Named
    from ..store import DocumentStore

logger = logging.getLogger(__name__)

SEARCH = ".search"  # suffix of the file beside that of --resume, for the answers of --ape-search


def add_arguments(parser: argparse.ArgumentParser) -> None:
    rows = "rows of build-data or lost-in-the-middle (.jsonl, .json, .gz)"
    parser.add_argument("rows", type=existing_file, metavar="ROWS", help=rows)
    add_model_name(parser)
    add_model_arguments(parser)
    add_cluster_arguments(parser)
    _add_systems(parser)
    _add_questions(parser)
    _add_files(parser)


def _add_systems(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--systems", type=names, metavar="A,B",
        help=f"some of {', '.join(SYSTEMS)}; the others are compared with the first (default: all whose inputs are "
        "given, those with focus only with --focus; --adapter and --decoder can both be given)",
    )  # fmt: skip
    add(
        "--focus", type=positive, metavar="N",
        help="documents that focus, focus-base and concat-focus keep (default: the model's own number, else 1)",
    )  # fmt: skip
    add(
        "--score-passages", action="store_true",
        help="score passages with the offline embedding model, like a retriever, for the systems with focus",
    )  # fmt: skip
    focus_weight = "weight of these scores, from 0 (default: the model's own, else 0)"
    add("--focus-weight", type=number(0), metavar="W", help=focus_weight)
    sft = "adapter folder or whole model that was trained on joined prompts (default: none)"
    add("--sft", type=plain_text, metavar="DIR", help=sft)
    concat_model = "another base model for concat and sft (default: that of the other systems)"
    add("--concat-model", type=plain_text, metavar="NAME", help=concat_model)
    add(
        "--ape-search", type=existing_file, metavar="ROWS",
        help="choose APE's temperature and scale on these rows (a sample of --limit), which are not evaluated "
        "(default: the temperature and scale of the settings)",
    )  # fmt: skip


def _add_questions(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--conditions", type=names, metavar="A,B",
        help=f"some of {', '.join(GROUPS)}, slot:N and top:K (default: all that the rows allow)",
    )  # fmt: skip
    add("--documents", type=positive, metavar="N", help="documents per question (default: as many as every row has)")
    add("--skip-rows", action="store_true", help="leave out rows with too few passages for the conditions")
    add("--limit", type=positive, metavar="N", help="evaluate a random sample of N rows (default: all)")
    add("--seed", type=count, default=0, metavar="N", help="seed of sample, shuffled order and intervals (default: 0)")
    add(
        "--memory", type=whole(1, 1 << 20), default=1, metavar="GIB",
        help="memory for document KVs, in GiB, which rows can share; of each worker, with --ray (default: 1)",
    )  # fmt: skip
    add("--batch-size", type=positive, default=8, metavar="N", help="questions answered together (default: 8)")
    add("--max-new-tokens", type=positive, metavar="N", help="maximum tokens of an answer (default: the model's own)")


def _add_files(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    for option, kind, text in (
        ("--output", output_file, "write all figures as JSON"),
        ("--markdown", output_file, "write the tables that are printed"),
        ("--plot", plot_file, "draw exact match by gold slot (png, svg, pdf)"),
        ("--predictions", output_file, "write every answer as JSON lines"),
    ):
        add(option, type=kind, metavar="FILE", help=f"{text} to this file (default: not written)")
    add(
        "--resume", type=output_file, metavar="FILE",
        help="record answers in this file, and resume from those in it; those of --ape-search are in FILE.search "
        "(default: not recorded)",
    )  # fmt: skip
    add("--force", action="store_true", help="overwrite files that exist")


def run(args: argparse.Namespace) -> int:
    from ..evaluation.bootstrap import Bootstrap
    from ..evaluation.report import make_report
    from ..evaluation.summary import summarize
    from ..evaluation.tables import markdown
    from ..store import DocumentStore, MemoryStore

    _require_outputs(args)
    cluster, bootstrap = cluster_of(args), Bootstrap(args.seed)
    inputs = _inputs(args)
    chosen = args.systems or default_systems(inputs, focus=args.focus is not None)
    require_systems(chosen)
    require_inputs(chosen, inputs)
    settings, search_facts = _settings(args), _file_facts(args.ape_search)  # before a file can change
    rows, plan = _rows_and_plan(args)
    store = DocumentStore(MemoryStore(args.memory << 30))  # shared by systems with the same base model
    models = Models(
        lambda options: _load(args, options, store), inputs, args.max_new_tokens, args.focus, args.focus_weight
    )
    journal, search = _journal(args.resume, args, rows, plan), _ape_search(args, chosen, rows, plan, models)
    if search is not None:
        plan = replace(plan, notes=(*plan.notes, search.note))
    ape = {} if search is None else search.settings
    if cluster is None:
        found = _evaluate_here(args, chosen, models, ape, rows, plan, journal)
    else:
        found = _evaluate_on_cluster(args, cluster, chosen, inputs, ape, rows, plan, journal)
    predictions, systems, refused = found
    plan = replace(plan, notes=(*plan.notes, *refused))
    summary = summarize(rows, predictions, bootstrap)
    report = make_report(summary, plan, systems, rows, settings)
    if cluster is not None:
        report["run"]["cluster"] = asdict(cluster)
    if search is not None:
        report["ape_search"] = search_facts | search.to_dict()
    tables = markdown(summary, report)
    _write(args, rows, predictions, summary, report, tables)
    if args.json:
        say_json(report)
    else:
        say(tables, end="")
    return 0


def _evaluate_here(
    args: argparse.Namespace, chosen: list[str], models: Models, ape: Mapping[str, Any], rows: list[QARow],
    plan: Plan, journal: Journal | None,
) -> tuple[Predictions, Sequence[Named], tuple[str, ...]]:  # fmt: skip
    """Return the predictions, the systems, and notes on those that were left out."""
    from ..evaluation.runner import predict

    factories = dict(SYSTEMS)
    if ape:
        factories["ape"] = lambda models: models.system("ape", "ape", "base", **ape)
    systems, refused = possible_systems(make_systems(chosen, models, factories), named=args.systems is not None)
    for note in refused:
        logger.warning("%s", note)
    if journal is not None:
        journal.require(systems)
    predictions = predict(
        rows, systems, plan, batch_size=args.batch_size, seed=args.seed, progress=args.verbosity >= 0, journal=journal
    )
    return predictions, systems, refused


def _evaluate_on_cluster(
    args: argparse.Namespace, cluster: ClusterOptions, chosen: list[str], inputs: Mapping[str, str | None],
    ape: Mapping[str, Any], rows: list[QARow], plan: Plan, journal: Journal | None,
) -> tuple[Predictions, Sequence[Named], tuple[str, ...]]:  # fmt: skip
    """Return the same as :func:`_evaluate_here`, from the workers of a cluster."""
    from ..cluster import SystemsSpec, evaluate_systems

    spec = SystemsSpec(
        generator_spec(args), chosen, inputs, leave_out=args.systems is None, max_new_tokens=args.max_new_tokens,
        focus=args.focus, focus_weight=args.focus_weight, ape=ape, memory_bytes=args.memory << 30,
    )  # fmt: skip
    found = evaluate_systems(
        rows,
        spec,
        plan,
        cluster=cluster,
        batch_size=args.batch_size,
        seed=args.seed,
        progress=args.verbosity >= 0,
        journal=journal,
    )
    for note in found.notes:
        logger.warning("%s", note)
    return found.predictions, found.systems, found.notes


def _inputs(args: argparse.Namespace) -> dict[str, str | None]:
    """Return the models and adapters on the command line besides the base model."""
    from ..model.location import locate_model

    inputs = {name: getattr(args, name) for name in ("adapter", "decoder", "sft", "concat_model")}
    if args.adapter == "shipped":
        shipped = locate_model(args.model, gguf_file=args.gguf_file).adapter
        inputs["adapter"] = None if shipped is None else str(shipped)
    return inputs


def _rows_and_plan(args: argparse.Namespace) -> tuple[list[QARow], Plan]:
    """Return the rows in the file's order, and the conditions."""
    from ..evaluation.orders import plan_conditions, usable_rows
    from ..evaluation.scores import with_scores
    from ..retrieval import SentenceTransformerEmbedder

    rows, notes = _read(args.rows), ()
    if args.skip_rows and rows:
        rows, notes = usable_rows(rows, args.conditions, args.documents)
    rows = _sample(rows, args)
    if args.score_passages:
        rows = list(with_scores(rows, SentenceTransformerEmbedder(device=args.device), progress=args.verbosity >= 0))
    plan = plan_conditions(rows, args.conditions, args.documents)
    plan = replace(plan, notes=(*notes, *plan.notes))
    for note in plan.notes:
        logger.warning("%s", note)
    if args.plot and not any(condition.kind == "slot" for condition in plan.conditions):
        raise InvalidInputError(
            "--plot draws exact match by gold slot, but the conditions have no slot; add slots to --conditions."
        )
    return rows, plan


def _sample(rows: list[QARow], args: argparse.Namespace) -> list[QARow]:
    """Return a random sample of ``--limit`` rows in the file's order, or all rows."""
    if args.limit is None or args.limit >= len(rows):
        return rows
    return [rows[index] for index in sorted(random.Random(args.seed).sample(range(len(rows)), args.limit))]


def _ape_search(
    args: argparse.Namespace, chosen: list[str], rows: list[QARow], plan: Plan, models: Models
) -> ApeSearch | None:
    """Run the search of ``--ape-search``, with as many documents per question as in the evaluation."""
    from ..evaluation.ape import require_search_rows, search_ape
    from ..evaluation.orders import ORIGINAL, usable_rows

    if args.ape_search is None:
        return None
    if "ape" not in chosen:
        raise InvalidInputError("--ape-search is given, but 'ape' is not one of the systems; add it to --systems.")
    search_rows = _read(args.ape_search)
    if args.skip_rows and search_rows:
        search_rows, _ = usable_rows(search_rows, [ORIGINAL.name], plan.documents)
    search_rows = _sample(search_rows, args)
    require_search_rows(search_rows, rows, plan.documents)
    file = None if args.resume is None else args.resume.with_name(args.resume.name + SEARCH)
    return search_ape(
        search_rows,
        models.generator("base"),
        documents=plan.documents,
        batch_size=args.batch_size,
        max_new_tokens=args.max_new_tokens,
        progress=args.verbosity >= 0,
        journal=_journal(file, args, search_rows, plan),
    )


def _journal(path: Path | None, args: argparse.Namespace, rows: list[QARow], plan: Plan) -> Journal | None:
    """Return the journal of ``--resume``, which must have the same facts."""
    from ..data.rows import rows_digest
    from ..evaluation.journal import Journal

    if path is None:
        return None
    facts = {"rows": rows_digest(rows), "documents": plan.documents, "seed": args.seed, "batch_size": args.batch_size}
    return Journal(path, facts)


def _read(path: Path) -> list[QARow]:
    from ..data import read_ready_rows

    return list(read_ready_rows(path))


def _load(args: argparse.Namespace, options: Mapping[str, str | None], store: DocumentStore) -> KVFusionGenerator:
    """Return the generator of the command line with ``options`` in place of its own."""
    own = {"gguf_file": None} if "model" in options else {}  # it belongs to the command line's model
    return load_generator(argparse.Namespace(**{**vars(args), **own, **options}), store)


def _require_outputs(args: argparse.Namespace) -> None:
    """Check, before a long run, that its output files can be written."""
    from ..data import check_output
    from ..evaluation.plots import require_plotting

    outputs, inputs, resumed = (
        [absolute(path) for path in paths if path is not None]
        for paths in (
            (args.output, args.markdown, args.plot, args.predictions, args.resume),
            (args.rows, args.ape_search),
            (args.resume,),
        )
    )
    if len(inputs) != len(set(inputs)):
        raise InvalidInputError(f"--ape-search is {inputs[0].name}, but it must name rows that are not evaluated.")
    for place, path in enumerate(outputs):
        if path in outputs[:place]:
            raise InvalidInputError(f"{path.name} is named twice, but all files must differ.")
        check_output(path, force=args.force or path in resumed, inputs=inputs)
    if args.plot is not None:
        require_plotting(args.plot)


def _settings(args: argparse.Namespace) -> dict[str, Any]:
    names = ("limit", "seed", "batch_size", "score_passages", "focus", "focus_weight")
    facts = {name: getattr(args, name) for name in names}
    return _file_facts(args.rows) | facts


def _file_facts(path: Path | None) -> dict[str, Any]:
    from ..evaluation.report import file_digest

    return {} if path is None else {"file": path.name, "file_sha256": file_digest(path)}


def _write(
    args: argparse.Namespace, rows: list[QARow], predictions: Predictions, summary: Summary, report: dict[str, Any],
    tables: str,
) -> None:  # fmt: skip
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
