"""Measures in which mode and with which focus a model answers best (``kvfusion doctor --measure``)."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from ..data.answer_match import answer_in_text, token_f1
from ..engine.focus import standardized
from ..errors import UnsupportedModelError
from ..schema import Document, Mode
from ..text.measured_mode import Measured
from .scores import similarities

if TYPE_CHECKING:
    from ..generator import KVFusionGenerator
    from ..retrieval import Embedder

# Mode and focus; of equally good pairs the first is chosen.
CHOICES: tuple[tuple[Mode, int | None], ...] = (
    ("fusion", None), ("fusion", 3), ("fusion", 2), ("fusion", 1), ("ape", None), ("concat", None),
)  # fmt: skip
WEIGHTS = (0.0, 0.5, 1.0, 2.0, 4.0, 8.0)  # weights of the retriever's standardized score
MAX_ANSWER_TOKENS = 64


@dataclass(frozen=True, slots=True)
class ModeQuestion:
    """A question, its accepted answers, and its documents, including the one with the answer."""

    question: str
    answers: tuple[str, ...]
    documents: tuple[Document, ...]


@dataclass(frozen=True, slots=True)
class ModeResult:
    """Figures of one mode.

    Attributes:
        focus: documents kept; None for all.
        right: share of answers (%) that contain an accepted answer.
        f1: mean word F1 (%) against the accepted answers.
        first_token: mean seconds until the first token, including reading the documents.
        total: mean seconds until the end of the answer.
        reason: why the model cannot answer in this mode; the figures are then None.
    """

    mode: Mode
    right: float | None = None
    f1: float | None = None
    first_token: float | None = None
    total: float | None = None
    reason: str | None = None
    focus: int | None = None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def shipped_questions() -> list[ModeQuestion]:
    """Return the 40 questions over five documents each that ship with the package."""
    data = json.loads(files("kvfusion_rag.evaluation").joinpath("mode_questions.json").read_text(encoding="utf-8"))
    documents = [Document(d["text"], id=str(n), title=d["title"]) for n, d in enumerate(data["documents"])]
    return [
        ModeQuestion(q["question"], tuple(q["answers"]), tuple(documents[n] for n in q["documents"]))
        for q in data["questions"]
    ]


def with_scores(questions: Sequence[ModeQuestion], embedder: Embedder) -> list[ModeQuestion]:
    """Return the questions with cosine similarities as their documents' retriever scores."""
    scores = similarities([q.question for q in questions], [q.documents for q in questions], embedder)
    return [
        replace(q, documents=tuple(replace(d, score=s) for d, s in zip(q.documents, own, strict=True)))
        for q, own in zip(questions, scores, strict=True)
    ]


def measure_modes(
    generator: KVFusionGenerator, questions: Sequence[ModeQuestion] | None = None, *, progress: bool = False
) -> tuple[list[ModeResult], float]:
    """Answer all questions in every mode, one at a time, in the model's own layout.

    Returns:
        The results, and the best weight of the retriever's score, with which focus was measured.
    """
    questions = shipped_questions() if questions is None else questions
    weight = best_weight(generator, questions)
    weighted = generator.with_settings(focus_weight=weight)
    return [_measure(weighted, mode, focus, questions, progress=progress) for mode, focus in CHOICES], weight


def best_of(results: Sequence[ModeResult]) -> ModeResult:
    """Return the result with the most right answers, or of equal ones the first in ``CHOICES``."""
    measured = [result for result in results if result.right is not None]
    return max(measured, key=lambda result: (result.right or 0.0, -CHOICES.index((result.mode, result.focus))))


def best_measured(results: Sequence[ModeResult], weight: float) -> Measured:
    """Return the best mode, and the best focus in mode "fusion"."""
    fused = [result for result in results if result.mode == "fusion" and result.right is not None]
    return Measured(best_of(results).mode, best_of(fused).focus if fused else None, weight)


def best_weight(generator: KVFusionGenerator, questions: Sequence[ModeQuestion]) -> float:
    """Return the weight of the retriever's score that ranks gold documents highest, or 0 if there are no scores."""
    if any(document.score is None for q in questions for document in q.documents):
        return 0.0
    plain = generator.with_settings(focus_weight=0.0)
    ranked: list[tuple[list[float], list[float], list[bool]]] = []
    for q in questions:
        options = {"mode": "fusion", "focus": 1, "max_new_tokens": 1, "max_reasoning_tokens": 0}
        sources = plain.answer(q.question, q.documents, **options).sources
        likelihoods = [source.focus_score for source in sources if source.focus_score is not None]
        if len(likelihoods) < len(sources):  # nothing was ranked
            continue
        scores = standardized([float(document.score or 0.0) for document in q.documents])
        ranked.append((likelihoods, scores, [answer_in_text(d.text, q.answers) for d in q.documents]))
    return max(WEIGHTS, key=lambda weight: (sum(_reciprocal_rank(weight, *row) for row in ranked), -weight))


def _reciprocal_rank(
    weight: float, likelihoods: Sequence[float], scores: Sequence[float], gold: Sequence[bool]
) -> float:
    totals = [likelihood + weight * score for likelihood, score in zip(likelihoods, scores, strict=True)]
    best = max((total for total, right in zip(totals, gold, strict=True) if right), default=None)
    return 0.0 if best is None else 1 / (1 + sum(total > best for total in totals))


def _measure(
    generator: KVFusionGenerator, mode: Mode, focus: int | None, questions: Sequence[ModeQuestion], *, progress: bool
) -> ModeResult:
    name = mode if focus is None else f"{mode} {focus}"
    options = {"mode": mode, "focus": focus, "max_new_tokens": MAX_ANSWER_TOKENS, "max_reasoning_tokens": 0}
    try:
        bar = tqdm(questions, desc=name, unit="question", delay=1, leave=False, disable=not progress)
        answers = [generator.answer(q.question, q.documents, **options) for q in bar]
    except UnsupportedModelError as error:
        return ModeResult(mode, reason=str(error), focus=focus)
    pairs = list(zip(answers, (q.answers for q in questions), strict=True))
    count = len(questions)
    return ModeResult(
        mode,
        right=100 * sum(answer_in_text(a.text, accepted) for a, accepted in pairs) / count,
        f1=100 * sum(token_f1(a.text, accepted) for a, accepted in pairs) / count,
        first_token=sum(a.timings.first_token for a in answers) / count,
        total=sum(a.timings.total for a in answers) / count,
        focus=focus,
    )
