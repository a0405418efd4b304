"""Answer a question from documents, and show its sources.

If ``--index`` is given or the documents' folder contains an index, that index is updated and used. Otherwise the
documents are indexed in memory for this question.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import InvalidInputError, RetrievalError
from .answers import (
    answer_to_json,
    say_answer,
    say_attribution,
    say_facts,
    say_pieces,
    say_reasoning,
    say_shuffle_check,
    say_sources,
    say_spelling,
)
from .arguments.paths import existing, output_folder
from .arguments.values import number, plain_text, positive, seed, stop
from .console import say, say_json, say_left_out, shown_path
from .options import (
    INDEX_FOLDER,
    add_focus,
    add_index_arguments,
    add_model_arguments,
    add_model_name,
    add_reasoning_limit,
    add_store_arguments,
    folder_of,
    load_generator,
    open_index,
    require_store,
)

if TYPE_CHECKING:
    from .. import Answer, Document, KVFusionGenerator
    from ..retrieval import IndexReport


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("question", type=plain_text, metavar="QUESTION", help="the question to answer")
    parser.add_argument(
        "--docs",
        nargs="+",
        type=existing,
        metavar="PATH",
        default=[],
        help="files and folders to search: txt, md, html, pdf (default: all files of --index)",
    )
    parser.add_argument(
        "--index",
        type=output_folder,
        metavar="DIR",
        help=f"folder of the index (default: {INDEX_FOLDER} next to the documents if there is one, otherwise memory)",
    )
    parser.add_argument(
        "--top-k", type=positive, default=5, metavar="N", help="number of documents to retrieve (default: 5)"
    )
    add_model_name(parser)
    add_model_arguments(parser)
    add_index_arguments(parser)
    add_store_arguments(parser)
    _add_answer_arguments(parser)
    parser.add_argument(
        "--attribute", action="store_true", help="show how much each document contributed to the answer"
    )
    parser.add_argument(
        "--shuffle-check",
        type=positive,
        metavar="N",
        help="answer again in N other orders of the documents, and compare answers and logits (default: not at all)",
    )


def _add_answer_arguments(parser: argparse.ArgumentParser) -> None:
    """Add how documents are read, and how the answer is sampled and printed."""
    parser.add_argument(
        "--mode", choices=["auto", "fusion", "concat", "ape"], help="how documents are read (default: the model's own)"
    )
    add_focus(parser)
    parser.add_argument(
        "--show-prompt", action="store_true", help="print the complete prompt, with marks around each document"
    )
    parser.add_argument(
        "--max-new-tokens", type=positive, metavar="N", help="maximum tokens of the answer (default: the model's own)"
    )
    add_reasoning_limit(parser)
    parser.add_argument("--show-reasoning", action="store_true", help="print the model's reasoning before its answer")
    parser.add_argument(
        "--temperature",
        type=number(0),
        default=0.0,
        metavar="X",
        help="sampling temperature (default: 0, the most likely token)",
    )
    parser.add_argument(
        "--seed",
        type=seed,
        metavar="N",
        help="seed that makes sampling at a temperature above 0 repeatable (default: random)",
    )
    parser.add_argument(
        "--stop",
        action="append",
        type=stop,
        default=[],
        metavar="TEXT",
        help="text that ends the answer; may be repeated (default: none)",
    )
    parser.add_argument("--stream", action="store_true", help="print the answer while it is computed (without --json)")


def run(args: argparse.Namespace) -> int:
    _check(args)
    folder = _index_folder(args)
    generator = load_generator(args)
    documents, report = _retrieve(args, folder, generator)
    options: dict[str, Any] = {"mode": args.mode, "focus": args.focus}
    prompt = generator.show_prompt(args.question, documents, **options) if args.show_prompt else None
    if prompt is not None and not args.json:
        say(f"{prompt}\n")
    answer = _answer(args, generator, documents, options)
    shuffle_check = None
    if args.shuffle_check:
        shuffle_check = generator.check_invariance(
            args.question, documents, permutations=args.shuffle_check, **options
        )
    attribution = None
    if args.attribute:
        attribution = generator.attribute(args.question, documents, answer=answer, **options)
    if generator.store is not None:
        generator.store.close()  # finishes uploads and saves when documents were last used
    if args.json:
        say_json(
            {
                "question": args.question,
                **answer_to_json(answer, documents, shuffle_check),
                "prompt": None if prompt is None else prompt.text,
                "attribution": None if attribution is None else attribution.to_dict(),
                "model": generator.identity(),
                "index": None if folder is None else str(folder.resolve()),
                "update": None if report is None else report.to_dict(),
            }
        )
        return 0
    if not args.stream:
        if args.show_reasoning:
            say_reasoning(answer)
        say_answer(answer)
    say_sources(answer, args.question, documents)
    say_facts(answer)
    if attribution is not None:
        say_attribution(attribution)
    if shuffle_check is not None:
        say_shuffle_check(shuffle_check)
    if report is not None:
        say_left_out(report, heading="\nnot searched")
    return 0


def _check(args: argparse.Namespace) -> None:
    """Reject invalid arguments before models are loaded."""
    if args.json and args.stream:
        raise InvalidInputError("--stream and --json cannot be combined, because a stream is not one JSON object.")
    if not args.docs and args.index is None:
        raise InvalidInputError("there are no documents; pass them with --docs, or an index with --index.")
    if not args.docs and not args.index.is_dir():
        raise RetrievalError(
            f"the index {str(args.index)!r} does not exist; pass its documents with --docs to create it."
        )
    require_store(args)


def _index_folder(args: argparse.Namespace) -> Path | None:
    """Return the folder of the index to use, or ``None`` for an index in memory."""
    if args.index is not None:
        return args.index
    candidates = (folder_of(path) / INDEX_FOLDER for path in args.docs)
    return next((folder for folder in candidates if folder.is_dir()), None)


def _retrieve(
    args: argparse.Namespace, folder: Path | None, generator: KVFusionGenerator
) -> tuple[list[Document], IndexReport | None]:
    """Return the documents nearest to the question, from ``--docs`` if given and otherwise from the whole index."""
    with open_index(args, folder, generator.count_tokens, generator.settings.passage_length) as index:
        if not args.docs:
            return index.search(args.question, args.top_k), None
        report = index.update(args.docs)
        if folder is not None and not args.json and (report.added or report.changed or report.removed):
            counts = f"{len(report.added)} added, {len(report.changed)} changed, {len(report.removed)} removed"
            say(f"updated the index {shown_path(folder.resolve())}: {counts}\n")
        return index.search(args.question, args.top_k, files=report.files), report


def _answer(
    args: argparse.Namespace, generator: KVFusionGenerator, documents: list[Document], options: dict[str, Any]
) -> Answer:
    """Return the answer. With ``--stream``, print its pieces as they are computed."""
    decoding = {name: getattr(args, name) for name in ("max_new_tokens", "temperature", "seed", "stop")}
    if not args.stream:
        return generator.answer(args.question, documents, **options, **decoding)
    stream = generator.stream(args.question, documents, **options, **decoding)
    say_pieces(stream.pieces, show_reasoning=args.show_reasoning)
    assert stream.answer is not None  # the stream is exhausted
    say_spelling(stream.answer)
    return stream.answer
