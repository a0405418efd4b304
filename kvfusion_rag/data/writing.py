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
    check_folder(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InvalidInputError(f"{str(folder)!r} cannot be created: {error.strerror or error}.") from error


def check_folder(folder: Path) -> None:
    """Raise InvalidInputError if ``folder`` is not a folder, or cannot be created or written to. Creates nothing."""
    place = next((place for place in (folder, *folder.parents) if _exists(place)), Path())
    if not place.is_dir():
        raise InvalidInputError(f"{str(place)!r} is a file, but it must be a folder.")
    if not os.access(place, os.W_OK | os.X_OK):
        raise InvalidInputError(f"the folder {str(place)!r} cannot be written to.")


def check_output(path: Path, *, force: bool, inputs: Iterable[Path] = ()) -> None:
    """Raise InvalidInputError if ``path`` cannot be written, or if writing it would destroy a file."""
    exists = _exists(path)
    if path.is_dir():
        raise InvalidInputError(f"{str(path)!r} is a folder, but it must be a file.")
    if not path.parent.is_dir():
        raise InvalidInputError(f"the folder of {str(path)!r} does not exist.")
    is_device = exists and not path.is_file()  # such as /dev/stdout
    if not (os.access(path.parent, os.W_OK | os.X_OK) or is_device) or (exists and not os.access(path, os.W_OK)):
        raise InvalidInputError(f"{str(path)!r} cannot be written to.")
    if os.path.realpath(path) in map(os.path.realpath, inputs):  # realpath accepts loops of links
        raise InvalidInputError(f"{str(path)!r} is also an input, so it cannot be the output.")
    if exists and not force:
        raise InvalidInputError(f"{str(path)!r} already exists; name another file or replace it with --force.")


def _exists(path: Path) -> bool:
    """Return whether ``path`` exists. Raise InvalidInputError if it never can: its name is too long, it is a link to
    itself or to nothing, or it is below a file."""
    try:
        path.stat()
    except FileNotFoundError as error:
        if path.is_symlink():
            raise InvalidInputError(f"{str(path)!r} is a broken link.") from error
        return False
    except OSError as error:
        raise InvalidInputError(f"{str(path)!r} cannot be used: {error.strerror}.") from error
    return True


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
