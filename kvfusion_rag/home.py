"""The folder for files that kvfusion creates itself: converted models and measurements."""

from __future__ import annotations

import os
from pathlib import Path

from platformdirs import user_cache_path

HOME_VARIABLE = "KVFUSION_HOME"


def home() -> Path:
    """Return the folder in ``KVFUSION_HOME``, or the platform's cache folder. It may not exist yet."""
    configured = os.environ.get(HOME_VARIABLE)
    return Path(configured).expanduser() if configured else user_cache_path("kvfusion-rag", appauthor=False)
