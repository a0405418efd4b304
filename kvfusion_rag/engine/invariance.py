"""Whether answers are the same in any order of the documents: asked in many, texts and bits of all logits compared."""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch

from ..errors import InvalidInputError
from ..fusion.sampling import DecodingOptions
from ..schema import Document, FocusChoice, InvarianceReport, ModeChoice
from ..text.documents import require_sequence
from ..text.settings import is_count
from .engine import Engine
from .requests import Batch


def check_invariance(
    engine: Engine,
    question: str,
    documents: Sequence[Document | str],
    options: DecodingOptions,
    *,
    permutations: int,
    mode: ModeChoice | None,
    focus: FocusChoice,
    seed: int,
) -> InvarianceReport:
    """See ``KVFusionGenerator.check_invariance``."""
    require_sequence(documents)
    if not is_count(permutations):
        raise InvalidInputError(f"permutations is {permutations!r}, but it must be a whole number from 1.")
    shuffled, rng = list(documents), random.Random(seed)
    answers: list[str] = []
    expected: list[torch.Tensor] = []
    difference = 0.0
    for _ in range(permutations + 1):
        logits: list[torch.Tensor] = []
        request = engine.prepare(engine.request(question, shuffled, None, mode, options, focus=focus), options)
        run = engine.start(Batch.of(request), options)
        for _ in engine.decode(run, options, on_logits=logits.append):
            pass
        expected = expected or logits
        difference = max(difference, _logit_difference(expected, logits))
        if run.rows[0].text not in answers:
            answers.append(run.rows[0].text)
        rng.shuffle(shuffled)
    return InvarianceReport(engine.prompts.mode_of(mode)[0], permutations, tuple(answers), difference)


def _logit_difference(expected: Sequence[torch.Tensor], found: Sequence[torch.Tensor]) -> float:
    """Largest difference over all steps; infinite where one answer has more steps than the other."""
    if len(expected) != len(found):
        return float("inf")
    differing = [(a, b) for a, b in zip(expected, found, strict=True) if not torch.equal(a, b)]
    return max((float((a - b).abs().nan_to_num(float("inf")).max()) for a, b in differing), default=0.0)
