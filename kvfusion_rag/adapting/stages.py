"""Keeps the state of an adaptation in its output folder, so that a killed run can be resumed.

``adapt.json`` describes the run. Each stage has a file with a JSON line per chunk of its work. An incomplete last line
is cut off. A chunk is always computed as a whole, so that results do not depend on when a run was killed.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from safetensors import SafetensorError
from tqdm import tqdm

from ..data.writing import make_folder, write_atomically
from ..errors import InvalidInputError
from ..text.json_text import parse_json

NAME = "adapt.json"

Item = TypeVar("Item")


class Stages:
    """The state of one run in ``folder``.

    Args:
        facts: facts of the run as plain data, which must equal those of a previous run in the folder.
        progress: whether to show progress bars on stderr.

    Raises:
        InvalidInputError: the folder contains another run.
    """

    def __init__(self, folder: Path, facts: Mapping[str, Any], *, progress: bool = False) -> None:
        self.folder, self._progress = folder, progress
        current = json.loads(json.dumps(facts))  # as after a round trip through JSON
        file = folder / NAME
        if not file.exists():
            write_atomically(file, json.dumps(current, indent=2) + "\n")
            return
        try:
            saved = parse_json(file.read_text(encoding="utf-8"))
            if not isinstance(saved, dict):
                raise ValueError("it is not an object")
        except ValueError as error:
            raise InvalidInputError(f"{str(file)!r} cannot be read ({error}); name another --output.") from error
        for name, value in current.items():
            if saved.get(name) != value:
                raise InvalidInputError(
                    f"{str(folder)!r} contains an adaptation with another {name}: {saved.get(name)!r:.120} there and "
                    f"{value!r:.120} here; name another --output, or the same {name}."
                )

    def work(
        self, name: str, items: Sequence[Item], size: int, do: Callable[[Sequence[Item]], Sequence[Any]]
    ) -> list[Any]:
        """Return one result per item, from a previous run or computed now, ``size`` items at a time.

        Args:
            do: function that returns one result, as plain data, per item of a chunk.
        """
        results = [result for chunk in self._read(name) for result in chunk]
        with tqdm(
            total=len(items), initial=len(results), desc=name, delay=1, leave=False, disable=not self._progress
        ) as bar:
            for start in range(len(results), len(items), size):
                chunk = list(do(items[start : start + size]))
                assert len(chunk) == len(items[start : start + size]), "one result per item"
                self._append(name, chunk)
                results += chunk
                bar.update(len(chunk))
        return results

    def _file(self, name: str) -> Path:
        return self.folder / f"{name}.jsonl"

    def _read(self, name: str) -> Iterator[list[Any]]:
        """Read the complete lines of a stage, and cut off an incomplete one."""
        file = self._file(name)
        if not file.exists():
            return
        content = file.read_bytes()
        complete = content[: content.rfind(b"\n") + 1]
        if len(complete) < len(content):
            with file.open("r+b") as out:
                out.truncate(len(complete))
        for number, line in enumerate(complete.splitlines(), start=1):
            try:
                yield parse_json(line)
            except ValueError as error:
                raise InvalidInputError(f"line {number} of {str(file)!r} is damaged; remove the file.") from error

    def _append(self, name: str, chunk: Sequence[Any]) -> None:
        with self._file(name).open("a", encoding="utf-8") as out:
            out.write(json.dumps(chunk) + "\n")
            out.flush()
            os.fsync(out.fileno())


def prepare_folder(folder: Path) -> None:
    """Create the output folder before a model is loaded.

    Raises:
        InvalidInputError: it is a file, contains other files, or cannot be written.
    """
    make_folder(folder, "--output")
    if not (folder / NAME).exists() and any(entry.name != f"{NAME}.new" for entry in folder.iterdir()):
        raise InvalidInputError(
            f"{str(folder)!r} contains files, but no {NAME} of an adaptation to resume; name another --output."
        )


@contextmanager
def writing_errors(folder: Path) -> Generator[None, None, None]:
    """Turn a failed write into an InvalidInputError. Complete lines and checkpoints are kept."""
    try:
        yield
    except BrokenPipeError:  # of the terminal
        raise
    except (OSError, SafetensorError) as error:
        cause = getattr(error, "strerror", None) or error
        raise InvalidInputError(
            f"{str(folder)!r} cannot be written ({cause}); its state is kept, so free some space and run the same "
            "command again."
        ) from error
