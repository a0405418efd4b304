"""Folders of the user: the one for files that kvfusion creates itself, and those that begin with ``~``."""

from __future__ import annotations

import os
from pathlib import Path

from platformdirs import user_cache_path

from .errors import InvalidInputError

HOME_VARIABLE = "KVFUSION_HOME"


def home() -> Path:
    """Return the folder in ``KVFUSION_HOME``, or the platform's cache folder. It may not exist yet."""
    configured = os.environ.get(HOME_VARIABLE)
    return expanded(configured) if configured else user_cache_path("kvfusion-rag", appauthor=False)


def expanded(path: str | os.PathLike[str]) -> Path:
    """Return ``path`` with the home folder in place of ``~`` or ``~user``.

    Raises:
        InvalidInputError: there is no such user.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        user = os.fspath(path).partition("/")[0]
        raise InvalidInputError(f"{os.fspath(path)!r} begins with {user}, but there is no such user.") from error


def absolute(path: str | os.PathLike[str]) -> Path:
    """Return the absolute path without links. Unlike ``Path.resolve``, a link to itself is not an error.

    Raises:
        InvalidInputError: it begins with the name of a user who does not exist.
    """
    return Path(os.path.realpath(expanded(path)))
