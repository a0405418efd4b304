"""The mode in which a model answers best, measured on shipped questions (``kvfusion doctor --measure``)."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from ..errors import UnsupportedModelError
from ..schema import Document, Mode
from .metrics import answer_in_text, token_f1

if TYPE_CHECKING:
    from ..generator import KVFusionGenerator

PREFERRED: tuple[Mode, ...] = ("fusion", "ape", "concat")  # of equally good modes, the first
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


def measure_modes(
    generator: KVFusionGenerator, questions: Sequence[ModeQuestion] | None = None, *, progress: bool = False
) -> list[ModeResult]:
    """Answer all questions in every mode, one at a time, in the model's own layout of a bare question."""
    asked = shipped_questions() if questions is None else questions
    return [_measure(generator, mode, asked, progress=progress) for mode in PREFERRED]


def best_of(results: Sequence[ModeResult]) -> Mode:
    """The mode with the most right answers; of equal ones, the one that is faster over stored documents."""
    measured = [result for result in results if result.right is not None]
    return max(measured, key=lambda result: (result.right or 0.0, -PREFERRED.index(result.mode))).mode


def _measure(
    generator: KVFusionGenerator, mode: Mode, questions: Sequence[ModeQuestion], *, progress: bool
) -> ModeResult:
    answers = []
    try:
        for q in tqdm(questions, desc=mode, unit="question", delay=1, leave=False, disable=not progress):
            answers.append(generator.answer(q.question, q.documents, mode=mode, max_new_tokens=LONGEST_ANSWER))
    except UnsupportedModelError as error:
        return ModeResult(mode, reason=str(error))
    pairs = list(zip(answers, (q.answers for q in questions), strict=True))
    count = len(questions)
    return ModeResult(
        mode,
        right=100 * sum(answer_in_text(a.text, wanted) for a, wanted in pairs) / count,
        f1=100 * sum(token_f1(a.text, wanted) for a, wanted in pairs) / count,
        first_token=sum(a.timings.first_token for a in answers) / count,
        total=sum(a.timings.total for a in answers) / count,
    )
