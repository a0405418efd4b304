"""Asking every system every question under every condition.

Rows go through in batches, and a batch meets all systems and conditions before the next one comes: its documents
are then still in the store. Knows neither metrics nor files.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tqdm import tqdm

from ..data.rows import QARow
from ..errors import ContextLimitError, InvalidInputError
from ..schema import Document
from .orders import Condition, Plan, arrange
from .systems import System

if TYPE_CHECKING:
    from .journal import Journal


@dataclass(frozen=True, slots=True)
class Prediction:
    """What one system answered, and the documents it was given (numbers in the row, from 1, in order)."""

    text: str
    cited_text: str
    token_ids: tuple[int, ...]
    documents: tuple[int, ...]


# One list over all rows for each system and condition; ``None`` where the question does not fit into the model.
Predictions = Mapping[tuple[str, Condition], Sequence[Prediction | None]]


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
    """Answers of all systems to all rows under all conditions of ``plan``.

    Args:
        batch_size: questions that are answered together.
        seed: of the shuffled order.
        progress: show a bar on stderr where that is a terminal.
        journal: answers that it holds are not asked for again; others are noted in it, batch by batch.

    Raises:
        InvalidInputError: two systems have the same name.
        KVFusionError: what a system raises, but for ContextLimitError, which leaves that one row without a prediction.
    """
    if len({system.name for system in systems}) < len(systems):
        raise InvalidInputError(f"systems share a name: {', '.join(system.name for system in systems)}.")
    found: dict[tuple[str, Condition], list[Prediction | None]] = {
        (system.name, condition): [] for system in systems for condition in plan.conditions
    }
    total = len(rows) * len(found)
    with tqdm(total=total, desc="evaluate", unit="answer", disable=None if progress else True) as bar:
        for start in range(0, len(rows), batch_size):
            batch = rows[start : start + batch_size]
            for system in systems:
                answered: dict[tuple[tuple[int, ...], ...], list[Prediction | None]] = {}
                for condition in plan.conditions:
                    orders = tuple(tuple(arrange(row, condition, plan.documents, seed)) for row in batch)
                    answers = None if journal is None else journal.recall(system.name, condition, start, len(batch))
                    if answers is None:
                        # Rows with the gold passage first have it at slot 1 already.
                        answers = answered[orders] if orders in answered else _answer(system, batch, orders)
                        if journal is not None:
                            journal.note(system.name, condition, start, answers)
                    answered[orders] = answers
                    found[system.name, condition] += answers
                    bar.update(len(batch))
    return found


def _answer(system: System, rows: Sequence[QARow], orders: Sequence[Sequence[int]]) -> list[Prediction | None]:
    """Predictions of one batch; if it does not fit, of each row alone."""
    documents = [_documents(row, order) for row, order in zip(rows, orders, strict=True)]
    try:
        answers = system.answer_batch([row.question for row in rows], documents)
    except ContextLimitError:
        if len(rows) == 1:
            return [None]
        return [
            prediction
            for row, order in zip(rows, orders, strict=True)
            for prediction in _answer(system, [row], [order])
        ]
    return [
        Prediction(answer.text, answer.cited_text, answer.token_ids, tuple(index + 1 for index in order))
        for answer, order in zip(answers, orders, strict=True)
    ]


def _documents(row: QARow, order: Sequence[int]) -> list[Document]:
    return [row.passages[index].document(str(index + 1)) for index in order]
