"""The parser of the ``kvfusion`` command line.

It leaves defaults out, so that files and variables can replace them.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any, NoReturn

from .. import __version__
from .arguments.paths import settings_file
from .arguments.values import verbosity, whole
from .settings.files import FILE_NAME, Command
from .settings.settings import Settings

MAX_THREADS = 1 << 12


class UsageError(Exception):
    """The command line is invalid."""


@dataclass(frozen=True, slots=True)
class Option:
    """An option of a command, with what the parser no longer knows: its default, and whether it must be given."""

    action: argparse.Action
    default: Any
    required: bool

    @property
    def name(self) -> str:
        """Name in files and messages."""
        return self.action.dest.replace("_", "-")

    @property
    def default_value(self) -> Any:
        """Value of the option if nothing sets it. As in argparse, a text is read like an argument."""
        if isinstance(self.default, str) and self.action.type is not None:
            return self.action.type(self.default)  # pyright: ignore[reportCallIssue]
        return self.default


class Parser(argparse.ArgumentParser):
    """A parser that reports an error in one line, without the usage text.

    Attributes:
        options: the options by their attribute in the result, after :meth:`withhold_defaults`.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.options: dict[str, Option] = {}
        super().__init__(*args, **kwargs)

    def accept_parts(self) -> None:
        """Let all arguments without an option's name be left out, and accept any text for them."""
        for action in self._actions:
            if not action.option_strings and not isinstance(action, argparse._SubParsersAction):
                action.nargs, action.type, action.choices, action.required = "*", None, None, False

    @property
    def command(self) -> tuple[str, ...]:
        """The words of the command, such as ``("store", "stats")``."""
        return tuple(self.prog.split()[1:])

    def error(self, message: str) -> NoReturn:
        """Raise UsageError."""
        raise UsageError(f"{message} (see {self.prog} --help)")

    def withhold_defaults(self) -> None:
        """Leave options that are not given out of the result, and switch flags off with ``--no-FLAG``."""
        for action in list(self._actions):
            if not action.option_strings or action.dest == "help":
                continue
            self.options.setdefault(action.dest, Option(action, action.default, action.required))
            action.default, action.required = argparse.SUPPRESS, False
            if isinstance(action, argparse._StoreTrueAction):
                name = action.dest.replace("_", "-")
                opposite = f"--{name.removeprefix('no-')}" if name.startswith("no-") else f"--no-{name}"
                self.add_argument(
                    opposite, action="store_false", dest=action.dest, default=argparse.SUPPRESS, help=argparse.SUPPRESS
                )

    def leaves(self) -> Iterator[Parser]:
        """Yield the parsers that end a command: those of its actions, or this one if it has none."""
        inner = self.inner()
        if not inner:
            yield self
        for parser in inner.values():
            yield from parser.leaves()

    def inner(self) -> dict[str, Parser]:
        """Return the parsers of the next word of the command by that word."""
        found = [action for action in self._actions if isinstance(action, argparse._SubParsersAction)]
        return dict(found[0].choices) if found else {}


def build_parser(commands: Mapping[str, ModuleType]) -> Parser:
    """Return the parser of all commands. Its result has ``leaf``, the parser that ended the command, and ``run``."""
    root = Parser(
        prog="kvfusion", description="Answers questions from documents whose order does not change the answer."
    )
    root.add_argument("--version", action="version", version=f"kvfusion {__version__}")
    subparsers = root.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name, module in commands.items():
        summary = (module.__doc__ or "").splitlines()[0].rstrip(".")
        command = subparsers.add_parser(name, help=summary, description=summary + ".")
        module.add_arguments(command)
        command.set_defaults(run=module.run)
        for parser in (command, *command.inner().values()):
            add_common(parser)
            parser.withhold_defaults()
            parser.set_defaults(root=root, leaf=parser)
    return root


def add_common(parser: argparse.ArgumentParser) -> None:
    """Add the options that every command has."""
    add = parser.add_argument_group("options of every command").add_argument
    add("--json", action="store_true", help="print one JSON object and nothing else")
    verbose = add(
        "-v", "--verbose", action="count", dest="verbosity", default=0,
        help="report each step on standard error; -vv reports details too",
    )  # fmt: skip
    verbose.type = verbosity  # for a value in a file or variable
    quiet = "report only errors on standard error, and show no progress"
    add("-q", "--quiet", action="store_const", const=-1, dest="verbosity", help=quiet)
    add(
        "--threads", type=whole(1, MAX_THREADS), metavar="N",
        help="torch's threads on the CPU; with --ray, for each worker (default: OMP_NUM_THREADS, otherwise one per "
        "core; with --ray, 1)",
    )  # fmt: skip
    files = f"defaults of options, or none for no file (default: {FILE_NAME} in this folder, then the user's)"
    add("--config", type=settings_file, metavar="FILE", help=f"TOML file with {files}")


def parse(root: Parser, argv: list[str] | None) -> argparse.Namespace:
    """Return the arguments of a command: command line before environment variables, files and defaults.

    Raises:
        UsageError: the command line is invalid.
        InvalidInputError: a setting of a file or variable is invalid.
    """
    args = root.parse_args(argv)
    leaf: Parser = args.leaf
    settings, missing = load_settings(root, args), list[str]()
    for name, option in leaf.options.items():
        if hasattr(args, name):
            continue
        found = settings.find(leaf.command, option.action, option.name)
        if found is None and option.required:
            missing.append("/".join(option.action.option_strings))
        setattr(args, name, option.default_value if found is None else found.value)
    if missing:
        leaf.error(f"the following arguments are required: {', '.join(missing)}")
    return args


def load_settings(root: Parser, given: argparse.Namespace) -> Settings:
    """Return the settings of files and variables. ``given`` are the arguments of the command line.

    Raises:
        InvalidInputError: a file cannot be read, or a name is unknown.
    """
    known: dict[Command, set[str]] = {(): set()}
    for parser in root.leaves():
        names = {option.name for option in parser.options.values()} - {"config"}
        for length in range(len(parser.command) + 1):
            known.setdefault(parser.command[:length], set()).update(names)
    return Settings.load(known, getattr(given, "config", None), os.environ)
