"""The mode and focus that ``kvfusion doctor --measure`` found best for a model, kept between processes."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..home import home
from ..model.backbone import Backbone
from ..schema import MODES, Mode

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Measured:
    """The mode and focus in which a model answered best.

    Attributes:
        focus: documents that mode "fusion" keeps; None for all.
        focus_weight: of the retriever's standardized score, see ``ModelSettings``.
    """

    mode: Mode
    focus: int | None = None
    focus_weight: float = 0.0


def measured(backbone: Backbone, adapter: str | None) -> Measured | None:
    """What was measured best for these weights and this adapter (its digest), or None if nothing was."""
    file = _file(backbone, adapter)
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        best = Measured(found["mode"], found["focus"], float(found["focus_weight"]))
        valid = best.mode in MODES and (best.focus is None or best.focus >= 1) and 0 <= best.focus_weight < math.inf
        if not valid:
            raise ValueError(f"mode {best.mode!r}, focus {best.focus!r}, weight {best.focus_weight!r}")
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        logger.warning("%s is not readable (%s); run kvfusion doctor --measure again", file, error)
        return None
    return best


def keep_measurement(backbone: Backbone, adapter: str | None, best: Measured, table: list[dict[str, Any]]) -> Path:
    """Write what was measured best, and the measured table, atomically.

    Raises:
        OSError: the file cannot be written.
    """
    file = _file(backbone, adapter)
    file.parent.mkdir(parents=True, exist_ok=True)
    record = {"model": backbone.model_id, **asdict(best), "table": table}
    handle, temporary = tempfile.mkstemp(dir=file.parent, suffix=".tmp")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as stream:
            json.dump(record, stream, indent=2)
        os.replace(temporary, file)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    return file


def _file(backbone: Backbone, adapter: str | None) -> Path:
    facts = json.dumps([backbone.weights_digest, str(backbone.dtype), adapter])
    return home() / "measured" / f"{hashlib.sha256(facts.encode()).hexdigest()[:32]}.json"
