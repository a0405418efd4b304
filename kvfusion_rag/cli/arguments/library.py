"""The options of a server's own files, and the library that is opened from them."""

from __future__ import annotations

import argparse
import threading
from collections.abc import Generator
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from ...errors import InvalidInputError, KVFusionError
from ..console import print_error, say, say_left_out, shows_progress
from ..options import add_index_arguments, add_retrieval_arguments, first_folder, index_folder, open_index
from .paths import existing_file, output_folder
from .values import count

if TYPE_CHECKING:
    from ... import Document, KVFusionGenerator
    from ...serving.library import Library

MAX_QUESTIONS = 6
MAX_QUESTION_CHARACTERS = 200
PREFILLED_IN_MEMORY = 100  # documents of the default model's length that fit into the memory store


def add_library_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the server's files, how they are searched, and where uploaded files are kept."""
    add_retrieval_arguments(parser)
    add_index_arguments(parser)
    parser.add_argument(
        "--watch", action="store_true", help="read files of --docs again when they change, while the server runs"
    )
    parser.add_argument(
        "--uploads",
        type=output_folder,
        metavar="DIR",
        help="folder that keeps uploaded files (default: a temporary folder, which is deleted when the server stops)",
    )
    parser.add_argument(
        "--max-uploads",
        type=count,
        default=50,
        metavar="N",
        help="maximum number of files that a tenant may upload, 0 for none (default: 50)",
    )
    parser.add_argument(
        "--questions",
        type=existing_file,
        metavar="FILE",
        help="JSON lines with example questions for the page (default: questions.jsonl in the first folder of --docs, "
        "if there is one)",
    )


def check_library(args: argparse.Namespace) -> None:
    """Reject options of a library that has no files, before models are loaded."""
    if args.watch and not args.docs:
        raise InvalidInputError("--watch is given without --docs; pass the files and folders that are watched.")
    if args.questions is not None and not has_library(args):
        raise InvalidInputError("--questions is given without --docs; pass the documents that answer them.")
    if args.uploads is not None and not args.max_uploads:
        raise InvalidInputError("--uploads is given with --max-uploads 0, which allows no files; omit one of them.")


@contextmanager
def open_library(args: argparse.Namespace, generator: KVFusionGenerator) -> Generator[Library | None, None, None]:
    """Index the files of the arguments, compute their KVs, and yield the library; ``None`` if there are no files."""
    if not has_library(args):
        yield None
        return
    from ...serving.library import Library, UploadSpace

    questions = _questions(args)
    with (
        open_index(args, index_folder(args), generator.count_tokens, generator.settings.passage_length) as index,
        _uploads_folder(args) as folder,
        closing(UploadSpace(folder, index.in_memory, args.max_uploads)) as uploads,
    ):
        own = uploads if args.max_uploads else None
        library = Library(index, docs=args.docs, uploads=own, top_k=args.top_k, questions=questions)
        report = library.update()
        if report is not None and not args.json:
            say(f"{len(report.files)} files, {report.chunks} chunks of up to {index.chunk_tokens} tokens")
            say_left_out(report, heading="not searched")
        _prefill(args, generator, index.documents(files=report and report.files), progress=shows_progress(args))
        with _watching(args, generator, library, index.folder):
            yield library


def has_library(args: argparse.Namespace) -> bool:
    """Return whether the server has files of its own."""
    return bool(args.docs) or args.index is not None or args.uploads is not None


@contextmanager
def _watching(
    args: argparse.Namespace, generator: KVFusionGenerator, library: Library, index_folder: Path | None
) -> Generator[None, None, None]:
    """With ``--watch``, update the library in a thread after each change of the files."""
    if not args.watch:
        yield
        return
    from ...retrieval import watch_folder

    def update() -> None:
        try:
            report = library.update()
        except KVFusionError as error:  # such as files that are all gone; the next change is tried again
            return print_error(str(error))
        assert report is not None  # --docs is given
        changed = [*report.added, *report.changed]
        if not args.json and (changed or report.removed):
            counts = f"{len(report.added)} added, {len(report.changed)} changed, {len(report.removed)} removed"
            say(f"the files have changed: {counts}")
        _prefill(args, generator, library.documents(changed), progress=False)

    stop = threading.Event()
    watch = partial(
        watch_folder, args.docs, update, stop, on_error=lambda error: print_error(str(error)), exclude=index_folder
    )
    thread = threading.Thread(target=watch, name="kvfusion-watch", daemon=True)
    library.is_watched = True
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


@contextmanager
def _uploads_folder(args: argparse.Namespace) -> Generator[Path, None, None]:
    if args.uploads is not None:
        yield args.uploads
        return
    with TemporaryDirectory(prefix="kvfusion-uploads-") as folder:
        yield Path(folder)


def _prefill(
    args: argparse.Namespace, generator: KVFusionGenerator, documents: list[Document], *, progress: bool
) -> None:
    """Store the KVs of documents that questions will read separately, all of them if ``--store`` keeps them."""
    mode = generator.mode if args.mode in (None, "auto") else args.mode
    is_joined = mode == "concat" and generator.focus_of(args.focus, mode) is None
    if is_joined or generator.settings.positions == "global" or not documents:
        return
    from ... import Message

    question = "?"  # only the text in front of the documents is part of their keys
    generator.prefill(
        documents if args.store else documents[:PREFILLED_IN_MEMORY],
        prompt=[Message("user", question)],
        question=question,
        progress=progress,
    )


def _questions(args: argparse.Namespace) -> list[str]:
    """Return the example questions of ``--questions``, or of the first folder of ``--docs``."""
    from ...data.rows import json_lines, require_object, required_text
    from ...retrieval.loaders import QUESTIONS_FILE

    path = args.questions
    if path is None:
        path = first_folder(args.docs) / QUESTIONS_FILE if args.docs else None
        if path is None or not path.is_file():
            return []
    found: list[str] = []
    for data, where, _ in json_lines(path):
        question = required_text(require_object(data, where, "a question must be a JSON object"), "question", where)
        found.append(question[:MAX_QUESTION_CHARACTERS])
        if len(found) == MAX_QUESTIONS:
            break
    return found
