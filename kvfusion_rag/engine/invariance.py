"""Checks that the order of documents does not change an answer, by comparing texts and the bits of all logits."""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch

from ..errors import InvalidInputError
from ..fusion.interface import FusionModel
from ..schema import Document, FocusChoice, InvarianceReport, ModeChoice
from ..text.documents import require_sequence
from ..text.settings import is_count
from .calls import read_call
from .engine import Engine
from .requests import Batch


def check_invariance(
    engine: Engine[FusionModel],
    question: str,
    documents: Sequence[Document | str],
    *,
    permutations: int,
    mode: ModeChoice | None,
    focus: FocusChoice,
    seed: int,
) -> InvarianceReport:
    """Answer in shuffled orders and compare (``KVFusionGenerator.check_invariance``)."""
    require_sequence(documents)
    if not is_count(permutations):
        raise InvalidInputError(f"permutations is {permutations!r}, but it must be a whole number from 1.")
    shuffled, rng = list(documents), random.Random(seed)
    answers: list[str] = []
    expected: list[torch.Tensor] = []
    difference = 0.0
    for _ in range(permutations + 1):
        logits: list[torch.Tensor] = []
        call = read_call(engine, question, shuffled, {"mode": mode, "focus": focus})
        request = engine.runner.prepare(call.requests[0], call.decoding)
        run = engine.runner.start(Batch.of(request))
        for _ in engine.runner.decode(run, call.decoding, on_logits=logits.append):
            pass
        expected = expected or logits
        difference = max(difference, _logit_difference(expected, logits))
        if run.answers[0].text not in answers:
            answers.append(run.answers[0].text)
        rng.shuffle(shuffled)
    return InvarianceReport(engine.prompts.mode(mode)[0].name, permutations, tuple(answers), difference)


def _logit_difference(expected: Sequence[torch.Tensor], found: Sequence[torch.Tensor]) -> float:
    """Return the largest difference over all steps, or infinity if the numbers of steps differ."""
    if len(expected) != len(found):
        return float("inf")
    differing = [(a, b) for a, b in zip(expected, found, strict=True) if not torch.equal(a, b)]
    return max((float((a - b).abs().nan_to_num(float("inf")).max()) for a, b in differing), default=0.0)
