"""Question-answer rows, the format that training and evaluation share: one question, its answers, its passages.

A row without answers cannot be answered from its passages. A row without a gold passage is asked over distractors
only. Other formats are read by ``formats``.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import json
import zlib
from collections.abc import Generator, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import NoneType
from typing import IO, Any, TypeVar, cast

from ..errors import InvalidInputError
from ..schema import Document
from ..text.json_text import is_number, parse_json

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Passage:
    """One document of a row.

    Attributes:
        gold: whether it contains the answer.
        score: score of a retriever, higher for a better passage.
    """

    text: str
    title: str | None = None
    gold: bool = False
    score: float | None = None

    def document(self, document_id: str) -> Document:
        return Document(self.text, id=document_id, title=self.title, score=self.score)

    def to_dict(self) -> dict[str, Any]:
        data = {"title": self.title, "text": self.text, "gold": self.gold}
        return data if self.score is None else data | {"score": self.score}


@dataclass(frozen=True, slots=True)
class QARow:
    """A question with its accepted answers, its passages and, if known, the sentence that contains the answer."""

    id: str
    question: str
    answers: tuple[str, ...]
    passages: tuple[Passage, ...]
    evidence: str | None = None

    @property
    def gold(self) -> tuple[Passage, ...]:
        return tuple(passage for passage in self.passages if passage.gold)


def read_rows(path: str | Path) -> Iterator[QARow]:
    """Read rows from a JSON-lines file (``.gz`` too): id, question, answers, passages [{title, text, gold}], evidence.

    Raises:
        InvalidInputError: the file cannot be read, or a line is not such a row. Names file, line and field.
    """
    return (row for _, row in read_placed_rows(path))


def read_placed_rows(path: str | Path) -> Iterator[tuple[str, QARow]]:
    """Read rows like :func:`read_rows`, each with its place (file and line) for messages."""
    path = Path(path)
    with reading_errors(path):
        for data, where, number in json_lines(path):
            yield where, row_from(data, where, number)


def write_rows(path: str | Path, rows: Iterable[QARow]) -> int:
    """Write rows as JSON lines, compressed if the name ends in ``.gz``, and return how many."""
    count = 0
    with open_text(Path(path), "wt") as out:
        for row in rows:
            passages = [passage.to_dict() for passage in row.passages]
            data: dict[str, Any] = {"id": row.id, "question": row.question, "answers": list(row.answers)}
            data |= {"passages": passages} | ({"evidence": row.evidence} if row.evidence else {})
            out.write(json.dumps(data, ensure_ascii=False) + "\n")
            count += 1
    return count


def rows_digest(rows: Iterable[QARow]) -> str:
    """Return the SHA-256 of all rows in order, in hex."""
    digest = hashlib.sha256()
    for row in rows:
        passages = [passage.to_dict() for passage in row.passages]
        digest.update(json.dumps(asdict(row) | {"passages": passages}, sort_keys=True).encode() + b"\n")
    return digest.hexdigest()


def row_from(data: object, where: str, number: int = 0) -> QARow:
    """Return a row from plain data.

    Raises:
        InvalidInputError: a field is missing or wrong. Names ``where`` and the field.
    """
    fields = require_object(data, where, "a row must be an object")
    question, answers = required_text(fields, "question", where), fields.get("answers")
    passages = checked(fields, "passages", (list,), "a list of objects", where)
    if answers is None:
        raise InvalidInputError(f"{where}: answers is missing; write [] if the passages do not answer the question.")
    require_answers(answers, "answers", where)
    row = QARow(
        id=str(fields.get("id", number)),
        question=question,
        answers=tuple(answers),
        passages=tuple(_passage(one, f"{where}: passage {n}") for n, one in enumerate(passages, start=1)),
        evidence=checked(fields, "evidence", (str, NoneType), "a text", where),
    )
    require_marked(row, where)
    return row


def require_marked(row: QARow, where: str) -> None:
    """Raise InvalidInputError if a passage is gold but there is no answer."""
    if row.gold and not row.answers:
        raise InvalidInputError(f"{where}: answers is empty, but a passage is gold; give the answer, or unmark it.")


def _passage(data: object, where: str) -> Passage:
    passage = require_object(data, where, "it must be an object with a text")
    score = checked(passage, "score", (int, float, NoneType), "a finite number or missing", where)
    if score is not None and not is_number(score):
        raise InvalidInputError(f"{where}: score is {score!r:.100}, but it must be a finite number or missing.")
    return Passage(
        checked(passage, "text", (str,), "a text", where),
        checked(passage, "title", (str, NoneType), "a text or missing", where),
        checked({"gold": False, **passage}, "gold", (bool,), "true or false", where),
        score,
    )


# Files and fields of all formats


def open_text(path: Path, mode: str = "rt") -> IO[str]:
    """Open a UTF-8 text file, decompressed if its name ends in ``.gz``. A byte order mark is skipped."""
    encoding = "utf-8-sig" if "r" in mode else "utf-8"
    if path.suffix == ".gz":
        return cast(IO[str], gzip.open(path, mode, encoding=encoding))
    return path.open(mode.replace("t", ""), encoding=encoding)


@contextmanager
def reading_errors(path: Path) -> Generator[None, None, None]:
    """Turn every way in which reading a file can fail into an InvalidInputError that names it."""
    try:
        yield
    except OSError as error:
        raise InvalidInputError(f"{str(path)!r} cannot be read: {error.strerror or error}.") from error
    except (EOFError, zlib.error, UnicodeDecodeError, csv.Error) as error:
        raise InvalidInputError(f"{str(path)!r} is damaged or not UTF-8 text: {error}.") from error


def json_lines(path: Path) -> Iterator[tuple[Any, str, int]]:
    """Read the object of each line that is not blank, with its place and line number."""
    with open_text(path) as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                where = f"{path.name}, line {number}"
                try:
                    data = parse_json(line)
                except ValueError as error:
                    raise InvalidInputError(f"{where} is not JSON: {error}.") from error
                yield data, where, number


def checked(data: Mapping[str, Any], name: str, kinds: tuple[type[T], ...], allowed: str, where: str) -> T:
    """Return the field ``name``, or raise InvalidInputError if it is not of one of ``kinds``."""
    value = data.get(name)
    if not isinstance(value, kinds):
        raise InvalidInputError(f"{where}: {name} is {value!r:.100}, but it must be {allowed}.")
    return value


def required_text(data: Mapping[str, Any], name: str, where: str) -> str:
    """Return the field ``name``, or raise InvalidInputError if it is not a text or is blank."""
    text = checked(data, name, (str,), "a text that is not blank", where)
    if not text.strip():
        raise InvalidInputError(f"{where}: {name} is {text!r:.100}, but it must be a text that is not blank.")
    return text


def require_object(data: object, where: str, must: str) -> Mapping[str, Any]:
    """Return ``data``, or raise InvalidInputError with what it ``must`` be if it is not an object."""
    if not isinstance(data, Mapping):
        raise InvalidInputError(f"{where} is a {type(data).__name__}, but {must}.")
    return data


def require_answers(value: object, name: str, where: str) -> None:
    """Raise InvalidInputError unless ``value`` is a list of texts that are not blank."""
    if not isinstance(value, list) or not all(isinstance(answer, str) for answer in value):
        raise InvalidInputError(f"{where}: {name} is {value!r:.100}, but it must be a list of texts.")
    if not all(answer.strip() for answer in value):
        raise InvalidInputError(f"{where}: {name} is {value!r:.100}, but an answer must not be blank.")
