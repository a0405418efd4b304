"""The ``kvfusion`` command, with one module per subcommand.

Command-line arguments come in. Results go to stdout, and messages to stderr. The exit code is 0 after success, 1 if
a check failed, 2 after an error, which is one line on stderr, and 130 after an interruption. A command module has
``add_arguments(parser)`` and ``run(args) -> int``. It must not import torch or models before ``run``, so that
``--help`` is fast, and must not contain logic that the Python API lacks.
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
from . import adapt, answer, ask, bench, build_data, calibrate, chat, doctor, evaluate, index, serve, store, train
from .console import Interruption, drop_output, library_settings, print_error

COMMANDS = {
    "ask": ask,
    "chat": chat,
    "answer": answer,
    "index": index,
    "store": store,
    "serve": serve,
    "bench": bench,
    "doctor": doctor,
    "build-data": build_data,
    "train": train,
    "adapt": adapt,
    "evaluate": evaluate,
    "calibrate": calibrate,
}


class UsageError(Exception):
    """The command line is invalid."""


class _Parser(argparse.ArgumentParser):
    """A parser that reports an error in one line, without the usage text."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message} (see {self.prog} --help)")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    if argv is None:  # the process ends with this command, so the final garbage collection can be skipped
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
            if not isinstance(error, KVFusionError | UsageError | OSError | MemoryError):
                raise
            print_error(_sentence(error))
            return 2


def _sentence(error: Exception) -> str:
    if isinstance(error, MemoryError):
        return "there is too little memory for these numbers."
    if isinstance(error, OSError) and error.strerror is not None:  # such as a name that is too long, or a full disk
        return f"{error.filename!r} cannot be used: {error.strerror}." if error.filename else f"{error.strerror}."
    return str(error)


def _run(argv: Sequence[str] | None) -> int:
    try:
        args = _parse(argv)
    except SystemExit as done:  # --help and --version
        sys.stdout.flush()
        return int(done.code or 0)
    try:
        with library_settings():
            return args.run(args)
    finally:
        gc.unfreeze()


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = _Parser(
        prog="kvfusion", description="Answers questions from documents whose order does not change the answer."
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
