"""Asks every system every question under every condition.

A batch of rows goes through all systems and conditions before the next one, while its documents are in the store.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from tqdm import tqdm

from ..data.rows import QARow
from ..errors import ContextLimitError, InvalidInputError
from ..schema import Document
from .journal import Journal
from .orders import Condition, Plan, arrange
from .predictions import Prediction, Predictions
from .systems import System

Orders = tuple[tuple[int, ...], ...]  # indices of each row's passages
Answers = list[Prediction | None]


@dataclass(frozen=True, slots=True)
class Ask:
    """One system and one order of each row's passages, with which it is asked once."""

    system: str
    orders: Orders


@dataclass(frozen=True, slots=True)
class Batch:
    """Rows that are answered together.

    Attributes:
        start: number of the first row.
        asks: what is not in the journal.
    """

    start: int
    rows: Sequence[QARow]
    asks: tuple[Ask, ...]


AnswerBatches = Callable[[Sequence[Batch]], Iterator[Answers]]
"""Function that yields the answers to each ask of each batch, in order."""


def predict(
    rows: Sequence[QARow],
    systems: Sequence[System],
    plan: Plan,
    *,
    batch_size: int = 8,
    seed: int = 0,
    progress: bool = False,
    journal: Journal | None = None,
) -> Predictions:
    """Return the answers of all systems to all rows under all conditions of ``plan``.

    Args:
        batch_size: questions answered together.
        seed: seed of the shuffled order.
        progress: whether to show a progress bar if stderr is a terminal.
        journal: its answers are not computed again, and new ones are recorded in it batch by batch.

    Raises:
        InvalidInputError: two systems have the same name.
        KVFusionError: a system failed. A ContextLimitError only leaves its row without a prediction.
    """
    by_name = {system.name: system for system in systems}

    def answer(batches: Sequence[Batch]) -> Iterator[Answers]:
        for batch in batches:
            for ask in batch.asks:
                yield answer_rows(by_name[ask.system], batch.rows, ask.orders)

    names = [system.name for system in systems]
    return predict_with(
        answer, rows, names, plan, batch_size=batch_size, seed=seed, progress=progress, journal=journal
    )


def predict_with(
    answer: AnswerBatches,
    rows: Sequence[QARow],
    systems: Sequence[str],
    plan: Plan,
    *,
    batch_size: int = 8,
    seed: int = 0,
    progress: bool = False,
    journal: Journal | None = None,
) -> Predictions:
    """Return the answers like :func:`predict`, which ``answer`` computes for ``systems`` with these names."""
    if len(set(systems)) < len(systems):
        raise InvalidInputError(f"systems share a name: {', '.join(systems)}.")
    found: dict[tuple[str, Condition], Answers] = {
        (system, condition): [] for system in systems for condition in plan.conditions
    }
    planned = [
        _Planned(rows[start : start + batch_size], start, systems, plan, seed, journal)
        for start in range(0, len(rows), batch_size)
    ]
    new = answer([one.batch for one in planned if one.batch.asks])
    with tqdm(total=len(rows) * len(found), desc="evaluate", unit="answer", disable=None if progress else True) as bar:
        for one in planned:
            for ask, conditions in one.conditions.items():
                answers = one.known[ask] if ask in one.known else next(new)
                for condition in conditions:
                    if journal is not None and (ask.system, condition) not in one.recorded:
                        journal.record(ask.system, condition, one.batch.start, answers)
                    found[ask.system, condition] += answers
                    bar.update(len(answers))
    return found


class _Planned:
    """A batch, the conditions of each of its asks, and what the journal has of it."""

    def __init__(
        self, rows: Sequence[QARow], start: int, systems: Sequence[str], plan: Plan, seed: int, journal: Journal | None
    ) -> None:
        self.conditions: dict[Ask, list[Condition]] = {}
        self.known: dict[Ask, Answers] = {}
        self.recorded = set[tuple[str, Condition]]()
        orders = {
            condition: tuple(tuple(arrange(row, condition, plan.documents, seed)) for row in rows)
            for condition in plan.conditions
        }
        for system in systems:
            for condition in plan.conditions:
                # If the gold passage is first in the row, slot 1 equals the original order.
                ask = Ask(system, orders[condition])
                self.conditions.setdefault(ask, []).append(condition)
                answers = None if journal is None else journal.recall(system, condition, start, len(rows))
                if answers is not None:
                    self.known[ask] = answers
                    self.recorded.add((system, condition))
        self.batch = Batch(start, rows, tuple(ask for ask in self.conditions if ask not in self.known))


def answer_rows(system: System, rows: Sequence[QARow], orders: Sequence[Sequence[int]]) -> Answers:
    """Return the predictions of one batch, asked row by row if the batch does not fit.

    Args:
        orders: indices of each row's passages, in the order in which the system reads them.
    """
    documents = [_documents(row, order) for row, order in zip(rows, orders, strict=True)]
    try:
        answers = system.answer_batch([row.question for row in rows], documents)
    except ContextLimitError:
        if len(rows) == 1:
            return [None]
        return [
            prediction
            for row, order in zip(rows, orders, strict=True)
            for prediction in answer_rows(system, [row], [order])
        ]
    return [
        Prediction(answer.text, answer.cited_text, answer.token_ids, tuple(index + 1 for index in order))
        for answer, order in zip(answers, orders, strict=True)
    ]


def _documents(row: QARow, order: Sequence[int]) -> list[Document]:
    return [row.passages[index].document(str(index + 1)) for index in order]
