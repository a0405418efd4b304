"""What an adaptation has done so far, in its output folder, so that a run that was killed goes on.

``adapt.json`` names the run. Each stage has a file of JSON lines, one a chunk of its work; a torn last line is cut
off. A chunk is computed together again or not at all, so its results do not depend on where a run was killed.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from safetensors import SafetensorError
from tqdm import tqdm

from ..errors import InvalidInputError

NAME = "adapt.json"

Item = TypeVar("Item")


class Stages:
    """The state of one run in ``folder``.

    Args:
        facts: of the run, JSON-able; those of a former run in the folder have to be the same.
        progress: whether stages draw bars on stderr.

    Raises:
        InvalidInputError: the folder holds another run, or other files.
    """

    def __init__(self, folder: Path, facts: Mapping[str, Any], *, progress: bool = False) -> None:
        self.folder, self._progress = folder, progress
        mine = json.loads(json.dumps(facts))  # as it would be read back
        file = folder / NAME
        if not file.exists():
            write_atomically(file, json.dumps(mine, indent=2) + "\n")
            return
        try:
            theirs = json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise InvalidInputError(f"{str(file)!r} is not readable ({error}); name another --output.") from error
        for name, value in mine.items():
            if theirs.get(name) != value:
                raise InvalidInputError(
                    f"{str(folder)!r} holds an adaptation with another {name}: {theirs.get(name)!r:.120} there and "
                    f"{value!r:.120} here; name another --output, or the same {name}."
                )

    def work(
        self, name: str, items: Sequence[Item], size: int, do: Callable[[Sequence[Item]], Sequence[Any]]
    ) -> list[Any]:
        """One result for each item: of a former run, or made now by ``do``, ``size`` items at a time.

        Args:
            do: gives one JSON-able result for each item of a chunk.
        """
        done = list(self._read(name))
        results = [result for chunk in done for result in chunk]
        with tqdm(
            total=len(items), initial=len(results), desc=name, delay=1, leave=False, disable=not self._progress
        ) as bar:
            for start in range(len(results), len(items), size):
                chunk = list(do(items[start : start + size]))
                assert len(chunk) == len(items[start : start + size]), "one result for each item"
                self._append(name, chunk)
                results += chunk
                bar.update(len(chunk))
        return results

    def _file(self, name: str) -> Path:
        return self.folder / f"{name}.jsonl"

    def _read(self, name: str) -> Iterator[list[Any]]:
        """The whole lines of a stage; what was torn is cut off."""
        file = self._file(name)
        if not file.exists():
            return
        content = file.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        if len(whole) < len(content):
            with file.open("r+b") as out:
                out.truncate(len(whole))
        for number, line in enumerate(whole.splitlines(), start=1):
            try:
                yield json.loads(line)
            except ValueError as error:
                raise InvalidInputError(f"line {number} of {str(file)!r} is damaged; remove the file.") from error

    def _append(self, name: str, chunk: Sequence[Any]) -> None:
        with self._file(name).open("a", encoding="utf-8") as out:
            out.write(json.dumps(chunk) + "\n")
            out.flush()
            os.fsync(out.fileno())


def write_atomically(file: Path, text: str) -> None:
    """Write a file under another name and rename it."""
    fresh = file.with_name(file.name + ".new")
    fresh.write_text(text, encoding="utf-8")
    os.replace(fresh, file)


def prepare_folder(folder: Path) -> None:
    """Make the output folder, before a model is loaded.

    Raises:
        InvalidInputError: it is a file, holds files of something else, or cannot be written.
    """
    if folder.is_file():
        raise InvalidInputError(f"{str(folder)!r} is a file, but --output must name a folder.")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InvalidInputError(f"{str(folder)!r} cannot be made: {error.strerror or error}.") from error
    if not (folder / NAME).exists() and any(entry.name != f"{NAME}.new" for entry in folder.iterdir()):
        raise InvalidInputError(
            f"{str(folder)!r} holds files, but no {NAME} of an adaptation to go on with; name another --output."
        )
    if not os.access(folder, os.W_OK | os.X_OK):
        raise InvalidInputError(f"{str(folder)!r} cannot be written to; name another --output.")


@contextmanager
def writing_errors(folder: Path) -> Iterator[None]:
    """Turn a failed write into one sentence; whole lines and checkpoints stay."""
    try:
        yield
    except BrokenPipeError:  # of the terminal
        raise
    except (OSError, SafetensorError) as error:
        cause = getattr(error, "strerror", None) or error
        raise InvalidInputError(
            f"{str(folder)!r} cannot be written ({cause}); what is there is kept: make room, and run the same command "
            "again."
        ) from error
