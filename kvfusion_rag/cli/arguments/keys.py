"""API keys, which come from environment variables, because all users of a machine can see command lines."""

from __future__ import annotations

import os

from ...errors import InvalidInputError


def key_of_environment(name: str | None) -> str | None:
    """Return the API key in the environment variable ``name``, or None without a name.

    Raises:
        InvalidInputError: the variable is not set.
    """
    if name is None:
        return None
    key = os.environ.get(name, "")
    if not key:
        raise InvalidInputError(f"the environment variable {name!r} is not set; set it to the API key.")
    return key
