"""Creates folders and writes files: atomically, and over existing files only with permission."""

from __future__ import annotations

import gzip
import os
import shutil
from collections.abc import Iterable
from pathlib import Path

from ..errors import InvalidInputError
from .rows import QARow, write_rows


def make_folder(folder: Path, name: str) -> None:
    """Create an output folder before hours of work. Raise InvalidInputError if that fails or it is not writable.

    Args:
        name: name of the argument, for messages.
    """
    if folder.is_file():
        raise InvalidInputError(f"{name} is {str(folder)!r}, which is a file, but it must be a folder.")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InvalidInputError(f"{str(folder)!r} cannot be created: {error.strerror or error}.") from error
    if not os.access(folder, os.W_OK | os.X_OK):
        raise InvalidInputError(f"{str(folder)!r} cannot be written to; name another {name}.")


def check_output(path: Path, *, force: bool, inputs: Iterable[Path] = ()) -> None:
    """Raise InvalidInputError if ``path`` cannot be written, or if writing it would destroy a file."""
    if not path.parent.is_dir():
        raise InvalidInputError(f"the folder of {str(path)!r} does not exist.")
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise InvalidInputError(f"the folder of {str(path)!r} cannot be written to.")
    if path.is_dir():
        raise InvalidInputError(f"{str(path)!r} is a folder, but it must be a file.")
    if os.path.realpath(path) in map(os.path.realpath, inputs):  # which accepts loops of links
        raise InvalidInputError(f"{str(path)!r} is also an input, so it cannot be the output.")
    if path.exists() and not force:
        raise InvalidInputError(f"{str(path)!r} already exists; name another file or replace it with --force.")


def write_atomically(file: Path, text: str) -> None:
    """Write a text file under another name and rename it."""
    new = file.with_name(file.name + ".new")
    new.write_text(text, encoding="utf-8")
    os.replace(new, file)


def write_training_rows(path: Path, rows: Iterable[QARow]) -> int:
    """Write rows through a temporary file that is renamed at the end, and return how many.

    Equal rows give equal bytes, also compressed, since neither time nor name is recorded.

    Raises:
        InvalidInputError: there are no rows, or the file cannot be written.
    """
    part, packed = (path.with_name(f".{path.name}.{os.getpid()}.{end}") for end in ("part", "packed"))
    try:
        count = write_rows(part, rows)
        if not count:
            raise InvalidInputError(f"no rows are left, so {path.name} was not written.")
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
