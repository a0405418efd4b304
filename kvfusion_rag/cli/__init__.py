"""The ``kvfusion`` command: one module per command, dispatched here.

A command module has ``add_arguments(parser)`` and ``run(args) -> int`` and is quick to import; it loads models
inside ``run``. Exit codes: 0 done, 1 a check failed, 2 the caller's mistake (one line on stderr), 130 stopped.
"""

from __future__ import annotations

import argparse
import atexit
import gc
import sys
from collections.abc import Sequence
from typing import NoReturn

from .. import __version__
from ..errors import KVFusionError
from . import adapt, ask, bench, build_data, doctor, evaluate, index, serve, store, train
from .console import Interruption, drop_output, print_error, quiet_libraries

COMMANDS = {
    "ask": ask,
    "index": index,
    "store": store,
    "serve": serve,
    "bench": bench,
    "doctor": doctor,
    "build-data": build_data,
    "train": train,
    "adapt": adapt,
    "evaluate": evaluate,
}


class UsageError(Exception):
    """The command line itself is wrong."""


class _Parser(argparse.ArgumentParser):
    """Reports a mistake as one line instead of the usage text."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message} (see {self.prog} --help)")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    if argv is None:  # the process ends with the command
        atexit.register(gc.freeze)
    with Interruption() as interruption:
        try:
            return _run(argv)
        except BrokenPipeError:
            drop_output()
            return 141
        except (Exception, KeyboardInterrupt) as error:
            if interruption.happened:
                return 130
            if not isinstance(error, KVFusionError | UsageError):
                raise
            print_error(str(error))
            return 2


def _run(argv: Sequence[str] | None) -> int:
    try:
        args = _parse(argv)
    except SystemExit as done:  # --help and --version
        sys.stdout.flush()
        return int(done.code or 0)
    try:
        with quiet_libraries():
            return args.run(args)
    finally:
        gc.unfreeze()


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = _Parser(
        prog="kvfusion", description="Answers from documents that are read apart, so that their order does not matter."
    )
    parser.add_argument("--version", action="version", version=f"kvfusion {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True, parser_class=_Parser)
    for name, module in COMMANDS.items():
        summary = (module.__doc__ or "").splitlines()[0].rstrip(".")
        command = commands.add_parser(name, help=summary, description=summary + ".")
        module.add_arguments(command)
        command.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
        command.set_defaults(run=module.run)
    return parser.parse_args(argv)
