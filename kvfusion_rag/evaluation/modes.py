"""The mode and focus in which a model answers best, measured on shipped questions (``kvfusion doctor --measure``)."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from ..data.answer_match import answer_in_text, token_f1
from ..engine.focus import standardized
from ..engine.measured import Measured
from ..errors import UnsupportedModelError
from ..schema import Document, Mode
from .scores import similarities

if TYPE_CHECKING:
    from ..generator import KVFusionGenerator
    from ..retrieval import Embedder

# Of equally good ways, the first.
WAYS: tuple[tuple[Mode, int | None], ...] = (
    ("fusion", None), ("fusion", 3), ("fusion", 2), ("fusion", 1), ("ape", None), ("concat", None),
)  # fmt: skip
WEIGHTS = (0.0, 0.5, 1.0, 2.0, 4.0, 8.0)  # of the retriever's standardized score
LONGEST_ANSWER = 64  # tokens


@dataclass(frozen=True, slots=True)
class ModeQuestion:
    """A question, its accepted answers, and the documents to answer it from, the right one among them."""

    question: str
    answers: tuple[str, ...]
    documents: tuple[Document, ...]


@dataclass(frozen=True, slots=True)
class ModeResult:
    """How one mode did.

    Attributes:
        focus: documents kept; None for all.
        right: answers (%) that contain an accepted answer.
        f1: mean F1 of words (%) against the accepted answers.
        first_token: mean seconds until the first token, documents read included.
        total: mean seconds until the whole answer.
        reason: why the model cannot answer in this mode; the other fields are then None.
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
    """The 40 questions over five documents each that ship with the package."""
    data = json.loads(files("kvfusion_rag.evaluation").joinpath("mode_questions.json").read_text(encoding="utf-8"))
    documents = [Document(d["text"], id=str(n), title=d["title"]) for n, d in enumerate(data["documents"])]
    return [
        ModeQuestion(q["question"], tuple(q["answers"]), tuple(documents[n] for n in q["documents"]))
        for q in data["questions"]
    ]


def with_scores(questions: Sequence[ModeQuestion], embedder: Embedder) -> list[ModeQuestion]:
    """The questions with their documents' cosine similarities as retriever scores."""
    scores = similarities([q.question for q in questions], [q.documents for q in questions], embedder)
    return [
        replace(q, documents=tuple(replace(d, score=s) for d, s in zip(q.documents, own, strict=True)))
        for q, own in zip(questions, scores, strict=True)
    ]


def measure_modes(
    generator: KVFusionGenerator, questions: Sequence[ModeQuestion] | None = None, *, progress: bool = False
) -> tuple[list[ModeResult], float]:
    """Answer all questions in every mode, one at a time, in the model's own layout of a bare question.

    Returns:
        The results, and the best weight of the retriever's score, which focus was measured with.
    """
    asked = shipped_questions() if questions is None else questions
    weight = best_weight(generator, asked)
    weighted = generator.with_settings(focus_weight=weight)
    return [_measure(weighted, mode, focus, asked, progress=progress) for mode, focus in WAYS], weight


def best_of(results: Sequence[ModeResult]) -> ModeResult:
    """The result with the most right answers; of equal ones, the one that ``WAYS`` names first."""
    measured = [result for result in results if result.right is not None]
    return max(measured, key=lambda result: (result.right or 0.0, -WAYS.index((result.mode, result.focus))))


def best_measured(results: Sequence[ModeResult], weight: float) -> Measured:
    """What to keep: the best mode, and the focus that is best in mode "fusion"."""
    fused = [result for result in results if result.mode == "fusion" and result.right is not None]
    return Measured(best_of(results).mode, best_of(fused).focus if fused else None, weight)


def best_weight(generator: KVFusionGenerator, questions: Sequence[ModeQuestion]) -> float:
    """The weight of the retriever's score that ranks documents with an accepted answer highest; 0 without scores."""
    if any(document.score is None for q in questions for document in q.documents):
        return 0.0
    plain = generator.with_settings(focus_weight=0.0)
    ranked: list[tuple[list[float], list[float], list[bool]]] = []
    for q in questions:
        sources = plain.answer(q.question, q.documents, mode="fusion", focus=1, max_new_tokens=1).sources
        likelihoods = [source.focus_score for source in sources if source.focus_score is not None]
        if len(likelihoods) < len(sources):  # nothing to choose
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
    answers = []
    name = mode if focus is None else f"{mode} {focus}"
    try:
        for q in tqdm(questions, desc=name, unit="question", delay=1, leave=False, disable=not progress):
            answers.append(
                generator.answer(q.question, q.documents, mode=mode, focus=focus, max_new_tokens=LONGEST_ANSWER)
            )
    except UnsupportedModelError as error:
        return ModeResult(mode, reason=str(error), focus=focus)
    pairs = list(zip(answers, (q.answers for q in questions), strict=True))
    count = len(questions)
    return ModeResult(
        mode,
        right=100 * sum(answer_in_text(a.text, wanted) for a, wanted in pairs) / count,
        f1=100 * sum(token_f1(a.text, wanted) for a, wanted in pairs) / count,
        first_token=sum(a.timings.first_token for a in answers) / count,
        total=sum(a.timings.total for a in answers) / count,
        focus=focus,
    )
