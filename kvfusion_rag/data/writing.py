"""Writes training rows: the whole file or nothing, and never over something that is to be kept."""

from __future__ import annotations

import gzip
import os
import shutil
from collections.abc import Iterable
from pathlib import Path

from ..errors import InvalidInputError
from .rows import QARow, write_rows


def check_output(path: Path, *, force: bool, inputs: Iterable[Path] = ()) -> None:
    """Raises InvalidInputError where writing ``path`` would lose something or cannot succeed."""
    if not path.parent.is_dir():
        raise InvalidInputError(f"the folder of {str(path)!r} does not exist.")
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise InvalidInputError(f"the folder of {str(path)!r} cannot be written to.")
    if path.is_dir():
        raise InvalidInputError(f"{str(path)!r} is a folder, but the rows go into a file.")
    if path.resolve() in {one.resolve() for one in inputs}:
        raise InvalidInputError(f"{str(path)!r} is also read from, so it cannot be the output.")
    if path.exists() and not force:
        raise InvalidInputError(
            f"{str(path)!r} exists already; name another file or allow it to be replaced (--force)."
        )


def write_training_rows(path: Path, rows: Iterable[QARow]) -> int:
    """Write rows as ``qa.write_rows`` does, but the whole file or nothing; returns how many.

    The rows go to a temporary file beside ``path``, which takes its name at the end. Equal rows give equal bytes,
    also in a ``.gz``, which bears no time and no name.

    Raises:
        InvalidInputError: there is no row at all, or the file cannot be written.
    """
    part, packed = (path.with_name(f".{path.name}.{os.getpid()}.{end}") for end in ("part", "packed"))
    try:
        count = write_rows(part, rows)
        if not count:
            raise InvalidInputError(f"no row is left of the questions, so {path.name} was not written.")
        if path.suffix == ".gz":
            _pack(part, packed)
            packed.replace(part)
        part.replace(path)
    except OSError as error:
        raise InvalidInputError(f"{str(path)!r} cannot be written: {error.strerror or error}.") from error
    finally:
        part.unlink(missing_ok=True)
        packed.unlink(missing_ok=True)
    return count


def _pack(source: Path, target: Path) -> None:
    with source.open("rb") as plain, target.open("wb") as out, gzip.GzipFile("", "wb", fileobj=out, mtime=0) as zipped:
        shutil.copyfileobj(plain, zipped)
