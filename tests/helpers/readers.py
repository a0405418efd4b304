"""Rows with a known answer, and fake systems that read a limited number of documents, for tests of evaluation."""

from __future__ import annotations

from dataclasses import dataclass, field

import tiny

from kvfusion_rag.data.rows import Passage, QARow
from kvfusion_rag.errors import ContextLimitError
from kvfusion_rag.evaluation.predictions import Prediction


def row(gold: list[bool], name: str = "r", answers: tuple[str, ...] = ("lima",)) -> QARow:
    words = tiny.WORDS.split()
    passages = (
        Passage(f"{name} {n} {' '.join(words[n : n + 6])} {'lima' if is_gold else ''}", gold=is_gold)
        for n, is_gold in enumerate(gold)
    )
    return QARow(name, f"who built {name}?", answers, tuple(passages))


def rows(count: int = 6, passages: int = 5) -> list[QARow]:
    """Return rows with the gold passage first, as in lost-in-the-middle."""
    return [row([True, *[False] * (passages - 1)], f"q{n}") for n in range(count)]


@dataclass
class Reader:
    """A system that answers right if the gold passage is among the first ``reach`` documents."""

    name: str
    reach: int = 99
    limit: int = 99
    batches: list[int] = field(default_factory=list)

    def answer_batch(self, questions, documents):
        self.batches.append(len(questions))
        if any(len(given) > self.limit for given in documents):
            raise ContextLimitError("too many documents")
        found = [any("lima" in d.text for d in given[: self.reach]) for given in documents]
        return [Prediction("Lima" if hit else "", "Lima" if hit else "", (1,) if hit else (), ()) for hit in found]

    def identity(self):
        return {"model_id": f"fake/{self.name}"}
