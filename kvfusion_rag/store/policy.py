"""Load a document or compute it again: whichever is faster, as measured on this model and kind of device."""

from __future__ import annotations

import json
import logging
import os
import threading
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Literal, get_args

from ..errors import InvalidInputError

logger = logging.getLogger(__name__)

Loading = Literal["auto", "always", "never"]
_ENOUGH_TOKENS = 256  # measured together
_WEIGHT = 0.25  # of a new measurement in the running average
_AGAIN = 64  # refusals to load, after which it is tried once more, so that one bad measurement is not for ever
_WORTH_WRITING = 1.25  # times a figure has changed since it was written to the file
_VERSION = 2  # of the file; before, figures were for good and did not name the device


class LoadPolicy:
    """Seconds a token for loading and for prefilling: running averages of the real ones, kept in a file.

    Args:
        loading: "auto", or what to do always.
        file: where figures are kept; ``None`` keeps them in this process.
    """

    def __init__(self, loading: Loading, file: Path | None) -> None:
        if loading not in get_args(Loading):
            raise InvalidInputError(f"load is {loading!r}, but it must be one of {list(get_args(Loading))}.")
        self._loading, self._file = loading, file
        self._lock = threading.Lock()
        self._running: dict[tuple[str, str], tuple[int, float]] = {}
        self._refused: Counter[str] = Counter()
        self._known = self._read()
        self._written = self._known

    def should_load(self, model: str) -> bool:
        """Whether to read files at all for ``model`` (and its device); yes until both ways were measured."""
        if self._loading != "auto":
            return self._loading == "always"
        figures = self._known.get(model, {})
        if figures.get("load", 0.0) <= figures.get("prefill", float("inf")):
            return True
        with self._lock:
            self._refused[model] += 1
            return self._refused[model] % _AGAIN == 0

    def note_load(self, model: str, tokens: int, seconds: float) -> None:
        self._note(model, "load", tokens, seconds)

    def note_prefill(self, model: str, tokens: int, seconds: float) -> None:
        self._note(model, "prefill", tokens, seconds)

    def figures(self, model: str) -> dict[str, float]:
        """Seconds a token by way, as far as they are known."""
        return dict(self._known.get(model, {}))

    def _note(self, model: str, way: str, tokens: int, seconds: float) -> None:
        if not tokens or self._loading != "auto":
            return
        with self._lock:
            total, spent = self._running.get((model, way), (0, 0.0))
            total, spent = total + tokens, spent + seconds
            self._running[(model, way)] = total, spent
            if total < _ENOUGH_TOKENS:
                return
            del self._running[(model, way)]
            figures = self._known.get(model, {})
            figure = spent / total
            if way in figures:
                figure = (1 - _WEIGHT) * figures[way] + _WEIGHT * figure
            self._known = {**self._known, model: {**figures, way: figure}}
            written = self._written.get(model, {}).get(way, 0.0)
            if written / _WORTH_WRITING < figure < written * _WORTH_WRITING:
                return
            self._written = self._known
        self._write()

    def _read(self) -> dict[str, dict[str, float]]:
        if self._file is None:
            return {}
        try:
            found = json.loads(self._file.read_text(encoding="utf-8"))
            if found.get("version") != _VERSION:
                return {}
            return {
                str(model): {way: float(figures[way]) for way in ("load", "prefill") if way in figures}
                for model, figures in found["figures"].items()
            }
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            logger.warning("the measurements in %s cannot be read (%s); they are made again", self._file, error)
            return {}

    def _write(self) -> None:
        if self._file is None:
            return
        fresh = self._file.with_name(f"{self._file.name}.{os.getpid()}.{threading.get_ident()}.tmp")
        try:
            fresh.write_text(json.dumps({"version": _VERSION, "figures": self._written}, indent=1), encoding="utf-8")
            os.replace(fresh, self._file)
        except OSError as error:
            logger.debug("measurements are not kept: %s", error)
            with suppress(OSError):  # as on a file system that is read-only
                fresh.unlink(missing_ok=True)
