"""Show the value of every option of a command, and where it was set.

The command line comes first, then environment variables, then the nearest kvfusion.toml, then the default. Without a
command, all settings of files and variables are listed.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from typing import Any

from ...machine.secrets import without_password
from ..arguments.values import plain_text
from ..console import say, say_json
from ..parser import Parser, load_settings
from ..settings.files import section_name
from ..settings.settings import Setting, Settings, variable_of

COMMAND_LINE = "command line"
DEFAULT = "default"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "words", nargs=argparse.REMAINDER, type=plain_text, metavar="COMMAND ...",
        help="a command with its arguments, such as: serve --port 9000 (default: list only what is set)",
    )  # fmt: skip


def run(args: argparse.Namespace) -> int:
    if not args.words:
        _say_settings(load_settings(args.root, args), as_json=args.json)
        return 0
    for parser in args.root.leaves():
        parser.accept_parts()
    given = args.root.parse_args(args.words)
    if not hasattr(given, "config") and args.config is not None:
        given.config = args.config
    options = dict(_options(given, load_settings(args.root, given)))
    if args.json:
        shown = {name: {"value": one.value, "origin": one.origin} for name, one in options.items()}
        say_json(json.loads(without_password(json.dumps({"command": given.leaf.prog, "options": shown}, default=str))))
        return 0
    say(given.leaf.prog)
    width = max(map(len, options))
    for name, one in options.items():
        say(f"  {name:<{width}}  {_shown(one.value)}  ({one.origin})")
    return 0


def _options(given: argparse.Namespace, settings: Settings) -> Iterator[tuple[str, Setting]]:
    """Yield every option of the command with its value."""
    leaf: Parser = given.leaf
    for dest, option in leaf.options.items():
        if hasattr(given, dest):
            yield option.name, Setting(getattr(given, dest), COMMAND_LINE)
        else:
            found = settings.find(leaf.command, option.action, option.name)
            origin = "required" if option.required else DEFAULT
            yield option.name, found or Setting(option.default_value, origin)


def _say_settings(settings: Settings, *, as_json: bool) -> None:
    files = {
        file.shown: {section_name(command): dict(values) for command, values in file.sections.items()}
        for file in settings.files
    }
    variables = {variable_of(name): text for name, text in sorted(settings.variables.items())}
    if as_json:
        say_json(json.loads(without_password(json.dumps({"variables": variables, "files": files}, default=str))))
        return
    for variable, text in variables.items():
        say(f"{variable}: {_shown(text)}")
    for file, sections in files.items():
        for section, values in sections.items():
            for name, value in values.items():
                say(f"{file} {section} {name}: {_shown(value)}")
    if not variables and not any(section for sections in files.values() for section in sections.values()):
        say("no file or variable sets an option")


def _shown(value: Any) -> str:
    return "-" if value is None else without_password(json.dumps(value, default=str, ensure_ascii=False))
