"""Reads JSON that anybody may have written, and checks values whatever type they are declared with."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from typing import Any, TypeGuard, TypeVar

T = TypeVar("T")


def parse_json(text: str | bytes) -> Any:
    """Return the value of JSON.

    Raises:
        ValueError: it is not JSON, or it is nested too deeply to be read.
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def is_a(value: object, *kinds: type[T]) -> TypeGuard[T]:
    """Whether ``value`` is of one of these types, whatever its declared type says: a user's code may be unchecked."""
    return isinstance(value, kinds)


def is_mapping(value: object) -> TypeGuard[Mapping[Any, Any]]:
    """Whether ``value`` has names and values, as an object of JSON."""
    return isinstance(value, Mapping)


def is_list(value: object) -> TypeGuard[list[Any]]:
    """Whether ``value`` is a list, as one of JSON."""
    return isinstance(value, list)


def is_sequence(value: object) -> TypeGuard[Sequence[Any]]:
    """Whether ``value`` is a sequence. A text is one."""
    return isinstance(value, Sequence)


def is_number(value: object) -> TypeGuard[float]:
    """Whether ``value`` is a finite number that a float can hold."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    return abs(value) <= sys.float_info.max  # a comparison, because large integers have no float
