"""The signals of support (``text.support``), measured over the documents that an answer was read from.

One batched pass without the adapter reads the question over each of these documents and over none. Each question is
measured alone and its documents in canonical order, so the signals depend neither on the caller's order, nor on the
other questions of a batch, nor on the store.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ...fusion.interface import FusionModel
from ...fusion.memory import memory_errors
from ...schema import Answer
from ...store import KVRequest
from ...text.documents import EncodedDocuments
from ...text.support import Signals, coverage
from ..document_kvs import Scope
from ..engine import Engine
from ..focus import LEAD, scored_question
from ..requests import Request

Ids = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Answered:
    """An answer with its question, and the request that asked for it."""

    question: str
    request: Request
    answer: Answer


def measure_signals(engine: Engine[FusionModel], answered: Answered) -> Signals:
    """Return the signals of a question that was answered from documents."""
    encoded, scope = _documents(engine, answered)
    *likelihoods, prior = _token_likelihoods(engine, answered, encoded, scope)
    best, piece = max((math.fsum(one), ids) for one, ids in zip(likelihoods, encoded.keys.values(), strict=True))
    text = f"{LEAD} {answered.question.strip()}"
    spans = engine.encoder.plain.offsets(text, continues=True)[-len(prior) :]  # without LEAD
    surprisals = [(start, end, -value) for (start, end), value in zip(spans, prior, strict=True)]
    shown = max(f"{one.document.title or ''}\n{one.document.text}" for one in encoded.documents if piece in one.pieces)
    return {"gain": best - math.fsum(prior), "coverage": coverage(text, surprisals, shown)}


def _documents(engine: Engine[FusionModel], answered: Answered) -> tuple[EncodedDocuments, Scope]:
    """Return the documents that the answer was read from, under the current keys of their separate KVs."""
    request, encoded, prefix = answered.request, answered.request.encoded, answered.request.layout.prefix
    if request.focus is not None and request.choice is None:  # the answer names those that focus kept
        encoded = request.focus.encoded.only(
            number for number, source in enumerate(answered.answer.sources) if source.used
        )
    if not request.mode.fuses:  # documents of a joined prompt have no KVs of their own
        bare = engine.prompts.fused_layout(None)
        encoded, prefix = engine.read([one.document for one in encoded.documents], bare), bare.prefix
    engine.document_kvs.refresh()
    scope = Scope(prefix, request.namespace)
    return encoded.with_keys(lambda ids: engine.document_kvs.key(ids, scope)), scope


def _token_likelihoods(
    engine: Engine[FusionModel], answered: Answered, encoded: EncodedDocuments, scope: Scope
) -> Sequence[Sequence[float]]:
    """Return the log-probability of each token of the question given each document, and last given none."""
    document_kvs = engine.document_kvs
    ids, given = scored_question(engine.encoder.plain, answered.question)
    requests = {key: KVRequest(piece) for key, piece in encoded.keys.items()}
    version, is_cancelled = document_kvs.version, answered.request.cancelled.is_set
    fetched = document_kvs.fetch(requests, None, version, scope, is_cancelled=is_cancelled)
    documents = [*(fetched.kvs[key] for key in encoded.keys), None]
    prefix = document_kvs.prefix_kv(scope)
    with memory_errors(engine.model.device, questions=len(documents), tokens=encoded.longest):
        return engine.model.token_likelihoods(prefix, documents, ids, given=given).tolist()
