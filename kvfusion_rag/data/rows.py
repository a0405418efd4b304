"""Question-answer rows: one question, its answers, and the passages it is to be answered from.

The one format that training and evaluation share. A row without answers is one that its passages do not answer;
a row without a gold passage was asked over distractors alone. Knows files of this format only; other formats are
read by ``training/formats.py`` and turned into rows by ``training/data.py``.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import math
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any, TypeGuard, cast

from ..errors import InvalidInputError
from ..schema import Document


@dataclass(frozen=True, slots=True)
class Passage:
    """One document of a row; ``gold`` if it holds the answer; ``score`` is a retriever's, higher for a better one."""

    text: str
    title: str | None = None
    gold: bool = False
    score: float | None = None

    def document(self, document_id: str) -> Document:
        return Document(self.text, id=document_id, title=self.title, score=self.score)

    def to_dict(self) -> dict[str, Any]:
        found = {"title": self.title, "text": self.text, "gold": self.gold}
        return found if self.score is None else found | {"score": self.score}


@dataclass(frozen=True, slots=True)
class QARow:
    """A question with its accepted answers, its passages and, where known, the sentence that holds the answer."""

    id: str
    question: str
    answers: tuple[str, ...]
    passages: tuple[Passage, ...]
    evidence: str | None = None

    @property
    def gold(self) -> tuple[Passage, ...]:
        return tuple(passage for passage in self.passages if passage.gold)


def read_rows(path: str | Path) -> Iterator[QARow]:
    """Rows of a JSON-lines file (``.gz`` too): id, question, answers, passages [{title, text, gold}], evidence.

    Raises:
        InvalidInputError: the file cannot be read, or a line is not such a row; names file, line and field.
    """
    return (row for _, row in read_placed_rows(path))


def read_placed_rows(path: str | Path) -> Iterator[tuple[str, QARow]]:
    """Rows as :func:`read_rows` gives them, each with its place (file and line) for messages."""
    path = Path(path)
    try:
        with open_text(path) as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    where = f"{path.name}, line {number}"
                    yield where, parse_row(line, where, number)
    except (OSError, EOFError, UnicodeDecodeError, zlib.error) as error:
        raise InvalidInputError(f"{path.name} cannot be read: {error}.") from error


def write_rows(path: str | Path, rows: Iterable[QARow]) -> int:
    """Write rows as JSON lines (gzip where the name ends in ``.gz``); returns how many."""
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
    """SHA-256 of all rows in their order, in hex."""
    digest = hashlib.sha256()
    for row in rows:
        passages = [passage.to_dict() for passage in row.passages]
        digest.update(json.dumps(asdict(row) | {"passages": passages}, sort_keys=True).encode() + b"\n")
    return digest.hexdigest()


def parse_row(line: str, where: str, number: int = 0) -> QARow:
    """One JSON line as a row; ``where`` is named in errors."""
    try:
        data = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InvalidInputError(f"{where} is not JSON: {error}.") from error
    return row_from(data, where, number)


def row_from(data: object, where: str, number: int = 0) -> QARow:
    """A row out of plain data.

    Raises:
        InvalidInputError: a field is absent or wrong; ``where`` and the field are named.
    """
    if not isinstance(data, Mapping):
        raise InvalidInputError(f"{where} holds a {type(data).__name__}, but a row must be an object.")
    question, answers = data.get("question"), data.get("answers")
    if not isinstance(question, str) or not question.strip():
        raise InvalidInputError(f"{where}: question is {question!r:.100}, but it must be a text that is not blank.")
    passages = data.get("passages")
    if not isinstance(passages, list):
        raise InvalidInputError(f"{where}: passages is {passages!r:.100}, but it must be a list of objects.")
    if answers is None:
        raise InvalidInputError(f"{where}: answers is absent; a question that its passages do not answer has [].")
    if not isinstance(answers, list) or not all(isinstance(a, str) for a in answers):
        raise InvalidInputError(f"{where}: answers is {answers!r:.100}, but it must be a list of texts.")
    if not all(answer.strip() for answer in answers):
        raise InvalidInputError(f"{where}: answers is {answers!r:.100}, but an answer must not be blank.")
    evidence = data.get("evidence")
    if not isinstance(evidence, str | None):
        raise InvalidInputError(f"{where}: evidence is {evidence!r:.100}, but it must be a text.")
    row = QARow(
        id=str(data.get("id", number)),
        question=question,
        answers=tuple(answers),
        passages=tuple(_passage(p, f"{where}: passage {n}") for n, p in enumerate(passages, start=1)),
        evidence=evidence,
    )
    if row.gold and not row.answers:
        raise InvalidInputError(f"{where}: answers is empty, but a passage is gold; give the answer, or unmark it.")
    return row


def open_text(path: Path, mode: str = "rt") -> IO[str]:
    """A UTF-8 text file, unpacked where its name ends in ``.gz``; a mark at its beginning (BOM) is passed over."""
    encoding = "utf-8-sig" if "r" in mode else "utf-8"
    if path.suffix == ".gz":
        return cast(IO[str], gzip.open(path, mode, encoding=encoding))
    return path.open(mode.replace("t", ""), encoding=encoding)


def _passage(data: object, where: str) -> Passage:
    if not isinstance(data, dict):
        raise InvalidInputError(f"{where} is a {type(data).__name__}, but it must be an object with a text.")
    text, title, gold, score = data.get("text"), data.get("title"), data.get("gold", False), data.get("score")
    if not isinstance(text, str):
        raise InvalidInputError(f"{where}: text is {text!r:.100}, but it must be a text.")
    if not isinstance(title, str | None):
        raise InvalidInputError(f"{where}: title is {title!r:.100}, but it must be a text or absent.")
    if not isinstance(gold, bool):
        raise InvalidInputError(f"{where}: gold is {gold!r:.100}, but it must be true or false.")
    if not (score is None or (_is_number(score) and math.isfinite(score))):
        raise InvalidInputError(f"{where}: score is {score!r:.100}, but it must be a finite number or absent.")
    return Passage(text, title, gold, score)


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool)
