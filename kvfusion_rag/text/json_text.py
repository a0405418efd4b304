"""Reads JSON that anybody may have written."""

from __future__ import annotations

import json
import sys
from typing import Any, TypeGuard


def parse_json(text: str | bytes) -> Any:
    """Return the value of JSON.

    Raises:
        ValueError: it is not JSON, or it is nested too deeply to be read.
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def is_number(value: object) -> TypeGuard[float]:
    """Whether ``value`` is a finite number that a float can hold."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    return abs(value) <= sys.float_info.max  # a comparison, because large integers have no float
