"""Settings of one adaptation. Plain data."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import get_args

from ..errors import InvalidInputError
from ..text.settings import Layout, is_count
from ..training.config import TrainingConfig

DEFAULT_PASSAGE_TOKENS = 160


@dataclass(frozen=True, slots=True)
class AdaptOptions:
    """How questions are made, filtered, trained on and judged.

    Attributes:
        passages: maximum number of passages to ask about, drawn at random if the documents have more.
        questions_per_passage: questions that the model writes about each passage, 1 to 3.
        passage_tokens: maximum tokens of a passage; none is the model's passage length, or 160 if it has none.
        held_out: share of the passages (0 to 1) whose questions are judged and not trained on.
        judged: maximum number of held-out questions to judge.
        documents: maximum number of documents per question, including the gold passage.
        min_f1: minimum word F1 (0 to 1) with which the model must repeat its answer.
        answer_tokens: maximum tokens of an answer; a longer one is cut after its last complete sentence.
        layout: layout in which questions are read, now and later; none is the model's own. "fixed" asks for few
            words, which suits small models.
        seed: seed of the sample and of everything random.
        training: settings of the trainer; ``layout`` and ``seed`` are replaced by those above, and the loss is
            "distill".
    """

    passages: int = 400
    questions_per_passage: int = 2
    passage_tokens: int | None = None
    held_out: float = 0.15
    judged: int = 100
    documents: int = 5
    min_f1: float = 0.6
    answer_tokens: int = 64
    layout: Layout | None = None
    seed: int = 0
    training: TrainingConfig = field(
        default_factory=lambda: TrainingConfig(loss="distill", layout="prompt", epochs=3, eval_every=20)
    )

    def __post_init__(self) -> None:
        for name in ("passages", "judged", "answer_tokens"):
            if not is_count(getattr(self, name)):
                raise InvalidInputError(f"{name} is {getattr(self, name)!r}, but it must be a whole number from 1.")
        if not (is_count(self.questions_per_passage) and self.questions_per_passage <= 3):
            raise InvalidInputError(
                f"questions_per_passage is {self.questions_per_passage!r}, but it must be 1, 2 or 3."
            )
        if not (is_count(self.documents) and self.documents >= 2):
            raise InvalidInputError(f"documents is {self.documents!r}, but it must be a whole number from 2.")
        if not 0 < self.held_out < 1:
            raise InvalidInputError(f"held_out is {self.held_out!r}, but it must be a share between 0 and 1.")
        if not 0 < self.min_f1 <= 1:
            raise InvalidInputError(f"min_f1 is {self.min_f1!r}, but it must be above 0 and at most 1.")
        if self.layout not in (None, *get_args(Layout)):
            raise InvalidInputError(f"layout is {self.layout!r}, but it must be 'prompt', 'fixed' or None.")
        if self.training.full or self.training.loss != "distill":
            raise InvalidInputError(
                f"training has full={self.training.full} and loss={self.training.loss!r}, but an adapter needs "
                "full=False and loss='distill'."
            )
