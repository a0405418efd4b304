"""Talk about your documents: ask questions in a terminal, or one per line of standard input.

The model stays loaded. A question that continues the conversation is rewritten so that it can be understood by itself,
and is shown as it was read. ``/help`` lists the commands.
"""

from __future__ import annotations

import argparse
from contextlib import closing

from ...errors import InvalidInputError
from ..options import (
    add_decoding_arguments,
    add_focus,
    add_index_arguments,
    add_min_support,
    add_mode,
    add_model_arguments,
    add_model_name,
    add_retrieval_arguments,
    add_store_arguments,
    decoding_of,
    index_folder,
    load_generator,
    open_index,
    require_store,
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_retrieval_arguments(parser)
    add_model_name(parser)
    add_model_arguments(parser)
    add_index_arguments(parser)
    add_store_arguments(parser)
    add_mode(parser)
    add_focus(parser)
    add_min_support(parser)
    add_decoding_arguments(parser)
    parser.add_argument(
        "--no-history", action="store_true", help="do not keep the questions for the next conversation"
    )


def run(args: argparse.Namespace) -> int:
    from .conversation import Conversation
    from .terminal import Terminal, open_lines

    require_store(args)
    if not args.docs and args.index is None:
        raise InvalidInputError("there are no documents; pass them with --docs, or an index with --index.")
    folder = index_folder(args)
    generator = load_generator(args)
    with open_index(args, folder, generator.count_tokens, generator.settings.passage_length) as index:
        report = index.update(args.docs) if args.docs else None
        files = None if report is None else report.files
        conversation = Conversation(
            generator,
            lambda question: index.search(question, args.top_k, files=files),
            mode=args.mode,
            focus=args.focus,
            decoding=decoding_of(args),
        )
        with closing(open_lines(keep=not args.no_history)) as lines:
            terminal = Terminal(conversation, index.files() if files is None else files, quiet=args.json)
            code = terminal.talk(lines, report)
    if generator.store is not None:
        generator.store.close()
    return code
