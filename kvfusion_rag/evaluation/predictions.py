"""The record of one answer, and its form in a journal. It depends on neither models nor metrics."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

from .orders import Condition


@dataclass(frozen=True, slots=True)
class Prediction:
    """Answer of one system to one question.

    Attributes:
        text: answer as the model wrote it.
        cited_text: answer in the spelling of its source.
        token_ids: generated ids.
        documents: numbers of the documents that were given, in order; 1 is the row's first passage.
    """

    text: str
    cited_text: str
    token_ids: tuple[int, ...]
    documents: tuple[int, ...]

    def to_list(self) -> list[Any]:
        """Return the fields in order, as plain data for JSON."""
        return [self.text, self.cited_text, self.token_ids, self.documents]

    @classmethod
    def from_list(cls, data: Sequence[Any]) -> Self:
        """Return the prediction that ``to_list`` wrote."""
        text, cited_text, token_ids, documents = data
        return cls(text, cited_text, tuple(token_ids), tuple(documents))


# For each system and condition, one prediction per row; None if the question does not fit into the model's window.
Predictions = Mapping[tuple[str, Condition], Sequence[Prediction | None]]
