"""Records the answers of a run in a file, so that an interrupted run of hours can be resumed.

A file belongs to one set of rows, number of documents, seed and batch size, and to unchanged systems. A run with more
systems or conditions can resume from it too.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import InvalidInputError
from ..text.json_text import parse_json
from .orders import Condition
from .predictions import Prediction
from .systems import Named

RUN = ""  # used instead of a system's name
BEGINNING = json.dumps({"system": RUN, "identity": 0})[:-2].encode()  # recognises a torn first line


class Journal:
    """The file of one run.

    Args:
        path: file, created if it does not exist. An incomplete last line is cut off.
        facts: facts of the run as plain data, which must equal those in the file.

    Raises:
        InvalidInputError: the file belongs to another run, or is not a journal.
    """

    def __init__(self, path: Path, facts: Mapping[str, Any]) -> None:
        self._path = path
        self._identities: dict[str, Mapping[str, Any]] = {}  # identities of the run and its systems by name
        self._answers: dict[tuple[str, str, int], Prediction | None] = {}
        self._read()
        self._require(RUN, facts)

    def require(self, systems: Sequence[Named]) -> None:
        """Record the systems that will answer.

        Raises:
            InvalidInputError: the file has answers of a system with that name but another model or other settings.
        """
        for system in systems:
            self._require(system.name, system.identity())

    def recall(self, system: str, condition: Condition, start: int, size: int) -> list[Prediction | None] | None:
        """Return the answers of the batch of ``size`` rows from ``start``, or None if one is missing.

        Rows of a batch were answered together, so an incomplete batch must be answered again as a whole.
        """
        keys = [(system, condition.name, start + number) for number in range(size)]
        return [self._answers[key] for key in keys] if all(key in self._answers for key in keys) else None

    def record(self, system: str, condition: Condition, start: int, answers: Sequence[Prediction | None]) -> None:
        """Write the answers of one batch."""
        self._append(
            {"system": system, "condition": condition.name, "row": row, "answer": answer and answer.to_list()}
            for row, answer in enumerate(answers, start)
        )

    def _read(self) -> None:
        self._path.touch()
        content = self._path.read_bytes()
        complete = content[: content.rfind(b"\n") + 1]
        try:
            for line in map(parse_json, complete.splitlines()):
                if "identity" in line:
                    self._identities[line["system"]] = dict(line["identity"])
                else:
                    answer = line["answer"]
                    key = line["system"], line["condition"], line["row"]
                    self._answers[key] = None if answer is None else Prediction.from_list(answer)
            if content and RUN not in self._identities and not content.startswith(BEGINNING):
                raise ValueError("the run is not named")
        except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
            raise InvalidInputError(
                f"{str(self._path)!r} is not a journal of an evaluation ({error!r}); name another file."
            ) from error
        with self._path.open("r+b") as file:
            file.truncate(len(complete))

    def _append(self, lines: Iterable[Mapping[str, Any]]) -> None:
        with self._path.open("a", encoding="utf-8") as out:
            out.writelines(json.dumps(line) + "\n" for line in lines)

    def _require(self, name: str, identity: Mapping[str, Any]) -> None:
        current = json.loads(json.dumps(dict(identity), default=str))  # as after a round trip through JSON
        saved = self._identities.setdefault(name, current)
        if saved is current:
            self._append([{"system": name, "identity": current}])
        of = f" of {name!r}" if name else ""
        for fact in sorted({*saved, *current}):
            if saved.get(fact) != current.get(fact):
                raise InvalidInputError(
                    f"{str(self._path)!r} has answers of another run: {fact}{of} is {saved.get(fact)!r} there and "
                    f"{current.get(fact)!r} here; name another file."
                )
