"""Load a document or compute it again: whichever was faster when both were measured on this model and device."""

from __future__ import annotations

import json
import logging
import os
import threading
from contextlib import suppress
from pathlib import Path
from typing import Literal, get_args

from ..errors import InvalidInputError

logger = logging.getLogger(__name__)

Loading = Literal["auto", "always", "never"]
_ENOUGH_TOKENS = 256  # measured before a figure counts


class LoadPolicy:
    """Seconds a token for loading and for prefilling, taken from the first real ones and kept in a file.

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
        self._known = self._read()

    def should_load(self, model: str) -> bool:
        """Whether to read files of ``model`` at all; yes until both ways were measured."""
        if self._loading != "auto":
            return self._loading == "always"
        figures = self._known.get(model, {})
        return not figures.get("load", 0.0) > figures.get("prefill", float("inf"))

    def note_load(self, model: str, tokens: int, seconds: float) -> None:
        self._note(model, "load", tokens, seconds)

    def note_prefill(self, model: str, tokens: int, seconds: float) -> None:
        self._note(model, "prefill", tokens, seconds)

    def figures(self, model: str) -> dict[str, float]:
        """Seconds a token by way, as far as they are known."""
        return dict(self._known.get(model, {}))

    def _note(self, model: str, way: str, tokens: int, seconds: float) -> None:
        if not tokens or self._loading != "auto" or way in self._known.get(model, {}):
            return
        with self._lock:
            total, spent = self._running.get((model, way), (0, 0.0))
            total, spent = total + tokens, spent + seconds
            self._running[(model, way)] = total, spent
            if total < _ENOUGH_TOKENS:
                return
            self._known = {**self._known, model: {**self._known.get(model, {}), way: spent / total}}
        self._write()

    def _read(self) -> dict[str, dict[str, float]]:
        if self._file is None:
            return {}
        try:
            found = json.loads(self._file.read_text(encoding="utf-8"))
            return {
                str(model): {way: float(figures[way]) for way in ("load", "prefill") if way in figures}
                for model, figures in found.items()
            }
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
            logger.warning("the measurements in %s cannot be read (%s); they are made again", self._file, error)
            return {}

    def _write(self) -> None:
        if self._file is None:
            return
        fresh = self._file.with_name(f"{self._file.name}.{os.getpid()}.{threading.get_ident()}.tmp")
        try:
            fresh.write_text(json.dumps(self._known, indent=1), encoding="utf-8")
            os.replace(fresh, self._file)
        except OSError as error:
            logger.debug("measurements are not kept: %s", error)
            with suppress(OSError):  # as on a file system that is read-only
                fresh.unlink(missing_ok=True)
