"""Answer a question from documents, and show its sources.

If ``--index`` is given or the documents' folder contains an index, that index is updated and used. Otherwise the
documents are indexed in memory for this question.

If this user runs ``kvfusion serve`` over the same documents and index with the same model, store and settings, that
server answers, and no model is loaded.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import InvalidInputError
from .arguments.keys import key_of_environment
from .arguments.values import plain_text, positive, variable_name
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
    from .. import Answer, AnswerPiece, Attribution, Document, InvarianceReport, KVFusionGenerator, ShownPrompt
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
    parser.add_argument(
        "--no-server", action="store_true", help="load the model even if a running server could answer"
    )
    parser.add_argument(
        "--api-key-env",
        type=variable_name,
        metavar="NAME",
        help="environment variable with an API key of the running server, if it has keys (default: none)",
    )


@dataclass(frozen=True, slots=True)
class _Asked:
    """An answer, its documents, and the results of further options."""

    answer: Answer
    documents: list[Document]
    report: IndexReport | None
    model: dict[str, Any]
    prompt: ShownPrompt | None = None
    attribution: Attribution | None = None
    shuffle_check: InvarianceReport | None = None
    by_server: bool = False


def run(args: argparse.Namespace) -> int:
    _check(args)
    folder = index_folder(args)
    asked = _ask_server(args, folder) or _ask_here(args, folder)
    if args.json:
        _say_json(asked, args.question, folder)
    else:
        _say(asked, args)
    return 0


def _check(args: argparse.Namespace) -> None:
    """Reject invalid arguments before models are loaded."""
    if args.json and args.stream:
        raise InvalidInputError("--stream and --json cannot be combined, because a stream is not one JSON object.")
    if not args.docs and args.index is None:
        raise InvalidInputError("there are no documents; pass them with --docs, or an index with --index.")
    require_store(args)


def _ask_server(args: argparse.Namespace, folder: Path | str | None) -> _Asked | None:
    """Return what a running server answers, or None if this user runs none over these documents and settings."""
    key = key_of_environment(args.api_key_env)
    if args.no_server or args.show_prompt or args.attribute or args.shuffle_check:
        return None
    from .same_user.client import ask_server
    from .same_user.place import socket_place

    request = {name: getattr(args, name) for name in ("question", "top_k", "mode", "focus", "stream")}
    events = ask_server(socket_place(args, folder), request | decoding_of(args), key)
    if events is None:
        return None
    from ..retrieval import IndexReport
    from ..schema import Answer, AnswerPiece, Document

    data = dict(next(events))
    report = None if data["update"] is None else IndexReport.from_dict(data["update"])
    _say_update(args, folder, report)

    def pieces() -> Iterator[AnswerPiece]:
        for event in events:
            data.update(event)
            if "piece" in event:
                yield AnswerPiece(**event["piece"])

    if args.stream:
        say_pieces(pieces(), show_reasoning=args.show_reasoning)
    answer = Answer.from_dict(data["answer"])
    if args.stream:
        say_spelling(answer)
    return _Asked(answer, [Document(**one) for one in data["documents"]], report, data["model"], by_server=True)


def _ask_here(args: argparse.Namespace, folder: Path | str | None) -> _Asked:
    """Load the model, and return what it answers."""
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
    return _Asked(answer, documents, report, generator.identity(), prompt, attribution, shuffle_check)


def _retrieve(
    args: argparse.Namespace, folder: Path | str | None, generator: KVFusionGenerator
) -> tuple[list[Document], IndexReport | None]:
    """Return the documents nearest to the question, from ``--docs`` if given and otherwise from the whole index."""
    with open_index(args, folder, generator.count_tokens, generator.settings.passage_length) as index:
        if not args.docs:
            return index.search(args.question, args.top_k), None
        report = index.update(args.docs)
        _say_update(args, folder, report)
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


def _say_update(args: argparse.Namespace, folder: Path | str | None, report: IndexReport | None) -> None:
    """Print what changed in an index that is kept."""
    if report is None or folder is None or args.json or not (report.added or report.changed or report.removed):
        return
    counts = f"{len(report.added)} added, {len(report.changed)} changed, {len(report.removed)} removed"
    say(f"updated the index {shown_path(index_name(folder))}: {counts}\n")


def _say_json(asked: _Asked, question: str, folder: Path | str | None) -> None:
    say_json(
        {
            "question": question,
            **answer_to_json(asked.answer, asked.documents, asked.shuffle_check),
            "prompt": None if asked.prompt is None else asked.prompt.text,
            "attribution": None if asked.attribution is None else asked.attribution.to_dict(),
            "model": asked.model,
            "index": None if folder is None else index_name(folder),
            "update": None if asked.report is None else asked.report.to_dict(),
            "by_server": asked.by_server,
        }
    )


def _say(asked: _Asked, args: argparse.Namespace) -> None:
    """Print everything that was not printed while it was computed."""
    if not args.stream:
        if args.show_reasoning:
            say_reasoning(asked.answer)
        say_answer(asked.answer)
    say_notice(asked.answer)
    say_sources(asked.answer, args.question, asked.documents)
    say_facts(asked.answer)
    if asked.by_server:
        say("answered by the running server over these documents (--no-server loads the model here)")
    if asked.attribution is not None:
        say_attribution(asked.attribution)
    if asked.shuffle_check is not None:
        say_shuffle_check(asked.shuffle_check)
    if asked.report is not None:
        say_left_out(asked.report, heading="\nnot searched")
