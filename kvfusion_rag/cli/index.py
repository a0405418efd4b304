"""Index files and folders, so that later questions find their documents at once.

Only files that are new or changed since the last time are read and embedded; files that are gone leave the
index. Skipped files are listed with their reasons.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from .console import say, say_json, say_list, shown_path
from .options import INDEX_FOLDER, add_index_arguments, first_folder, load_token_counter, open_index, require_paths

if TYPE_CHECKING:
    from ..retrieval import IndexReport


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("paths", nargs="+", metavar="PATH", help="file or folder (txt, md, html, pdf)")
    parser.add_argument(
        "--index", metavar="DIR", help=f"folder of the index (default: {INDEX_FOLDER} in the first folder)"
    )
    parser.add_argument("--model", metavar="NAME", help="model that will read the chunks (default: the embedded one)")
    add_index_arguments(parser)
    parser.add_argument("--device", help="where the embedding model runs: cpu, cuda, ...")


def run(args: argparse.Namespace) -> int:
    require_paths(args.paths)
    folder = Path(args.index or first_folder(args.paths) / INDEX_FOLDER)
    count_tokens, passage_length = load_token_counter(args.model)
    with open_index(args, folder, count_tokens, passage_length) as index:
        report = index.update(args.paths)
        chunk_tokens = index.chunk_tokens
    if args.json:
        say_json({"index": str(folder.resolve()), "chunk_tokens": chunk_tokens, **report.to_dict()})
    else:
        _say_report(report, folder, chunk_tokens)
    return 0


def _say_report(report: IndexReport, folder: Path, chunk_tokens: int) -> None:
    say(f"{shown_path(folder)}: {report.chunks} chunk{'s' * (report.chunks != 1)} of up to {chunk_tokens} tokens")
    say(
        f"{len(report.added)} added, {len(report.changed)} changed, {len(report.removed)} removed, "
        f"{len(report.unchanged)} unchanged, {len(report.skipped)} skipped"
    )
    say_list("+", list(report.added))
    say_list("~", list(report.changed))
    say_list("-", list(report.removed))
    say_list("!", [f"{shown_path(one.path)}: {one.reason}" for one in report.skipped])
