"""Answer a question from documents, and show its sources.

If ``--index`` is given or the documents' folder contains an index, that index is updated and used. Otherwise the
documents are indexed in memory for this question.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import InvalidInputError
from .arguments.values import plain_text, positive
from .console import say, say_json, say_left_out, shown_path
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
    index_folder,
    index_name,
    load_generator,
    open_index,
    require_store,
)
from .output.answers import (
    answer_to_json,
    say_answer,
    say_attribution,
    say_facts,
    say_notice,
    say_pieces,
    say_reasoning,
    say_shuffle_check,
    say_sources,
    say_spelling,
)

if TYPE_CHECKING:
    from .. import Answer, Document, KVFusionGenerator
    from ..retrieval import IndexReport


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("question", type=plain_text, metavar="QUESTION", help="the question to answer")
    add_retrieval_arguments(parser)
    add_model_name(parser)
    add_model_arguments(parser)
    add_index_arguments(parser)
    add_store_arguments(parser)
    add_mode(parser)
    add_focus(parser)
    add_min_support(parser)
    parser.add_argument(
        "--show-prompt", action="store_true", help="print the complete prompt, with marks around each document"
    )
    add_decoding_arguments(parser)
    add_reasoning_limit(parser)
    parser.add_argument("--show-reasoning", action="store_true", help="print the model's reasoning before its answer")
    parser.add_argument("--stream", action="store_true", help="print the answer while it is computed (without --json)")
    parser.add_argument(
        "--attribute", action="store_true", help="show how much each document contributed to the answer"
    )
    parser.add_argument(
        "--shuffle-check",
        type=positive,
        metavar="N",
        help="answer again in N other orders of the documents, and compare answers and logits (default: not at all)",
    )


def run(args: argparse.Namespace) -> int:
    _check(args)
    folder = index_folder(args)
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
                "index": None if folder is None else index_name(folder),
                "update": None if report is None else report.to_dict(),
            }
        )
        return 0
    if not args.stream:
        if args.show_reasoning:
            say_reasoning(answer)
        say_answer(answer)
    say_notice(answer)
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
    require_store(args)


def _retrieve(
    args: argparse.Namespace, folder: Path | str | None, generator: KVFusionGenerator
) -> tuple[list[Document], IndexReport | None]:
    """Return the documents nearest to the question, from ``--docs`` if given and otherwise from the whole index."""
    with open_index(args, folder, generator.count_tokens, generator.settings.passage_length) as index:
        if not args.docs:
            return index.search(args.question, args.top_k), None
        report = index.update(args.docs)
        if folder is not None and not args.json and (report.added or report.changed or report.removed):
            counts = f"{len(report.added)} added, {len(report.changed)} changed, {len(report.removed)} removed"
            say(f"updated the index {shown_path(index_name(folder))}: {counts}\n")
        return index.search(args.question, args.top_k, files=report.files), report


def _answer(
    args: argparse.Namespace, generator: KVFusionGenerator, documents: list[Document], options: dict[str, Any]
) -> Answer:
    """Return the answer. With ``--stream``, print its pieces as they are computed."""
    decoding = decoding_of(args)
    if not args.stream:
        return generator.answer(args.question, documents, **options, **decoding)
    stream = generator.stream(args.question, documents, **options, **decoding)
    say_pieces(stream.pieces, show_reasoning=args.show_reasoning)
    assert stream.answer is not None  # the stream is exhausted
    say_spelling(stream.answer)
    return stream.answer
