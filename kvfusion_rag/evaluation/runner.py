"""Asks every system every question under every condition.

A batch of rows goes through all systems and conditions before the next one, while its documents are in the store.
"""

from __future__ import annotations

from collections.abc import Sequence

from tqdm import tqdm

from ..data.rows import QARow
from ..errors import ContextLimitError, InvalidInputError
from ..schema import Document
from .journal import Journal
from .orders import Condition, Plan, arrange
from .predictions import Prediction, Predictions
from .systems import System


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
                        # If the gold passage is first in the row, slot 1 equals the original order.
                        answers = answered[orders] if orders in answered else _answer(system, batch, orders)
                        if journal is not None:
                            journal.record(system.name, condition, start, answers)
                    answered[orders] = answers
                    found[system.name, condition] += answers
                    bar.update(len(batch))
    return found


def _answer(system: System, rows: Sequence[QARow], orders: Sequence[Sequence[int]]) -> list[Prediction | None]:
    """Return the predictions of one batch, asked row by row if the batch does not fit."""
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
