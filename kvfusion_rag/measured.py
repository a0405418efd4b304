"""Which mode ``kvfusion doctor --measure`` found best for a model, kept between processes."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tempfile
from pathlib import Path
from typing import Any, cast

from .backbone import Backbone
from .home import home
from .schema import MODES, Mode

logger = logging.getLogger(__name__)


def best_mode(backbone: Backbone, adapter: str | None) -> Mode | None:
    """The mode that was measured best for these weights and this adapter (its digest), or None if none was."""
    file = _file(backbone, adapter)
    try:
        found = json.loads(file.read_text(encoding="utf-8"))["mode"]
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        logger.warning("%s is not readable (%s); run kvfusion doctor --measure again", file, error)
        return None
    return cast(Mode, found) if found in MODES else None


def keep_measurement(backbone: Backbone, adapter: str | None, mode: Mode, table: list[dict[str, Any]]) -> Path:
    """Write the best mode and the measured table, atomically.

    Raises:
        OSError: the file cannot be written.
    """
    file = _file(backbone, adapter)
    file.parent.mkdir(parents=True, exist_ok=True)
    record = {"model": backbone.model_id, "mode": mode, "table": table}
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
