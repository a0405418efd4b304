"""The signals of support (``text.support``), measured after an answer is known, over the documents that it was read from.

The question is read over each document and over none, without the adapter, in one batched pass. The answer is read
again over the fused cache. Each answer is measured alone and its documents in canonical order, so the signals depend
neither on the caller's order, nor on the other questions of a batch, nor on the store.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

from ...fusion.interface import FusionModel
from ...fusion.sampling import DecodingOptions
from ...schema import Answer
from ...store import KVRequest
from ...text.support import Signals
from ..document_kvs import Scope
from ..engine import Engine
from ..focus import scored_question
from ..requests import Batch, Request


@dataclass(frozen=True, slots=True)
class Answered:
    """An answer with its question, and the request that asked for it."""

    question: str
    request: Request
    answer: Answer


def measure_signals(engine: Engine[FusionModel], answered: Answered) -> Signals:
    """Return the signals of an answer that has tokens and documents."""
    request = _as_answered(engine, answered)
    return {**_of_question(engine, answered.question, request), "answer": _of_answer(engine, request, answered.answer)}


def _as_answered(engine: Engine[FusionModel], answered: Answered) -> Request:
    """Return the request over the documents that focus kept, which the answer names, so nothing is scored again."""
    runner, request = engine.runner, answered.request
    if request.focus is None or request.choice is not None:
        return runner.current(request)
    kept = [number for number, source in enumerate(answered.answer.sources) if source.used]
    documents = request.focus.encoded.only(kept)
    options = DecodingOptions(max_new_tokens=len(answered.answer.token_ids))
    again = runner.request_for(
        documents, request.layout, request.mode, request.namespace, options, time.perf_counter()
    )
    return runner.current(again)


def _of_question(engine: Engine[FusionModel], question: str, request: Request) -> Signals:
    """Return log p(question | its best document) and log p(question | no document), in nats per token."""
    encoded, prefix = request.encoded, request.layout.prefix
    if not request.mode.fuses:  # documents of a joined prompt are scored separately, as by focus
        bare = engine.prompts.fused_layout(None)
        encoded, prefix = engine.read([one.document for one in encoded.documents], bare), bare.prefix
    document_kvs, scope = engine.document_kvs, Scope(prefix, request.namespace)
    requests = {key: KVRequest(ids) for key, ids in encoded.keys.items()}
    fetched = document_kvs.fetch(
        requests, None, document_kvs.version, scope, is_cancelled=request.cancelled.is_set
    )
    ids, given = scored_question(engine.encoder.plain, question)
    *found, prior = engine.model.question_likelihoods(
        document_kvs.prefix_kv(scope), [*(fetched.kvs[key] for key in encoded.keys), None], ids, given=given
    )
    tokens = len(ids) - given
    return {"question": max(found) / tokens, "prior": prior / tokens}


def _of_answer(engine: Engine[FusionModel], request: Request, answer: Answer) -> float:
    """Return log p(answer | question, documents), in nats per token."""
    run = engine.runner.start(Batch.of(request))
    try:
        with engine.runner.memory_errors(run.batch):
            [total] = engine.model.answer_likelihoods(run.plan, run.context, [request.question], answer.token_ids)
    finally:
        run.release()
    return total / len(answer.token_ids)
