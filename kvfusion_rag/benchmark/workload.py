"""What a speed benchmark asks: how many questions over which documents, one case or a sweep of them."""

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
        documents: of each question.
        answer_tokens: of each answer; the time between two tokens needs two.
        batch: questions.
        over: whether all of them are asked over the same documents.
        hit_rate: share of each question's documents that a store has beforehand (systems "memory" and "disk").
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
        """Of the prompt that has all documents of a question in it."""
        return self.documents * self.document_tokens + self.question_tokens

    @property
    def lists(self) -> int:
        """Of documents, no two of which have one in common."""
        return self.batch if self.over == "different" else 1

    @property
    def hits(self) -> int:
        """Documents of each list that a store has."""
        return round(self.hit_rate * self.documents)


def sweep(base: Case, texts: Iterable[str]) -> list[Case]:
    """The cases of all ``texts``, each once; ``base`` alone where there is none.

    Each text names fields of ``base`` and what they are to be, in all combinations: ``batch=4,16
    over=shared,different`` makes four cases.
    """
    cases = [case for text in texts for case in _combinations(base, text)] or [base]
    return list(dict.fromkeys(replace(case, over="shared") if case.batch == 1 else case for case in cases))


def _combinations(base: Case, text: str) -> list[Case]:
    values: dict[str, list[Any]] = {}
    for part in text.split() or [text]:
        name, equals, listed = part.partition("=")
        name = name.replace("-", "_")
        if not equals or name not in _FIELDS:
            raise InvalidInputError(f"sweep {part!r} is not NAME=VALUE,VALUE,... with a NAME of {', '.join(_FIELDS)}.")
        values[name] = [_value(name, one) for one in listed.split(",")]
    return [replace(base, **dict(zip(values, chosen, strict=True))) for chosen in itertools.product(*values.values())]


def _value(name: str, text: str) -> int | float | str:
    kind = _FIELDS[name]
    try:
        return kind(text)
    except ValueError as error:
        raise InvalidInputError(f"sweep has {text!r} as {name}, but it must be {_KINDS[kind]}.") from error


def _require(holds: bool, name: str, value: object, allowed: str) -> None:
    if not holds:
        raise InvalidInputError(f"{name} is {value!r}, but it must be {allowed}.")


_KINDS: dict[type, str] = {int: "a whole number", float: "a number", str: "a text"}
_FIELDS: dict[str, type] = {field.name: type(field.default) for field in fields(Case)}
