"""The ``kvfusion`` command, with one module per subcommand.

Command-line arguments come in. Results go to stdout, and messages to stderr. The exit code is 0 after success, 1 if
a check failed, 2 after an error, which is one line on stderr, and 130 after an interruption. A command module has
``add_arguments(parser)`` and ``run(args) -> int``. It must not import torch or models before ``run``, so that
``--help`` is fast, and must not contain logic that the Python API lacks.
"""

from __future__ import annotations

import atexit
import gc
import sys
from collections.abc import Sequence

from ..errors import KVFusionError
from . import (
    adapt,
    answer,
    ask,
    bench,
    build_data,
    calibrate,
    chat,
    completion,
    config,
    doctor,
    evaluate,
    index,
    serve,
    store,
    train,
)
from .console import Interruption, drop_output, library_settings, print_error, reporting, torch_threads
from .parser import UsageError, build_parser, parse

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
    "config": config,
    "completion": completion,
}


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
        return "there is not enough memory for these numbers."
    if isinstance(error, OSError) and error.strerror is not None:  # such as a name that is too long, or a full disk
        return f"{error.filename!r} cannot be used: {error.strerror}." if error.filename else f"{error.strerror}."
    return str(error)


def _run(argv: Sequence[str] | None) -> int:
    try:
        with library_settings():
            try:
                args = parse(build_parser(COMMANDS), None if argv is None else list(argv))
            except SystemExit as done:  # --help and --version
                sys.stdout.flush()
                return int(done.code or 0)
            with reporting(args.verbosity), torch_threads(args.threads):
                return args.run(args)
    finally:
        gc.unfreeze()
