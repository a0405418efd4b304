"""Answers of a run in a file as they come, so that a run of hours which was stopped goes on where it was.

One file is of one set of rows, number of documents, seed, batch size and length of answers, and of each system as it
was; a run with more systems or conditions can go on from it too. Knows neither models nor metrics.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import InvalidInputError
from .orders import Condition
from .runner import Prediction
from .systems import System

RUN = ""  # in place of a system's name
BEGINNING = json.dumps({"system": RUN, "identity": 0})[:-2].encode()  # also of a first line that was torn


class Journal:
    """The file of one run: what it holds is recalled, what is new is noted at its end.

    Args:
        path: made if it is not there. A last line that was not written to its end is cut off.
        facts: of the run, JSON-able; the file's have to be the same.

    Raises:
        InvalidInputError: the file is of another run, or is none of this kind.
    """

    def __init__(self, path: Path, facts: Mapping[str, Any]) -> None:
        self._path = path
        self._identities: dict[str, Mapping[str, Any]] = {}  # of the run and of the systems, by name
        self._known: dict[tuple[str, str, int], Prediction | None] = {}
        self._read()
        self._require(RUN, facts)

    def require(self, systems: Sequence[System]) -> None:
        """Note who is going to answer.

        Raises:
            InvalidInputError: the file has answers of a system of that name, but of another model or settings.
        """
        for system in systems:
            self._require(system.name, system.identity())

    def recall(self, system: str, condition: Condition, start: int, size: int) -> list[Prediction | None] | None:
        """Answers of the batch of ``size`` rows from ``start`` on, or ``None`` where one is missing.

        Rows of a batch are answered together, so they are asked together again.
        """
        keys = [(system, condition.name, start + number) for number in range(size)]
        return [self._known[key] for key in keys] if all(key in self._known for key in keys) else None

    def note(self, system: str, condition: Condition, start: int, found: Sequence[Prediction | None]) -> None:
        """Write the answers of one batch down."""
        self._append(
            {"system": system, "condition": condition.name, "row": row, "answer": _told(prediction)}
            for row, prediction in enumerate(found, start)
        )

    def _read(self) -> None:
        self._path.touch()
        content = self._path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        try:
            for line in map(json.loads, whole.splitlines()):
                if "identity" in line:
                    self._identities[line["system"]] = dict(line["identity"])
                else:
                    self._known[line["system"], line["condition"], line["row"]] = _prediction(line["answer"])
            if content and RUN not in self._identities and not content.startswith(BEGINNING):
                raise ValueError("the run is not named")
        except (ValueError, TypeError, KeyError) as error:
            raise InvalidInputError(
                f"{str(self._path)!r} holds no answers of an evaluation to go on from ({error!r}); name another file."
            ) from error
        with self._path.open("r+b") as file:
            file.truncate(len(whole))

    def _append(self, lines: Iterable[Mapping[str, Any]]) -> None:
        with self._path.open("a", encoding="utf-8") as out:
            out.writelines(json.dumps(line) + "\n" for line in lines)

    def _require(self, name: str, identity: Mapping[str, Any]) -> None:
        mine = json.loads(json.dumps(dict(identity), default=str))  # as it would be read back
        theirs = self._identities.setdefault(name, mine)
        if theirs is mine:
            self._append([{"system": name, "identity": mine}])
        of = f" of {name!r}" if name else ""
        for fact in sorted({*theirs, *mine}):
            if theirs.get(fact) != mine.get(fact):
                raise InvalidInputError(
                    f"{str(self._path)!r} holds answers of another run: {fact}{of} is {theirs.get(fact)!r} there and "
                    f"{mine.get(fact)!r} here; name another file."
                )


def _told(prediction: Prediction | None) -> list[Any] | None:
    if prediction is None:
        return None
    return [prediction.text, prediction.cited_text, prediction.token_ids, prediction.documents]


def _prediction(told: Sequence[Any] | None) -> Prediction | None:
    if told is None:
        return None
    text, cited_text, token_ids, documents = told
    return Prediction(text, cited_text, tuple(token_ids), tuple(documents))
