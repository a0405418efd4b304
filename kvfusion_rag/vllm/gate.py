"""Measures at load whether vLLM answers like torch, over fused documents and over ordinary prompts."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from ..engine.calls import read_call
from ..engine.engine import Engine
from ..engine.requests import Batch, Request
from ..errors import UnsupportedModelError
from ..fusion.interface import Question
from ..fusion.sampling import DecodingOptions
from ..schema import Check, GateReport
from .runner import VllmRunner
from .server import DocumentsLostError

DOCUMENTS = (
    "The lighthouse at Harrow Point was built in 1874 by Amara Osei. It is 31 metres high.",
    "The mill on the river grinds 20 sacks of flour a day. The miller's name is Jonas Peel.",
    "The ferry leaves at seven in the morning, and at noon on Sundays.",
)
QUESTIONS = ("Who built the lighthouse?", "When does the ferry leave on Sundays?")
TOKENS = 12  # per answer
ALLOWED = {torch.float32: 1e-3}  # difference of log-probabilities in nats per token that rounding may cause
ALLOWED_IN_HALF_PRECISION = 0.1


def measured_on_vllm(engine: Engine[Any], report: GateReport) -> GateReport:
    """Return ``report`` with the measurements of vLLM.

    Raises:
        UnsupportedModelError: an answer differs from that of torch, or vLLM mixes fused and ordinary prompts.
    """
    runner = engine.runner
    assert isinstance(runner, VllmRunner)
    checks = [*report.checks]
    options = {"mode": "fusion", "focus": None, "max_new_tokens": TOKENS, "max_reasoning_tokens": 0}
    for question in QUESTIONS:
        call = read_call(engine, question, DOCUMENTS, options)
        fused = runner.prepare(call.requests[0], call.decoding)
        runner.begin(Batch.of(fused))
        checks += [
            _agrees(runner, fused, call.decoding, "vLLM over fused documents = torch"),
            _agrees(runner, _joined(fused), call.decoding, "vLLM over the same ids as one prompt = torch"),
            _salt_is_checked(runner, fused, call.decoding),
        ]
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


def _agrees(runner: VllmRunner, request: Request, options: DecodingOptions, name: str) -> Check:
    """Compare the probability of vLLM's own answer with the one that torch gives it."""
    found = list(runner.server.tokens(replace(runner.token_request(request, (), options), scored=True)))
    run = runner.start(Batch.of(request))
    try:
        answer = [token.id for token in found]
        (expected,) = runner.model.answer_likelihoods(run.plan, run.context, [request.question], answer)
    finally:
        run.release()
    difference = abs(sum(token.log_probability or 0.0 for token in found) - expected) / len(found)
    allowed = ALLOWED.get(runner.model.backbone.dtype, ALLOWED_IN_HALF_PRECISION)
    detail = f"log-probabilities of {len(found)} tokens differ by {difference:.1e} nats each, allowed {allowed:g}"
    return Check(name, difference <= allowed, detail)


def _salt_is_checked(runner: VllmRunner, request: Request, options: DecodingOptions) -> Check:
    """Ask for fused documents with the salt of ordinary prompts, which has to fail."""
    name = "vLLM rejects fused documents with the salt of other requests"
    asked = replace(runner.token_request(request, (), options), salt=runner.plain_salt(request.namespace))
    try:
        tokens = list(runner.server.tokens(asked))
    except DocumentsLostError:
        return Check(name, True, "the request fails")
    return Check(name, False, f"it answers with {len(tokens)} tokens")
