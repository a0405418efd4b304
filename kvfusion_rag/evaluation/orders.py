"""The conditions of an evaluation: which documents a question is asked over, and in what order.

``plan_conditions`` checks, before a model is loaded, which conditions the rows allow. ``arrange`` orders the passages
of one row for one condition.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeVar

from ..errors import InvalidInputError

if TYPE_CHECKING:
    from ..data.rows import QARow

Kind = Literal["slot", "original", "shuffled", "top", "no-gold"]
T = TypeVar("T")

SLOTS = (1, 5, 10, 15, 20)
TOPS = (5, 10, 20, 40)
GROUPS = ("slots", "original", "shuffled", "top", "no-gold")  # names of conditions besides slot:N and top:K


@dataclass(frozen=True, slots=True)
class Condition:
    """One arrangement of a row's passages. ``number`` is the slot of ``slot`` and the count of ``top``."""

    kind: Kind
    number: int = 0

    @property
    def name(self) -> str:
        return f"{self.kind}:{self.number}" if self.number else self.kind

    @property
    def label(self) -> str:
        return self.name.replace(":", " ")


ORIGINAL, SHUFFLED, NO_GOLD = Condition("original"), Condition("shuffled"), Condition("no-gold")


@dataclass(frozen=True, slots=True)
class Plan:
    """Conditions that every row allows, the number of documents per question, and notes on what was left out."""

    conditions: tuple[Condition, ...]
    documents: int
    notes: tuple[str, ...] = ()


def plan_conditions(rows: Sequence[QARow], names: Sequence[str] | None = None, documents: int | None = None) -> Plan:
    """Return the conditions to run on ``rows``.

    Args:
        names: ``slots`` (1, 5, 10, 15, 20 and the last), ``slot:N``, ``original``, ``shuffled``, ``top`` (5, 10, 20,
            40), ``top:K``, ``no-gold``; None for all that the rows allow, with notes on the others.
        documents: documents per question (the gold ones and the first others); by default as many as every row has.

    Raises:
        InvalidInputError: a name is unknown, or a row does not allow a condition. Names the row.
    """
    if not rows:
        raise InvalidInputError("there are no rows to evaluate; the file is empty.")
    given, documents = documents, _checked_documents(rows, documents)
    conditions: list[Condition] = []
    notes: list[str] = []
    if given is None and (most := max(len(row.passages) for row in rows)) > documents:
        notes.append(f"rows have {documents} to {most} passages, and every question gets {documents} documents.")
    for name in GROUPS if names is None else names:
        try:
            found = _expand(name, documents, min(len(row.passages) for row in rows))
            for condition in found:
                _require_possible(rows, condition, documents)
        except InvalidInputError as error:
            if names is not None:
                raise
            notes.append(f"{name} left out: {error}")
        else:
            conditions += [condition for condition in found if condition not in conditions]
    several = sum(len(row.gold) > 1 for row in rows)
    if several and any(condition.kind == "slot" for condition in conditions):
        notes.append(
            f"{several} of {len(rows)} rows have several gold passages, which are placed together from the slot on, "
            "or so that they end at the last slot."
        )
    return Plan(tuple(conditions), documents, tuple(notes))


def usable_rows(
    rows: Sequence[QARow], names: Sequence[str] | None = None, documents: int | None = None
) -> tuple[list[QARow], tuple[str, ...]]:
    """Return the rows that allow all conditions in ``names`` (None for all groups), and a note on the others.

    Raises:
        InvalidInputError: a name is unknown, or no row is left.
    """
    kept: list[QARow] = []
    reasons: list[str] = []
    for row in rows:
        try:
            plan_conditions([row], GROUPS if names is None else names, documents)
        except InvalidInputError as error:
            reasons.append(str(error))
        else:
            kept.append(row)
    if not reasons:
        return kept, ()
    note = f"{len(reasons)} of {len(rows)} rows left out, the first because {reasons[0]}"
    if not kept:
        raise InvalidInputError(note)
    return kept, (note,)


def arrange(row: QARow, condition: Condition, documents: int, seed: int) -> list[int]:
    """Return the indices of ``row.passages`` in the order in which a system gets them.

    All conditions except ``top`` use the same documents: the gold passages and the first others, ``documents`` in
    total, in the file's order. Several gold passages are placed together from the slot on, or so that they end at the
    last slot. The shuffled order depends only on the seed and the row.
    """
    if condition.kind == "top":
        return list(range(len(row.passages)))[: condition.number]
    gold, others = _split(row)
    others = others[: max(documents - len(gold), 0)]
    if condition.kind == "no-gold":
        return others
    if condition.kind == "slot":
        before = min(condition.number - 1, len(others))
        return [*others[:before], *gold, *others[before:]]
    chosen = sorted([*gold, *others])
    if condition.kind == "shuffled":
        name = f"{seed}/{row.id}/{row.question}"
        random.Random(name.encode("utf-8", "surrogatepass")).shuffle(chosen)  # bytes seed like the same text
    return chosen


def long_context_order(items: Sequence[T]) -> list[T]:
    """Return items, given best first, with the best at both ends: LangChain's ``LongContextReorder``."""
    worst_first = list(items)[::-1]
    return worst_first[::2][::-1] + worst_first[1::2]


def _split(row: QARow) -> tuple[list[int], list[int]]:
    """Return the indices of the gold passages and of the others."""
    gold = [index for index, passage in enumerate(row.passages) if passage.gold]
    return gold, [index for index, passage in enumerate(row.passages) if not passage.gold]


def _checked_documents(rows: Sequence[QARow], documents: int | None) -> int:
    smallest = min(rows, key=lambda row: len(row.passages))
    fewest = len(smallest.passages)
    if fewest == 0:
        raise InvalidInputError(f"row {smallest.id!r} has no passages to answer from.")
    documents = fewest if documents is None else documents
    if not 1 <= documents <= fewest:
        raise InvalidInputError(
            f"documents is {documents}, but row {smallest.id!r} has {fewest} passages; ask for 1 to {fewest}."
        )
    for row in rows:
        if len(row.gold) > documents:
            raise InvalidInputError(f"documents is {documents}, but row {row.id!r} has {len(row.gold)} gold passages.")
    return documents


def _expand(name: str, documents: int, fewest: int) -> list[Condition]:
    if name in ("original", "shuffled", "no-gold"):
        return [Condition(name)]
    if name == "slots":
        return [Condition("slot", slot) for slot in sorted({*SLOTS, documents}) if slot <= documents]
    if name == "top":
        if not (found := [Condition("top", count) for count in TOPS if count <= fewest]):
            raise InvalidInputError(f"top starts at {TOPS[0]} documents, but a row has only {fewest} passages.")
        return found
    kind, _, number = name.partition(":")
    if kind not in ("slot", "top") or not number.isdecimal():
        raise InvalidInputError(f"condition is {name!r}, but it must be one of {', '.join(GROUPS)}, slot:N and top:K.")
    most = documents if kind == "slot" else fewest
    if not 1 <= int(number) <= most:
        raise InvalidInputError(
            f"condition is {name}, but its number must be from 1 to {most}, the documents per row."
        )
    return [Condition(kind, int(number))]


def _require_possible(rows: Sequence[QARow], condition: Condition, documents: int) -> None:
    for row in rows:
        gold, others = _split(row)
        if condition.kind == "slot" and not gold:
            raise InvalidInputError(f"row {row.id!r} has no gold passage to put at a slot.")
        if condition.kind == "no-gold" and not others[: documents - len(gold)]:
            raise InvalidInputError(f"row {row.id!r} has only gold passages, so no-gold would leave none.")
