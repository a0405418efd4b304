"""The signals of support (``text.support``): the best of the documents that an answer was read from, and the others.

One batched pass without the adapter reads the question over each document that was read and over none. Focus has
already read it over those that it left out. Each question is measured alone and its documents in canonical order, so
the signals depend neither on the caller's order, nor on the other questions of a batch, nor on the store.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from ...fusion.interface import FusionModel
from ...fusion.memory import memory_errors
from ...schema import Answer
from ...store import KVRequest
from ...text.documents import EncodedDocuments
from ...text.support import Signals, coverage, lead, rare_coverage
from ..document_kvs import Scope
from ..engine import Engine
from ..focus import LEAD, document_scores, likelihoods, scored_question, standardized
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
        likelihood: log p(question | document), of its best piece.
        shown: title and text.
        score: the retriever's score; None if it has none.
    """

    likelihood: float
    shown: str
    score: float | None


def measure_signals(engine: Engine[FusionModel], answered: Answered) -> Signals:
    """Return the signals of a question that was answered from documents."""
    encoded, scope = _documents(engine, answered)
    *read, prior = _token_likelihoods(engine, answered, encoded, scope)
    of_piece = {ids: math.fsum(one) for one, ids in zip(read, encoded.keys.values(), strict=True)}
    _, piece = max((likelihood, ids) for ids, likelihood in of_piece.items())
    best, others = _compared(engine, answered, encoded, of_piece, piece)
    text, none = f"{LEAD} {answered.question.strip()}", math.fsum(prior)
    spans = engine.encoder.plain.offsets(text, continues=True)[-len(prior) :]  # without LEAD
    surprisals = [(start, end, -value) for (start, end), value in zip(spans, prior, strict=True)]
    gain = best.likelihood - none
    signals = {
        "gain": gain,
        "explained": gain / -none if none else 0.0,
        "coverage": coverage(text, surprisals, best.shown),
    }
    if others:
        signals["rare_coverage"] = rare_coverage(answered.question, best.shown, [one.shown for one in others])
        signals["lead"] = lead(best.likelihood, [one.likelihood for one in others])
        scores = [one.score for one in (best, *others) if one.score is not None]
        if len(scores) > len(others):
            first, *rest = standardized(scores)
            signals["score_lead"] = lead(first, rest)
    return signals


def _compared(
    engine: Engine[FusionModel],
    answered: Answered,
    encoded: EncodedDocuments,
    of_piece: Mapping[Ids, float],
    piece: Ids,
) -> tuple[Compared, list[Compared]]:
    """Return the document with the best ``piece``, and the other distinct ones, also those that focus left out."""
    documents, scores = encoded.documents, document_scores(encoded.documents, of_piece, 0.0)
    if (focus := answered.request.focus) is not None:
        documents = focus.scored.documents
        scores = [source.focus_score for source in answered.answer.sources]
        scores = likelihoods(documents, scores, focus.weight)
    alike: defaultdict[tuple[Ids, ...], list[Compared]] = defaultdict(list)
    for one, likelihood in zip(documents, scores, strict=True):
        if likelihood is not None:
            shown = f"{one.document.title or ''}\n{one.document.text}"
            alike[() if piece in one.pieces else one.pieces].append(Compared(likelihood, shown, one.document.score))
    best = replace(_merged(alike.pop(())), likelihood=of_piece[piece])
    return best, [_merged(same) for same in alike.values()]


def _merged(same: Sequence[Compared]) -> Compared:
    """Return one document for those with the same tokens, whatever their order."""
    scores = [one.score for one in same if one.score is not None]
    return Compared(
        max(one.likelihood for one in same),
        max(one.shown for one in same),
        float(max(scores)) if len(scores) == len(same) else None,
    )


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
