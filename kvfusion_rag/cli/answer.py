"""Answer all questions of a file, in this process or on a Ray cluster.

Each line of the file is a JSON object with ``question`` and ``documents``: texts, or objects with text, id, title,
score and metadata. Sources and citations name the metadata's ``place``. Documents that a line does not list are
retrieved from ``--docs`` or ``--index``. Answers keep the order of the questions. A question that cannot be answered
has a reason in its row, and the exit code is then 1.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Generator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from ..errors import InvalidInputError
from .arguments.cluster import add_cluster_arguments, cluster_of
from .arguments.paths import existing_file, output_file
from .console import patient_bars, say, say_json, say_list, shown_path
from .options import (
    add_decoding_arguments,
    add_focus,
    add_index_arguments,
    add_min_support,
    add_mode,
    add_model_arguments,
    add_model_name,
    add_reasoning_limit,
    add_retrieval_arguments,
    add_store_arguments,
    decoding_of,
    generator_spec,
    index_folder,
    load_token_counter,
    open_index,
    require_store,
)

if TYPE_CHECKING:
    from ..cluster.questions import Retrieve


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "questions", type=existing_file, metavar="FILE", help="JSON lines with question and documents (.gz too)"
    )
    parser.add_argument(
        "--output",
        type=output_file,
        metavar="FILE",
        help="file of the answers, replaced if it exists: .parquet, or JSON lines (default: printed as JSON lines)",
    )
    add_retrieval_arguments(parser)
    add_model_name(parser)
    add_model_arguments(parser)
    add_index_arguments(parser)
    add_store_arguments(parser)
    add_cluster_arguments(parser)
    add_mode(parser)
    add_focus(parser)
    add_min_support(parser)
    add_decoding_arguments(parser)
    add_reasoning_limit(parser)


def run(args: argparse.Namespace) -> int:
    require_store(args)
    cluster = cluster_of(args)
    _check_output(args)
    from ..cluster import answer_questions, read_questions

    options = {"mode": args.mode, "focus": args.focus, **decoding_of(args)}
    failed: dict[str, str] = {}
    count = 0
    rows: list[dict[str, Any]] = []
    with patient_bars(args.verbosity >= 0), _retrieval(args) as retrieve, _output(args, rows) as write:
        for row in answer_questions(
            read_questions(args.questions),
            generator_spec(args),
            cluster=cluster,
            retrieve=retrieve,
            answer_options=options,
        ):
            write(row)
            count += 1
            if row["error"] is not None:
                failed[row["id"]] = row["error"]
    if args.json:
        where = {"answers": rows} if args.output is None else {"output": str(args.output.resolve())}
        say_json({"questions": count, "failed": failed, **where})
    elif args.output is not None:
        say(f"{shown_path(args.output)}: {count - len(failed):,} answers, {len(failed):,} failed")
        say_list("!", [f"{name}: {reason}" for name, reason in failed.items()])
    return 1 if failed else 0


def _check_output(args: argparse.Namespace) -> None:
    """Reject an output that cannot be written, before models are loaded."""
    from ..cluster.writing import PARQUET, load_parquet

    if args.output is None:
        return
    if args.output.resolve() == args.questions.resolve():
        raise InvalidInputError(f"--output is {str(args.output)!r}, which is the file of the questions.")
    if args.output.suffix == PARQUET:
        load_parquet()


@contextmanager
def _retrieval(args: argparse.Namespace) -> Generator[Retrieve | None, None, None]:
    """Return a context with the function that retrieves the documents of a question, or None."""
    if not args.docs and args.index is None:
        yield None
        return
    folder = index_folder(args)
    count_tokens, passage_length = load_token_counter(args)
    with open_index(args, folder, count_tokens, passage_length) as index:
        files = index.update(args.docs).files if args.docs else None
        yield lambda question: index.search(question, args.top_k, files=files)


@contextmanager
def _output(args: argparse.Namespace, rows: list[dict[str, Any]]) -> Generator[Any, None, None]:
    """Return a context with the function that writes one answer: to a file, into ``rows``, or to stdout."""
    from ..cluster.writing import answers_file

    if args.output is not None:
        with answers_file(args.output) as write:
            yield write
    elif args.json:
        yield rows.append
    else:
        yield lambda row: say(json.dumps(row))
