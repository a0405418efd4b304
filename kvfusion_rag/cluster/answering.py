"""Answers many questions. A question that cannot be answered has an error in its row, and the others are answered."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..errors import KVFusionError
from ..generator import KVFusionGenerator
from ..schema import Answer, Document
from ..text.citations import place_of
from .options import ClusterOptions
from .pool import apart, run_batches
from .questions import Retrieve, question_rows
from .spec import GeneratorSpec

QUESTIONS_PER_BATCH = 8
NO_ANSWER = dict.fromkeys(
    ("answer", "text", "reasoning", "mode", "finish_reason", "support", "found", "sources", "citations",
     "prompt_tokens", "completion_tokens")
)  # fmt: skip


def answer_questions(
    questions: Iterable[Any],
    generator: GeneratorSpec,
    *,
    cluster: ClusterOptions | None = None,
    retrieve: Retrieve | None = None,
    answer_options: Mapping[str, Any] | None = None,
) -> Iterator[dict[str, Any]]:
    """Yield the answer of each question as plain data, in order.

    A row has ``id``, ``question``, ``answer`` (in the source's spelling), ``text`` (in the model's words),
    ``reasoning``, ``mode``, ``finish_reason``, ``support``, ``found``, ``sources``, ``citations``, ``prompt_tokens``,
    ``completion_tokens`` and ``error``. If a question cannot be answered, ``error`` says why, and all others but the
    first two are None.

    Args:
        questions: rows such as ``{"question": "...", "documents": ["..."]}``, also with ``id``. Documents are texts,
            or objects with text, id, title, score and metadata. Sources and citations name its ``place`` ("page 12").
        generator: the model, and the store from which documents are loaded.
        cluster: where to work. Default: in this process.
        retrieve: returns the documents of a question that lists none. It is called in this process.
        answer_options: options of ``KVFusionGenerator.answer_batch``, the same for all questions.

    Raises:
        ClusterError: the cluster or its workers cannot be used.
    """
    task = AnswerTask(generator.in_this_folder(), dict(answer_options or {}))
    yield from run_batches(task, list(question_rows(questions, retrieve)), QUESTIONS_PER_BATCH, cluster)


@dataclass(frozen=True, slots=True)
class AnswerTask:
    """Answers questions."""

    spec: GeneratorSpec
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def store(self) -> str | None:
        return self.spec.store

    def start(self, cache: Path | None) -> Answers:
        return Answers(self.spec.load(cache), self.options)


class Answers:
    """Answers batches of questions, one after another."""

    def __init__(self, generator: KVFusionGenerator, options: Mapping[str, Any]) -> None:
        self._generator, self._options = generator, options

    def __call__(self, batch: list[dict[str, Any]]) -> list[dict[str, Any]]:
        valid = [row for row in batch if "error" not in row]
        answered = iter(apart(self._answer, valid, _failed) if valid else ())
        return [row | NO_ANSWER if "error" in row else next(answered) for row in batch]

    def close(self) -> None:
        if self._generator.store is not None:
            self._generator.store.close()

    def _answer(self, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        documents = [[Document(**fields) for fields in row["documents"]] for row in rows]
        answers = self._generator.answer_batch([row["question"] for row in rows], documents, **self._options)
        return [_answered(row, answer) for row, answer in zip(rows, answers, strict=True)]


def _answered(row: Mapping[str, Any], answer: Answer) -> dict[str, Any]:
    return {
        "id": row["id"],
        "question": row["question"],
        "answer": answer.cited_text,
        "text": answer.text,
        "reasoning": answer.reasoning,
        "mode": answer.mode,
        "finish_reason": answer.finish_reason,
        "support": answer.support,
        "found": answer.found,
        "sources": [
            {"id": source.id, "title": source.title, "used": source.used, "place": place_of(source.metadata)}
            for source in answer.sources
        ],
        "citations": [asdict(citation) for citation in answer.citations],
        "prompt_tokens": answer.usage.prompt_tokens,
        "completion_tokens": answer.usage.completion_tokens,
        "error": None,
    }


def _failed(row: Mapping[str, Any], error: KVFusionError) -> dict[str, Any]:
    return {"id": row["id"], "question": row["question"], **NO_ANSWER, "error": str(error)}
