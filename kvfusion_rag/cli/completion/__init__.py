"""Print a script that completes commands, options and paths in a shell.

Bash: eval "$(kvfusion completion bash)" in ~/.bashrc. Zsh: kvfusion completion zsh > DIR/_kvfusion, with a folder DIR
of $fpath. Fish: kvfusion completion fish > ~/.config/fish/completions/kvfusion.fish.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any

from ...errors import MissingDependencyError
from ..arguments import paths
from ..console import say_json
from ..parser import Parser

SHELLS = ("bash", "zsh", "fish")
FILES = (
    paths.existing, paths.existing_file, paths.output_file, paths.plot_file, paths.index_place, paths.settings_file,
    paths.store_place,
)  # fmt: skip
FOLDERS = (paths.existing_folder, paths.output_folder)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("shell", choices=SHELLS, help="shell that will run the script")


def run(args: argparse.Namespace) -> int:
    if find_spec("shtab") is None:
        raise MissingDependencyError.of_extra("a completion script", "shtab", "completion")
    import shtab

    for action in _actions(args.root):
        if action.type in FILES or action.dest == "model":
            action.complete = shtab.FILE  # pyright: ignore[reportAttributeAccessIssue]  # shtab reads it
        elif action.type in FOLDERS:
            action.complete = shtab.DIRECTORY  # pyright: ignore[reportAttributeAccessIssue]
    script = shtab.complete(args.root, args.shell).strip()
    if args.json:
        say_json({"shell": args.shell, "script": script})
    else:
        print(script)
    return 0


def _actions(parser: Parser) -> Iterator[Any]:
    """Yield the arguments of a parser and of those below it."""
    yield from parser._actions
    for inner in parser.inner().values():
        yield from _actions(inner)
