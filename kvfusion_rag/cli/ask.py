"""Answer a question from documents, with the sources and the place where the answer stands.

Without an index the documents are indexed in memory for this one question. With ``--index``, or where the
documents' folder has one, the index on disk is brought up to date and used.
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
    say_shuffle_check,
    say_sources,
    say_spelling,
)
from .console import say, say_json, shown_path
from .options import (
    INDEX_FOLDER,
    add_focus,
    add_index_arguments,
    add_model_arguments,
    add_model_name,
    add_store_arguments,
    folder_of,
    load_generator,
    open_index,
    positive,
    require_paths,
    require_store,
)

if TYPE_CHECKING:
    from .. import Answer, Document, KVFusionGenerator
    from ..retrieval import IndexReport


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("question", metavar="QUESTION")
    parser.add_argument("--docs", nargs="+", metavar="PATH", default=[], help="files and folders (txt, md, html, pdf)")
    parser.add_argument(
        "--index", metavar="DIR", help=f"index on disk (default: {INDEX_FOLDER} beside the documents if there is one)"
    )
    parser.add_argument("--top-k", type=positive, default=5, metavar="N", help="documents to read (default: 5)")
    add_model_name(parser)
    add_model_arguments(parser)
    add_index_arguments(parser)
    add_store_arguments(parser)
    parser.add_argument("--mode", choices=["auto", "fusion", "concat", "ape"], help="default: the model's own")
    add_focus(parser)
    parser.add_argument(
        "--show-prompt", action="store_true", help="print what the model reads, with the borders of the documents"
    )
    parser.add_argument("--max-new-tokens", type=positive, metavar="N", help="longest answer in tokens")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 (default) takes the likeliest token")
    parser.add_argument("--seed", type=int, help="makes a temperature above 0 repeatable")
    parser.add_argument("--stop", action="append", default=[], metavar="TEXT", help="ends the answer; may be repeated")
    parser.add_argument("--stream", action="store_true", help="print the answer while it is made (not with --json)")
    parser.add_argument(
        "--attribute", action="store_true", help="what the answer is worth without each document, and its attention"
    )
    parser.add_argument(
        "--shuffle-check", type=positive, metavar="N", help="answer in N orders and compare the bytes and logits"
    )


def run(args: argparse.Namespace) -> int:
    _check(args)
    folder = _index_folder(args)
    generator = load_generator(args)
    documents, report = _retrieve(args, folder, generator)
    shown = None
    if args.show_prompt:
        shown = generator.show_prompt(args.question, documents, **_choices(args))
        if not args.json:
            say(f"{shown}\n")
    answer = _stream(args, generator, documents) if args.stream else _answer(args, generator, documents)
    shuffled = None
    if args.shuffle_check:
        shuffled = generator.check_invariance(
            args.question, documents, permutations=args.shuffle_check, **_choices(args)
        )
    attribution = None
    if args.attribute:
        attribution = generator.attribute(args.question, documents, answer=answer, **_choices(args))
    if generator.store is not None:
        generator.store.close()  # ends uploads, and notes which documents were used
    if args.json:
        say_json(
            {
                "question": args.question,
                **answer_to_json(answer, documents, shuffled),
                "prompt": shown.text if shown is not None else None,
                "attribution": None if attribution is None else attribution.to_dict(),
                "model": generator.identity(),
                "index": None if folder is None else str(folder.resolve()),
                "update": None if report is None else report.to_dict(),
            }
        )
        return 0
    if not args.stream:
        say_answer(answer)
    say_sources(answer, args.question, documents)
    say_facts(answer)
    if attribution is not None:
        say_attribution(attribution)
    if shuffled is not None:
        say_shuffle_check(shuffled)
    return 0


def _check(args: argparse.Namespace) -> None:
    """Fail on what is wrong with the command line before models are loaded."""
    if args.json and args.stream:
        raise InvalidInputError("--stream and --json exclude each other: a stream is no single JSON object.")
    if not args.question.strip():
        raise InvalidInputError("the question is blank.")
    if not args.docs and args.index is None:
        raise InvalidInputError("there is nothing to read: name documents with --docs or an index with --index.")
    if not args.docs and not Path(args.index).is_dir():
        raise RetrievalError(f"the index {args.index!r} does not exist; name its documents with --docs to make it.")
    require_paths(args.docs)
    require_store(args)


def _index_folder(args: argparse.Namespace) -> Path | None:
    """Folder of the index to use, or ``None`` for one in memory."""
    if args.index is not None:
        return Path(args.index)
    beside = (folder_of(path) / INDEX_FOLDER for path in args.docs)
    return next((folder for folder in beside if folder.is_dir()), None)


def _retrieve(
    args: argparse.Namespace, folder: Path | None, generator: KVFusionGenerator
) -> tuple[list[Document], IndexReport | None]:
    """The documents nearest to the question, out of ``--docs`` or else the whole index."""
    with open_index(args, folder, generator.count_tokens, generator.settings.passage_length) as index:
        if not args.docs:
            return index.search(args.question, args.top_k), None
        report = index.update(args.docs)
        if folder is not None and not args.json and (report.added or report.changed or report.removed):
            counts = f"{len(report.added)} added, {len(report.changed)} changed, {len(report.removed)} removed"
            say(f"index {shown_path(folder.resolve())} brought up to date: {counts}\n")
        return index.search(args.question, args.top_k, files=report.files), report


def _choices(args: argparse.Namespace) -> dict[str, Any]:
    return {"mode": args.mode, "focus": args.focus}


def _decoding(args: argparse.Namespace) -> dict[str, Any]:
    return {
        **_choices(args),
        "max_new_tokens": args.max_new_tokens,
        "temperature": args.temperature,
        "seed": args.seed,
        "stop": args.stop,
    }


def _answer(args: argparse.Namespace, generator: KVFusionGenerator, documents: list[Document]) -> Answer:
    return generator.answer(args.question, documents, **_decoding(args))


def _stream(args: argparse.Namespace, generator: KVFusionGenerator, documents: list[Document]) -> Answer:
    """Print the pieces as they come."""
    stream = generator.stream(args.question, documents, **_decoding(args))
    for piece in stream:
        say(piece, end="")
    say()
    assert stream.answer is not None  # the stream is exhausted
    say_spelling(stream.answer)
    return stream.answer
