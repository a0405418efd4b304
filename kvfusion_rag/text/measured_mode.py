"""The mode and focus that ``kvfusion doctor --measure`` found best for a model, saved for later processes."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..home import home
from ..schema import MODES, Mode
from .json_text import is_number, parse_json
from .settings import is_count

logger = logging.getLogger(__name__)

Identity = tuple[str, str, str | None]  # digest of the weights, dtype, digest of the adapter


@dataclass(frozen=True, slots=True)
class Measured:
    """The mode and focus in which a model answered best.

    Attributes:
        focus: number of documents that mode "fusion" keeps; None for all.
        focus_weight: weight of the retriever's standardized score (``ModelSettings``).
    """

    mode: Mode
    focus: int | None = None
    focus_weight: float = 0.0


def measured(identity: Identity) -> Measured | None:
    """Return the best mode and focus measured for a model, or None if nothing was measured."""
    file = _file(identity)
    try:
        record = parse_json(file.read_text(encoding="utf-8"))
        best = Measured(record["mode"], record["focus"], record["focus_weight"])
        is_weight = is_number(best.focus_weight) and best.focus_weight >= 0
        valid = best.mode in MODES and (best.focus is None or is_count(best.focus)) and is_weight
        if not valid:
            raise ValueError(f"mode {best.mode!r}, focus {best.focus!r}, weight {best.focus_weight!r}")
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        logger.warning("%s is not readable (%s); run kvfusion doctor --measure again", file, error)
        return None
    return best


def keep_measurement(identity: Identity, model_id: str, best: Measured, table: list[dict[str, Any]]) -> Path:
    """Write the best mode and the measured table atomically, and return the file.

    Raises:
        OSError: the file cannot be written.
    """
    file = _file(identity)
    file.parent.mkdir(parents=True, exist_ok=True)
    record = {"model": model_id, **asdict(best), "table": table}
    handle, temporary = tempfile.mkstemp(dir=file.parent, suffix=".tmp")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as stream:
            json.dump(record, stream, indent=2)
        os.replace(temporary, file)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    return file


def _file(identity: Identity) -> Path:
    facts = json.dumps(identity)
    return home() / "measured" / f"{hashlib.sha256(facts.encode()).hexdigest()[:32]}.json"
