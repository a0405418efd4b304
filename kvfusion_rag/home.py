"""The folder in which kvfusion keeps what it made itself: converted models, measurements."""

from __future__ import annotations

import os
from pathlib import Path

from platformdirs import user_cache_path

HOME_VARIABLE = "KVFUSION_HOME"


def home() -> Path:
    """The folder that ``KVFUSION_HOME`` names, else the platform's own for caches. It may not exist yet."""
    named = os.environ.get(HOME_VARIABLE)
    return Path(named).expanduser() if named else user_cache_path("kvfusion-rag", appauthor=False)
