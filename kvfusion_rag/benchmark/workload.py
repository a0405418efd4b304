"""The cases of a speed benchmark: numbers of questions, documents and tokens, one case or a sweep of them."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, get_args

from ..errors import InvalidInputError
from ..text.settings import is_count

System = Literal["generate", "cold", "memory", "disk"]
SYSTEMS: tuple[System, ...] = get_args(System)
Over = Literal["shared", "different"]


@dataclass(frozen=True, slots=True)
class Case:
    """Questions that are asked together.

    Attributes:
        documents: documents per question.
        document_tokens, question_tokens: tokens of each document and of each question.
        answer_tokens: tokens of each answer, at least 2 for a time between tokens.
        batch: number of questions.
        over: "shared" if all questions have the same documents, else "different".
        hit_rate: share (0 to 1) of each question's documents that are stored beforehand (systems "memory" and "disk").
    """

    documents: int = 20
    document_tokens: int = 256
    question_tokens: int = 64
    answer_tokens: int = 32
    batch: int = 1
    over: Over = "shared"
    hit_rate: float = 1.0

    def __post_init__(self) -> None:
        for name in ("documents", "document_tokens", "question_tokens", "batch"):
            _require(is_count(getattr(self, name)), name, getattr(self, name), "a whole number from 1")
        enough = is_count(self.answer_tokens) and self.answer_tokens > 1
        _require(enough, "answer_tokens", self.answer_tokens, "a whole number from 2")
        _require(self.over in get_args(Over), "over", self.over, f"one of {', '.join(get_args(Over))}")
        _require(0 <= self.hit_rate <= 1, "hit_rate", self.hit_rate, "a number from 0 to 1")

    @property
    def joined_tokens(self) -> int:
        """Tokens of the joined prompt with all documents of a question."""
        return self.documents * self.document_tokens + self.question_tokens

    @property
    def lists(self) -> int:
        """Number of lists of documents without common documents."""
        return self.batch if self.over == "different" else 1

    @property
    def hits(self) -> int:
        """Documents of each list that are stored."""
        return round(self.hit_rate * self.documents)


def sweep(base: Case, texts: Iterable[str]) -> list[Case]:
    """Return the distinct cases of all ``texts``, or only ``base`` if there are none.

    Each text gives values for fields of ``base``, which are combined: ``batch=4,16 over=shared,different`` makes four
    cases.
    """
    cases = [case for text in texts for case in _combinations(base, text)] or [base]
    return list(dict.fromkeys(replace(case, over="shared") if case.batch == 1 else case for case in cases))


def _combinations(base: Case, text: str) -> list[Case]:
    values: dict[str, list[Any]] = {}
    for part in text.split() or [text]:
        name, equals, listed = part.partition("=")
        name = name.replace("-", "_")
        if not equals or name not in _FIELDS:
            raise InvalidInputError(
                f"sweep is {part!r}, but it must be NAME=VALUE,... with NAME of {', '.join(_FIELDS)}."
            )
        values[name] = [_value(name, one) for one in listed.split(",")]
    return [replace(base, **dict(zip(values, chosen, strict=True))) for chosen in itertools.product(*values.values())]


def _value(name: str, text: str) -> int | float | str:
    kind = _FIELDS[name]
    try:
        return kind(text)
    except ValueError as error:
        raise InvalidInputError(f"{name} of the sweep is {text!r}, but it must be {_KINDS[kind]}.") from error


def _require(holds: bool, name: str, value: object, allowed: str) -> None:
    if not holds:
        raise InvalidInputError(f"{name} is {value!r}, but it must be {allowed}.")


_KINDS: dict[type, str] = {int: "a whole number", float: "a number", str: "a text"}
_FIELDS: dict[str, type] = {field.name: type(field.default) for field in fields(Case)}
