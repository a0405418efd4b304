"""What the commands share on the terminal: results to stdout, everything else to stderr.

Texts of documents and models are untrusted and may hold escape sequences, so they are made harmless before a
terminal sees them. Also keeps other libraries quiet while a command runs, and puts all back afterwards.
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
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, Self

LISTED_AT_MOST = 20

_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
_NOISY_LOGGERS = (
    "chromadb",
    "huggingface_hub",
    "sentence_transformers",
    "torch.utils._pytree",  # on what torchao registers
    "torchao",
    "transformers",
)
_QUIET_ENVIRONMENT = {
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_VERBOSITY": "error",
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_VERBOSITY": "error",
}


def printable(text: str) -> str:
    """``text`` without control characters (line breaks and tabs stay), fit for this terminal's encoding."""
    encoding = sys.stdout.encoding or "utf-8"
    return _CONTROL.sub("\ufffd", text).encode(encoding, errors="replace").decode(encoding)


def say(text: str = "", *, end: str = "\n") -> None:
    """Print a piece of the result at once."""
    print(printable(text), end=end, flush=True)


def say_json(result: Mapping[str, Any]) -> None:
    """Print the whole result as one JSON object, in ASCII so that every terminal and pipe takes it."""
    print(json.dumps(result, indent=2, default=str), flush=True)


def say_list(mark: str, items: list[str]) -> None:
    """Print one line per item, and how many more there are beyond a screenful."""
    for item in items[:LISTED_AT_MOST]:
        say(f"  {mark} {item}")
    if len(items) > LISTED_AT_MOST:
        say(f"  {mark} ... and {len(items) - LISTED_AT_MOST} more (--json lists all)")


def print_error(message: str) -> None:
    """The one line of a failure."""
    print(f"kvfusion: error: {printable(' '.join(message.split()))}", file=sys.stderr)


def shown_path(path: str | Path) -> str:
    """``path`` as somebody in the current folder would write it."""
    path = Path(path)
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


def drop_output() -> None:
    """Nobody reads stdout any more, so what is still to be flushed at exit goes nowhere."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class Interruption:
    """Remembers Ctrl-C: a library that is being imported may turn it into an error of its own."""

    def __init__(self) -> None:
        self.happened = False

    def __enter__(self) -> Self:
        self._owner = threading.current_thread() is threading.main_thread()  # others cannot set handlers
        if self._owner:
            self._former = signal.signal(signal.SIGINT, self._note)
        return self

    def __exit__(self, *exc_info: object) -> None:
        if self._owner:
            signal.signal(signal.SIGINT, self._former)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.happened = True
        raise KeyboardInterrupt


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Other libraries' hints and telemetry off, this package's warnings as single lines on stderr.

    Environment variables that the user has set win. Everything is put back at the end.
    """
    own = logging.getLogger("kvfusion_rag")
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("kvfusion: %(levelname)s: %(message)s"))
    levels = {name: logging.getLogger(name).level for name in _NOISY_LOGGERS}
    wanted = dict(_QUIET_ENVIRONMENT)
    if not sys.stderr.isatty():
        wanted["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    added = {name: value for name, value in wanted.items() if name not in os.environ}
    with warnings.catch_warnings():
        if not sys.warnoptions:
            warnings.simplefilter("ignore")
        own.addHandler(handler)
        os.environ.update(added)
        for name in levels:
            logging.getLogger(name).setLevel(logging.ERROR)
        try:
            yield
        finally:
            own.removeHandler(handler)
            for name in added:
                os.environ.pop(name, None)
            for name, level in levels.items():
                logging.getLogger(name).setLevel(level)


@contextmanager
def collection_paused() -> Iterator[None]:
    """Pause Python's garbage collector while libraries and models are loaded, and leave out of it what was loaded.

    It takes a fifth of the time of large imports, and over a second when a process ends, and finds next to nothing.
    ``gc.unfreeze`` puts everything back.
    """
    is_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if is_on:
            gc.enable()


@contextmanager
def patient_bars() -> Iterator[None]:
    """Transformers' bars only on a terminal, and only for what takes longer than a second."""
    from transformers.utils.logging import set_tqdm_hook

    def patient(make: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return make(*args, **kwargs | {"delay": 1, "leave": False, "disable": None})

    former = set_tqdm_hook(patient)
    try:
        yield
    finally:
        set_tqdm_hook(former)
