"""Measures at load whether vLLM answers like torch, over fused documents and over ordinary prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from ..engine.calls import read_call
from ..engine.engine import Engine
from ..engine.requests import Batch, Request
from ..engine.runner import Runner
from ..errors import UnsupportedModelError
from ..fusion.interface import Question
from ..fusion.sampling import DecodingOptions
from ..schema import Check, GateReport
from .model import VllmModel
from .runner import VllmRunner
from .server import DocumentsLostError

DOCUMENTS = (
    "The lighthouse at Harrow Point was built in 1874 by Amara Osei. It is 31 metres high.",
    "The mill on the river grinds 20 sacks of flour a day. The miller's name is Jonas Peel.",
    "The ferry leaves at seven in the morning, and at noon on Sundays.",
)
QUESTIONS = ("Who built the lighthouse?", "When does the ferry leave on Sundays?")
TOKENS = 12  # of each answer
# Two tokens may change places if torch finds them as likely, up to rounding: nats between them.
CLOSE = {torch.float32: 0.01}
CLOSE_IN_HALF_PRECISION = 0.25


def measured_on_vllm(engine: Engine[VllmModel], report: GateReport) -> GateReport:
    """Return ``report`` with the measurements of vLLM.

    Raises:
        UnsupportedModelError: an answer differs from that of torch, or vLLM mixes fused and ordinary prompts.
    """
    runner = engine.runner
    assert isinstance(runner, VllmRunner)
    checks = [*report.checks]
    for question in QUESTIONS:
        call = read_call(engine, question, DOCUMENTS, {"mode": "fusion", "focus": None, "max_new_tokens": TOKENS})
        fused = runner.prepare(call.requests[0], call.decoding)
        checks.append(_same_answer(runner, fused, call.decoding, "vLLM answers over fused documents like torch"))
        checks.append(
            _same_answer(
                runner, _joined(fused), call.decoding, "vLLM answers an ordinary prompt of the same tokens like torch"
            )
        )
    checks.append(_salt_is_checked(runner, fused, call.decoding))
    failed = [check for check in checks if not check.passed]
    if failed:
        raise UnsupportedModelError(
            f"{report.model_id!r} failed the support gate on vLLM: {failed[0].name}: {failed[0].detail}."
        )
    return GateReport(report.model_id, tuple(checks))


def _joined(request: Request) -> Request:
    """Return a request over the same token ids as one ordinary prompt."""
    ids = (*request.layout.prefix, *(i for piece in request.fused or () for i in piece.ids), *request.question.ids)
    mode = replace(request.mode, name="concat")
    return replace(request, fused=None, mode=mode, question=Question(ids, 0))


def _same_answer(runner: VllmRunner, request: Request, options: DecodingOptions, name: str) -> Check:
    """Compare tokens. They may differ from where torch finds both as likely."""
    (found,) = runner.answer_all([request], options)
    (expected,) = Runner.answer_all(runner, [request], options)
    ours, theirs = expected.token_ids, found.token_ids
    same = next((n for n, pair in enumerate(zip(ours, theirs, strict=False)) if pair[0] != pair[1]), None)
    if same is None and len(ours) == len(theirs):
        return Check(name, True, f"all {len(ours)} tokens are equal")
    at = min(len(ours), len(theirs)) - 1 if same is None else same
    gap = _gap(runner, request, ours[: at + 1], theirs[: at + 1])
    close = CLOSE.get(runner.model.backbone.dtype, CLOSE_IN_HALF_PRECISION)
    return Check(name, gap <= close, f"token {at + 1} differs, which torch finds {gap:.2g} nats less likely")


def _gap(runner: VllmRunner, request: Request, ours: Sequence[int], theirs: Sequence[int]) -> float:
    """Return how much less likely torch finds ``theirs`` than ``ours``, in nats."""
    nats = []
    for answer in (ours, theirs):
        run = runner.start(Batch.of(request))
        try:
            nats += runner.model.answer_likelihoods(run.plan, run.context, [request.question], answer)
        finally:
            run.release()
    return nats[0] - nats[1]


def _salt_is_checked(runner: VllmRunner, request: Request, options: DecodingOptions) -> Check:
    """Ask for fused documents with the salt of ordinary prompts, which has to fail."""
    name = "vLLM rejects fused documents with the salt of other requests"
    asked = replace(runner.token_request(request, (), options), salt=runner.plain_salt(request.namespace))
    try:
        tokens = list(runner.server.tokens(asked))
    except DocumentsLostError:
        return Check(name, True, "the request fails")
    return Check(name, False, f"it answers with {len(tokens)} tokens")
