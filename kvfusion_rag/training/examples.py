"""Encodes question-answer rows as token ids and packs them into batches.

Encoder, settings and positions are those of inference, so that training and answering agree.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from ..data.mining import MatchText
from ..data.rows import QARow, require_marked
from ..engine.engine import Engine
from ..errors import ContextLimitError, InvalidInputError
from ..fusion.torch_model import TorchModel
from ..model.positions import PADDING, SHARED, question_start
from ..schema import Document
from ..text.documents import EncodedDocuments
from ..text.layouts import JoinedPrompt, Layout
from .config import Loss

UNANSWERABLE = "Unanswerable"  # the paper's answer to questions that the documents do not answer


@dataclass(frozen=True, slots=True)
class Example:
    """An encoded row.

    Attributes:
        joined: whether prefix and documents are read as ``context`` instead of being fused.
        documents: ids of the documents by store key, in canonical order.
        question: ids that are read before the answer.
        target: ids that are trained, the end token last.
        start: position of the first id of ``question``.
        prefix: ids in front of every document.
        context: ids of prefix and documents in a joined prompt.
        base: the example that the base model reads if Dt learns its distribution.
    """

    joined: bool
    documents: dict[str, tuple[int, ...]]
    question: tuple[int, ...]
    target: tuple[int, ...]
    start: int
    prefix: tuple[int, ...] = ()
    context: tuple[int, ...] = ()
    base: Example | None = None

    @property
    def read(self) -> tuple[int, ...]:
        """Ids that the decoder reads after the documents: the last target token is only predicted."""
        return self.question + self.target[:-1]

    @property
    def shared(self) -> tuple[object, ...]:
        """What examples with the same documents have in common, or an empty tuple without documents."""
        return self.context or tuple(self.documents)


def encode_row(
    row: QARow,
    engine: Engine[TorchModel],
    *,
    end_id: int,
    evidence: bool,
    joined: bool,
    loss: Loss = "answer",
    read: Callable[[tuple[Document, ...], Layout], EncodedDocuments] | None = None,
) -> Example:
    """Encode one row.

    Args:
        engine: engine whose templates, limits and store keys are used.
        end_id: id of the token that ends an answer.
        evidence: whether to append the sentence that contains the answer, as in the paper.
        joined: whether to use one prompt with all documents (full attention) instead of fused ones.
        loss: with "distill", the row's gold passages are encoded for the base model too.
        read: replacement for the engine's ``read``, such as one with a cache.

    Raises:
        ContextLimitError: the row does not fit into the model's window.
    """
    encoder, settings = engine.encoder, engine.settings
    documents = tuple(passage.document(str(n)) for n, passage in enumerate(row.passages, start=1))
    layout = engine.prompts.layout(row.question, None, "fusion", has_documents=bool(documents))
    encoded = (read or engine.read)(documents, layout)
    answer = (row.answers[0] if loss == "distill" else answer_in_gold(row)) or UNANSWERABLE
    if evidence and row.evidence:
        answer += settings.evidence_separator + row.evidence
    target = (*encoder.encode_answer(answer), end_id)
    prefix = layout.prefix

    def fused(found: EncodedDocuments, base: Example | None = None) -> Example:
        start = question_start(len(prefix), settings.passage_length, found.longest)
        return Example(False, found.keys, layout.question, target, start, prefix, base=base)

    gold = tuple(document for document, passage in zip(documents, row.passages, strict=True) if passage.gold)
    base = fused(engine.read(gold, layout)) if loss == "distill" else None
    example = _joined(layout.joined(encoded), target, base) if joined else fused(encoded, base)
    window = engine.model.context_window
    if window is not None and example.start + len(example.read) > window:
        raise ContextLimitError(
            f"row {row.id!r} needs {example.start + len(example.read)} positions, but {engine.model.model_id} has "
            f"{engine.model.position_limit}."
        )
    return example


def _joined(prompt: JoinedPrompt, target: tuple[int, ...], base: Example | None) -> Example:
    length = max((end for _, end in prompt.spans), default=0)
    context, question = prompt.ids[:length], prompt.ids[length:]
    return Example(True, {}, question, target, length, context=context, base=base)


def require_answerable(row: QARow, where: str) -> None:
    """Reject a row that would teach the decoder to answer without a source.

    Raises:
        InvalidInputError: the row has answers but no gold passage that contains one, or the reverse. Names ``where``.
    """
    require_marked(row, where)
    if not row.answers:
        return
    if not row.gold:
        raise InvalidInputError(
            f"{where}: no passage is gold, but answers is {list(row.answers)!r}; mark the passage that contains the "
            "answer, or remove the answers."
        )
    if answer_in_gold(row) is None:
        raise InvalidInputError(
            f"{where}: none of the answers {list(row.answers)!r} is in its gold passage; kvfusion build-data drops "
            "such rows."
        )


def require_trainable(row: QARow, where: str, loss: Loss) -> None:
    """Reject a row that cannot be trained on with ``loss``.

    Raises: InvalidInputError: see ``require_answerable``; "distill" only needs a gold passage and an answer in any
        wording.
    """
    if loss == "answer":
        require_answerable(row, where)
    elif not (row.gold and row.answers):
        missing = "answers is empty" if row.gold else "no passage is gold"
        raise InvalidInputError(
            f"{where}: {missing}, but loss 'distill' needs a gold passage and the base model's answer from it."
        )


def answer_in_gold(row: QARow) -> str | None:
    """Return the first answer that is in a gold passage, in its spelling or normalised, or None."""
    texts = [(passage.text, MatchText.of(passage.text)) for passage in row.gold]
    for answer in row.answers:
        match = MatchText.of(answer)
        if any(answer in text or words.holds([match]) for text, words in texts):
            return answer
    return None


@dataclass(frozen=True, slots=True)
class Batch:
    """Examples of one forward pass. Examples with the same documents share a batch row, one question after the other.

    Documents of joined prompts are in front of the questions.

    Attributes:
        groups: examples of each of the B batch rows.
        ids, positions, labels: (B, Q) each, padded on the right; labels are -100 for tokens that are not trained.
        question_of: (B, Q), index in its group of the example that a token belongs to, ``SHARED`` for the documents of
            a joined prompt, ``PADDING`` for padding.
    """

    groups: Sequence[Sequence[Example]]
    ids: torch.Tensor
    positions: torch.Tensor
    question_of: torch.Tensor
    labels: torch.Tensor

    @property
    def used(self) -> torch.Tensor:
        """(B, Q), 1 for tokens and 0 for padding."""
        return (self.question_of != PADDING).long()

    @property
    def packed(self) -> bool:
        """Whether a batch row has more than one question, which a plain causal mask does not separate."""
        return any(len(group) > 1 for group in self.groups)


def group_by_documents(examples: Sequence[Example]) -> list[list[Example]]:
    """Group examples with the same documents, in order of first appearance. Those without documents stay single."""
    groups: dict[object, list[Example]] = {}
    for number, example in enumerate(examples):
        groups.setdefault(example.shared or number, []).append(example)
    return list(groups.values())


def collate(examples: Sequence[Example]) -> Batch:
    """Pack and pad examples. Label i is the token after ids i, only for target tokens."""
    groups = group_by_documents(examples)
    longest = max(len(group[0].context) + sum(len(example.read) for example in group) for group in groups)
    ids, positions = (torch.zeros(len(groups), longest, dtype=torch.long) for _ in range(2))
    question_of, labels = torch.full_like(ids, PADDING), torch.full_like(ids, -100)
    for row, group in enumerate(groups):
        context = group[0].context
        start = len(context)
        ids[row, :start] = torch.tensor(context)
        positions[row, :start] = torch.arange(start)
        question_of[row, :start] = SHARED
        for number, example in enumerate(group):
            read, end = example.read, start + len(example.read)
            ids[row, start:end] = torch.tensor(read)
            positions[row, start:end] = example.start + torch.arange(len(read))
            question_of[row, start:end] = number
            labels[row, start + len(example.question) - 1 : end] = torch.tensor(example.target)
            start = end
        positions[row, start:] = positions[row, start - 1]  # a valid position for padding
    return Batch(groups, ids, positions, question_of, labels)


def encode_rows(
    rows: Sequence[QARow], encode: Callable[[QARow], Example]
) -> tuple[list[Example], list[tuple[QARow, str]]]:
    """Return the encoded rows that fit, and the other rows with the reason."""
    examples: list[Example] = []
    left_out: list[tuple[QARow, str]] = []
    for row in rows:
        try:
            examples.append(encode(row))
        except ContextLimitError as error:
            left_out.append((row, str(error)))
    return examples, left_out
