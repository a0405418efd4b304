"""The signals of support (``text.support``): the best of the documents that an answer was read from, and the others.

One batched pass without the adapter reads the question over each document that was read and over none. Focus has
already read it over those that it left out. Each question is measured alone and its documents in canonical order, so
the signals depend neither on the caller's order, nor on the other questions of a batch, nor on the store.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ...fusion.interface import FusionModel
from ...fusion.memory import memory_errors
from ...schema import Answer
from ...store import KVRequest
from ...text.documents import EncodedDocuments
from ...text.support import Signals, coverage, rare_coverage
from ..document_kvs import Scope
from ..engine import Engine
from ..focus import LEAD, counts_scores, document_scores, likelihoods, scored_question
from ..requests import Request

Ids = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Answered:
    """An answer with its question, and the request that asked for it."""

    question: str
    request: Request
    answer: Answer


@dataclass(frozen=True, slots=True)
class Compared:
    """A distinct document of a question.

    Attributes:
        score: its score of focus: ``likelihood`` plus the retriever's part.
        pieces: ids of its pieces.
        likelihood: log p(question | document), of its best piece.
        shown: title and text.
    """

    score: float
    pieces: tuple[Ids, ...]
    likelihood: float
    shown: str


def measure_signals(engine: Engine[FusionModel], answered: Answered) -> Signals:
    """Return the signals of a question that was answered from documents."""
    encoded, scope = _documents(engine, answered)
    *read, prior = _token_likelihoods(engine, answered, encoded, scope)
    of_piece = {ids: math.fsum(one) for one, ids in zip(read, encoded.keys.values(), strict=True)}
    distinct, has_scores = _compared(engine, answered, encoded, of_piece)
    candidates = {document.pieces for document in encoded.documents}
    best = max((one for one in distinct if one.pieces in candidates), key=lambda one: (one.score, one.pieces))
    others = [one for one in distinct if one is not best]
    text, none = f"{LEAD} {answered.question.strip()}", math.fsum(prior)
    spans = engine.encoder.plain.offsets(text, continues=True)[-len(prior) :]  # without LEAD
    surprisals = [(start, end, -value) for (start, end), value in zip(spans, prior, strict=True)]
    gain = max(of_piece[ids] for ids in best.pieces) - none
    signals = {
        "gain": gain,
        "explained": gain / -none if none else 0.0,
        "coverage": coverage(text, surprisals, best.shown),
    }
    if others:
        signals["rare_coverage"] = rare_coverage(answered.question, best.shown, [one.shown for one in others])
        signals["lead"] = best.likelihood - max(one.likelihood for one in others)
        if has_scores:
            signals["focus_lead"] = best.score - max(one.score for one in others)
    return signals


def _compared(
    engine: Engine[FusionModel], answered: Answered, encoded: EncodedDocuments, of_piece: Mapping[Ids, float]
) -> tuple[list[Compared], bool]:
    """Return all distinct documents, also those that focus left out, and whether the retriever's scores count."""
    if (focus := answered.request.focus) is None:
        documents, weight = encoded.documents, engine.prompts.focus_weight
        scores = document_scores(documents, of_piece, weight)
    else:
        documents, weight = focus.scored.documents, focus.weight
        scores = [source.focus_score for source in answered.answer.sources]
    found: dict[tuple[Ids, ...], Compared] = {}
    for one, score, likelihood in zip(documents, scores, likelihoods(documents, scores, weight), strict=True):
        if score is None or likelihood is None:
            continue
        shown, same = f"{one.document.title or ''}\n{one.document.text}", found.get(one.pieces)
        if same is not None:  # the same tokens, perhaps with another title or score
            score, likelihood = max(score, same.score), max(likelihood, same.likelihood)
            shown = max(shown, same.shown)
        found[one.pieces] = Compared(score, one.pieces, likelihood, shown)
    return list(found.values()), counts_scores(documents, weight)


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
        return engine.model.token_likelihoods(prefix, documents, ids, given=given)
