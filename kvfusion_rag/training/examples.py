"""From question-answer rows to token ids: what one training step reads and what it must answer.

Positions come from ``positions.py`` by way of the same encoder and settings as inference, so training and
answering cannot disagree. Knows no weights and no optimiser.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from ..engine import Engine
from ..errors import ContextLimitError
from ..positions import question_start
from ..qa import QARow

UNANSWERABLE = "Unanswerable"  # the paper's word for questions that no document answers


@dataclass(frozen=True, slots=True)
class Example:
    """One row, encoded: ``documents`` maps store keys to ids, in canonical order.

    The model reads ``question`` from position ``start`` on and is trained on ``target``, which ends with the end
    token. In a joined row prefix and documents stand in ``question`` and nothing is fused.
    """

    joined: bool
    documents: dict[str, tuple[int, ...]]
    question: tuple[int, ...]
    target: tuple[int, ...]
    start: int

    @property
    def read(self) -> tuple[int, ...]:
        """Ids that go into the decoder: the last target token is only predicted."""
        return self.question + self.target[:-1]


def encode_row(row: QARow, engine: Engine, *, end_id: int, evidence: bool, joined: bool) -> Example:
    """Encode one row.

    Args:
        engine: whose templates, limits and store keys are used.
        end_id: the token that ends an answer.
        evidence: append the sentence that holds the answer, as the paper does.
        joined: one prompt with all documents (full attention) in place of fused ones.

    Raises:
        ContextLimitError: the row does not fit into the model's window.
    """
    encoder, settings = engine.encoder, engine.settings
    reading = engine.read([passage.document(str(n)) for n, passage in enumerate(row.passages, start=1)])
    answer = row.answers[0] if row.answers else UNANSWERABLE
    if evidence and row.evidence:
        answer = f"{answer}\nEvidence: {row.evidence}"
    target = (*encoder.encode_answer(answer), end_id)
    question, prefix = encoder.encode_question(row.question), encoder.prefix_ids
    if joined and settings.document_attention == "causal":
        example = Example(True, {}, (*prefix, *reading.joined, *question), target, 0)
    elif joined:  # read as one document
        example = Example(False, engine.joined_document(reading), question, target, len(prefix) + len(reading.joined))
    else:
        start = question_start(len(prefix), settings.passage_length, reading.longest)
        example = Example(False, reading.keys, question, target, start)
    window = engine.backbone.context_window
    if window is not None and example.start + len(example.read) > window:
        raise ContextLimitError(
            f"row {row.id!r} needs {example.start + len(example.read)} positions, but {engine.backbone.model_id} has "
            f"{window}."
        )
    return example


@dataclass(frozen=True, slots=True)
class Batch:
    """Right-padded tensors of B examples: ids, positions, used and labels, each (B, Q); labels are -100 elsewhere."""

    examples: Sequence[Example]
    ids: torch.Tensor
    positions: torch.Tensor
    used: torch.Tensor
    labels: torch.Tensor


def collate(examples: Sequence[Example]) -> Batch:
    """Pad examples to the longest; label i is the token that follows ids i, for target tokens alone."""
    longest = max(len(example.read) for example in examples)
    ids, positions, used = (torch.zeros(len(examples), longest, dtype=torch.long) for _ in range(3))
    labels = torch.full_like(ids, -100)
    for row, example in enumerate(examples):
        length, asked = len(example.read), len(example.question)
        ids[row, :length] = torch.tensor(example.read)
        positions[row] = example.start + torch.arange(longest).clamp(max=length - 1)
        used[row, :length] = 1
        labels[row, asked - 1 : length] = torch.tensor(example.target)
    return Batch(examples, ids, positions, used, labels)


def encode_rows(
    rows: Sequence[QARow], encode: Callable[[QARow], Example]
) -> tuple[list[Example], list[tuple[QARow, str]]]:
    """All rows that fit, and those that do not with the reason."""
    examples: list[Example] = []
    left_out: list[tuple[QARow, str]] = []
    for row in rows:
        try:
            examples.append(encode(row))
        except ContextLimitError as error:
            left_out.append((row, str(error)))
    return examples, left_out
