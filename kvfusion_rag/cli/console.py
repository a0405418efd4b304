"""Terminal output shared by the commands: results go to stdout, everything else to stderr.

Texts of documents and models are untrusted, so control characters are removed before they reach the terminal. Other
libraries are silenced while a command runs, and all their settings are restored afterwards.
"""

from __future__ import annotations

import gc
import json
import logging
import os
import re
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    import argparse

    from ..retrieval import IndexReport

MAX_LISTED_ITEMS = 20

_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
_NOISY_LOGGERS = (
    "huggingface_hub",
    "pypdf",  # warns about each oddity of a file
    "ray.data",
    "ray.serve",
    "sentence_transformers",
    "torch.utils._pytree",  # warns about types that torchao registers
    "torchao",
    "transformers",
)
_ENVIRONMENT = {
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_VERBOSITY": "error",
    "RAY_USAGE_STATS_ENABLED": "0",
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_VERBOSITY": "error",
}
# Waiting threads sleep, so that other processes can use the processor. With GNU's OpenMP they spin for some
# microseconds first, because llama.cpp's threads wait for each other many times per token.
_WAITING = {"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "10000"}


_LEVELS = {-1: logging.ERROR, 0: logging.WARNING, 1: logging.INFO, 2: logging.DEBUG}
_THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")


def printable(text: str) -> str:
    """Replace control characters except line breaks and tabs, and characters that this terminal cannot encode."""
    encoding = sys.stdout.encoding or "utf-8"
    return _CONTROL.sub("\ufffd", text).encode(encoding, errors="replace").decode(encoding)


def say(text: str = "", *, end: str = "\n") -> None:
    """Print a part of the result and flush it."""
    print(printable(text), end=end, flush=True)


def say_json(result: Mapping[str, Any]) -> None:
    """Print the whole result as one JSON object, in ASCII so that every terminal and pipe can carry it."""
    print(json.dumps(result, indent=2, default=str), flush=True)


def say_list(mark: str, items: list[str]) -> None:
    """Print one line per item, up to a limit, and the number of items beyond it."""
    for item in items[:MAX_LISTED_ITEMS]:
        say(f"  {mark} {item}")
    if len(items) > MAX_LISTED_ITEMS:
        say(f"  {mark} ... and {len(items) - MAX_LISTED_ITEMS} more (--json lists all)")


def say_left_out(report: IndexReport, *, heading: str | None = None) -> None:
    """Print each skipped file and each part of a file that was left out, with the reason, if there are any."""
    if heading is not None and (report.skipped or report.left_out):
        say(heading)
    say_list("!", [f"{shown_path(one.path)}: {one.reason}" for one in report.skipped])
    say_list("!", [f"{shown_path(one.path)}: without {one.reason}" for one in report.left_out])


def print_error(message: str) -> None:
    """Print an error as one line on stderr."""
    print(f"kvfusion: error: {printable(' '.join(message.split()))}", file=sys.stderr)


def shown_path(path: str | Path) -> str:
    """Return ``path`` relative to the current folder if it is inside it. A URL is not changed."""
    if isinstance(path, str) and "://" in path:
        return path
    path = Path(path)
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


def drop_output() -> None:
    """Discard all further output, because the reader of stdout has gone."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class Interruption:
    """Records Ctrl-C, because a library that is being imported may turn KeyboardInterrupt into another error."""

    def __init__(self) -> None:
        self.happened = False

    def __enter__(self) -> Self:
        self._in_main_thread = threading.current_thread() is threading.main_thread()  # only it can set handlers
        if self._in_main_thread:
            self._previous_handler = signal.signal(signal.SIGINT, self._handle)
        return self

    def __exit__(self, *exc_info: object) -> None:
        if self._in_main_thread:
            signal.signal(signal.SIGINT, self._previous_handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.happened = True
        raise KeyboardInterrupt


@contextmanager
def until_stopped() -> Generator[threading.Event, None, None]:
    """Let Ctrl-C and SIGTERM end the block without an error. Both set the event. Needs the main thread."""
    stop = threading.Event()

    def end(number: int, frame: FrameType | None) -> None:
        stop.set()
        raise KeyboardInterrupt

    previous = {number: signal.signal(number, end) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    except (Exception, KeyboardInterrupt):  # a library may have turned the interruption into another error
        if not stop.is_set():
            raise
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


@contextmanager
def library_settings() -> Generator[None, None, None]:
    """Set the environment and the logging of other libraries for a command.

    Hints and telemetry are off, waiting threads sleep, and this package's warnings are single lines on stderr.

    Environment variables set by the user take precedence. All settings are restored at the end.
    """
    package_logger = logging.getLogger("kvfusion_rag")
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("kvfusion: %(levelname)s: %(message)s"))
    levels = {name: logging.getLogger(name).level for name in _NOISY_LOGGERS}
    variables = dict(_ENVIRONMENT)
    if not _WAITING.keys() & os.environ.keys():
        variables |= _WAITING
    if not sys.stderr.isatty():
        variables["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    added = {name: value for name, value in variables.items() if name not in os.environ}
    with warnings.catch_warnings():
        if not sys.warnoptions:
            warnings.simplefilter("ignore")
        package_logger.addHandler(handler)
        os.environ.update(added)
        for name in levels:
            logging.getLogger(name).setLevel(logging.ERROR)
        try:
            yield
        finally:
            package_logger.removeHandler(handler)
            for name in added:
                os.environ.pop(name, None)
            for name, level in levels.items():
                logging.getLogger(name).setLevel(level)


@contextmanager
def reporting(verbosity: int) -> Generator[None, None, None]:
    """Let this package log errors (-1), also warnings (0), also each step (1), or also details (2)."""
    logger = logging.getLogger("kvfusion_rag")
    former = logger.level
    logger.setLevel(_LEVELS[min(verbosity, max(_LEVELS))])
    try:
        yield
    finally:
        logger.setLevel(former)


def shows_progress(args: argparse.Namespace) -> bool:
    """Return whether a command may show progress bars: without ``--json`` and ``--quiet``."""
    return not args.json and args.verbosity >= 0


@contextmanager
def torch_threads(number: int | None) -> Generator[None, None, None]:
    """Let torch compute with this number of threads, or with its own choice if it is None.

    Torch reads the variables when it is loaded, so a command that needs no torch does not load it for this.
    """
    if number is None:
        yield
        return
    torch = sys.modules.get("torch")
    former_number = None if torch is None else torch.get_num_threads()
    former = {name: os.environ.get(name) for name in _THREAD_VARIABLES}
    os.environ.update(dict.fromkeys(_THREAD_VARIABLES, str(number)))
    if torch is not None:  # loaded already, such as to check --device
        torch.set_num_threads(number)
    try:
        yield
    finally:
        for name, value in former.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
        if torch is not None:
            torch.set_num_threads(former_number)


@contextmanager
def collection_paused() -> Generator[None, None, None]:
    """Pause Python's garbage collector while libraries and models are loaded, and freeze the loaded objects.

    Collections take a fifth of the time of large imports and over a second when a process ends, and find almost
    nothing. ``gc.unfreeze`` undoes the freeze.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if was_enabled:
            gc.enable()


@contextmanager
def patient_bars(shown: bool) -> Generator[None, None, None]:
    """Show progress bars of transformers only if ``shown``, on a terminal, for work of more than a second."""
    from transformers.utils.logging import set_tqdm_hook

    def delayed_bar(make: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return make(*args, **kwargs | {"delay": 1, "leave": False, "disable": None if shown else True})

    previous = set_tqdm_hook(delayed_bar)
    try:
        yield
    finally:
        set_tqdm_hook(previous)
