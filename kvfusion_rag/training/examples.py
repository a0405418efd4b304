"""From question-answer rows to token ids: what one training step reads and what it must answer.

Positions come from ``placing.py`` and ``positions.py``, with the encoder and settings of inference, so training and
answering cannot disagree. Knows no weights and no optimiser.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from ..data.mining import MatchText
from ..data.rows import QARow
from ..engine.engine import Engine
from ..errors import ContextLimitError, InvalidInputError
from ..model.positions import question_start
from ..schema import Document
from ..text.documents import Reading
from ..text.layouts import Layout
from .config import Loss

UNANSWERABLE = "Unanswerable"  # the paper's word for questions that no document answers


@dataclass(frozen=True, slots=True)
class Example:
    """One row, encoded: ``documents`` maps store keys to ids, in canonical order.

    The model reads ``question`` from position ``start`` on and is trained on ``target``, which ends with the end
    token. In a joined row prefix and documents stand in ``question`` and nothing is fused. ``prefix`` stands in front
    of every document. ``base`` is what the base model reads when Dt is to learn its distribution.
    """

    joined: bool
    documents: dict[str, tuple[int, ...]]
    question: tuple[int, ...]
    target: tuple[int, ...]
    start: int
    prefix: tuple[int, ...] = ()
    base: Example | None = None

    @property
    def read(self) -> tuple[int, ...]:
        """Ids that go into the decoder: the last target token is only predicted."""
        return self.question + self.target[:-1]


def encode_row(
    row: QARow,
    engine: Engine,
    *,
    end_id: int,
    evidence: bool,
    joined: bool,
    loss: Loss = "answer",
    read: Callable[[tuple[Document, ...], Layout], Reading] | None = None,
) -> Example:
    """Encode one row.

    Args:
        engine: whose templates, limits and store keys are used.
        end_id: the token that ends an answer.
        evidence: append the sentence that holds the answer, as the paper does.
        joined: one prompt with all documents (full attention) in place of fused ones.
        loss: with "distill", the row's gold passages are encoded for the base model too.
        read: the engine's own ``read``, or one that remembers what it has read.

    Raises:
        ContextLimitError: the row does not fit into the model's window.
    """
    encoder, settings = engine.encoder, engine.settings
    documents = tuple(passage.document(str(n)) for n, passage in enumerate(row.passages, start=1))
    layout = engine.prompts.layout(row.question, None, "fusion", has_documents=bool(documents))
    reading = (read or engine.read)(documents, layout)
    answer = (row.answers[0] if loss == "distill" else standing_answer(row)) or UNANSWERABLE
    if evidence and row.evidence:
        answer += settings.evidence_separator + row.evidence
    target = (*encoder.encode_answer(answer), end_id)
    prefix = layout.prefix

    def fused(found: Reading, base: Example | None = None) -> Example:
        start = question_start(len(prefix), settings.passage_length, found.longest)
        return Example(False, found.keys, layout.question, target, start, prefix, base)

    gold = tuple(document for document, passage in zip(documents, row.passages, strict=True) if passage.gold)
    base = fused(engine.read(gold, layout)) if loss == "distill" else None
    example = Example(True, {}, layout.joined(reading).ids, target, 0, base=base) if joined else fused(reading, base)
    window = engine.backbone.context_window
    if window is not None and example.start + len(example.read) > window:
        raise ContextLimitError(
            f"row {row.id!r} needs {example.start + len(example.read)} positions, but {engine.backbone.model_id} has "
            f"{window}."
        )
    return example


def require_answerable(row: QARow, where: str) -> None:
    """Refuse a row that would teach the decoder to answer from nothing.

    Raises:
        InvalidInputError: it has answers and no gold passage that holds one of them, or the reverse; ``where`` is
            named.
    """
    if not row.answers:
        if row.gold:
            raise InvalidInputError(
                f"{where}: answers is empty, but a passage is gold; give the answer, or unmark it."
            )
        return
    if not row.gold:
        raise InvalidInputError(
            f"{where}: no passage is gold, but answers is {list(row.answers)!r}; mark the passage that holds the "
            "answer, or leave the answers out."
        )
    if standing_answer(row) is None:
        raise InvalidInputError(
            f"{where}: none of the answers {list(row.answers)!r} stands in its gold passage; kvfusion build-data "
            "leaves such rows out."
        )


def require_trainable(row: QARow, where: str, loss: Loss) -> None:
    """Refuse a row that nothing can be learned from by ``loss``; ``where`` is named.

    Raises:
        InvalidInputError: see ``require_answerable``; to distill, a gold passage and an answer of any wording will do.
    """
    if loss == "answer":
        require_answerable(row, where)
    elif not (row.gold and row.answers):
        missing = "answers is empty" if row.gold else "no passage is gold"
        raise InvalidInputError(
            f"{where}: {missing}, but loss 'distill' needs a gold passage and the base model's answer from it."
        )


def standing_answer(row: QARow) -> str | None:
    """The first answer that stands in a gold passage, as it is spelt or in the words of the metric."""
    texts = [(passage.text, MatchText.of(passage.text)) for passage in row.gold]
    for answer in row.answers:
        match = MatchText.of(answer)
        if any(answer in text or words.holds([match]) for text, words in texts):
            return answer
    return None


@dataclass(frozen=True, slots=True)
class Batch:
    """Examples of one forward pass; those with the same documents stand in one row, one question after the other.

    Attributes:
        groups: the examples of each of the R rows.
        ids, positions, labels: right-padded, each (R, Q); labels are -100 where nothing is trained.
        question_of: (R, Q), the place in its group of the example that a token belongs to, -1 for pads.
    """

    groups: Sequence[Sequence[Example]]
    ids: torch.Tensor
    positions: torch.Tensor
    question_of: torch.Tensor
    labels: torch.Tensor

    @property
    def used(self) -> torch.Tensor:
        """(R, Q), 1 where a token is real."""
        return (self.question_of >= 0).long()

    @property
    def packed(self) -> bool:
        """Whether a row holds more than one question, so that a plain causal mask will not do."""
        return any(len(group) > 1 for group in self.groups)


def group_by_documents(examples: Sequence[Example]) -> list[list[Example]]:
    """Fused examples with the same documents together, in order of first appearance; all others alone."""
    groups: dict[object, list[Example]] = {}
    for number, example in enumerate(examples):
        groups.setdefault(tuple(example.documents) or number, []).append(example)
    return list(groups.values())


def collate(examples: Sequence[Example]) -> Batch:
    """Pack and pad examples; label i is the token that follows ids i, for target tokens alone."""
    groups = group_by_documents(examples)
    longest = max(sum(len(example.read) for example in group) for group in groups)
    ids, positions = (torch.zeros(len(groups), longest, dtype=torch.long) for _ in range(2))
    question_of, labels = torch.full_like(ids, -1), torch.full_like(ids, -100)
    for row, group in enumerate(groups):
        start = 0
        for number, example in enumerate(group):
            read, end = example.read, start + len(example.read)
            ids[row, start:end] = torch.tensor(read)
            positions[row, start:end] = example.start + torch.arange(len(read))
            question_of[row, start:end] = number
            labels[row, start + len(example.question) - 1 : end] = torch.tensor(example.target)
            start = end
        positions[row, start:] = positions[row, start - 1]  # pads stand at a position that the model knows
    return Batch(groups, ids, positions, question_of, labels)


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
