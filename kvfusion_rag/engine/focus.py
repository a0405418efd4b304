"""Focus: choose the documents that make the question likely, and fuse only those.

The question is read over each document's own cache. The score of a document is log p(question | document) (UPR, arXiv
2204.07496; path pruning in Superposition Prompting, arXiv 2404.06910) plus the retriever's score, if all have one.

The document with the highest score is kept first. Each further one is chosen by its score, and by how well it explains
the question together with those kept before: a token counts with its highest log-probability over these documents.
This is greedy facility location (Nemhauser, Wolsey and Fisher 1978) with a part for each document alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from ..model.kv import DocumentKV
from ..schema import KeyKind, Origin, Source
from ..store import KVRequest
from ..text.documents import EncodedDocument, EncodedDocuments
from ..text.encoder import PlainEncoder
from .document_kvs import DocumentKVs, Scope

Ids = tuple[int, ...]
Pieces = tuple[Ids, ...]
OWN_SHARE = 0.5  # weight of a further document's own score; 0.25 to 1 are about equally good (docs/focus.md)
LEAD = "Question:"  # in front of the question that is scored; it is read but not scored


@dataclass(frozen=True, slots=True)
class Focus:
    """The inputs for choosing documents, before anything is computed.

    Attributes:
        most: number of documents to keep.
        encoded: all documents as the answer reads them.
        scored: the same documents with the keys of the KVs over which the question is scored.
        scope: scope of ``scored``.
        ids: ids of ``LEAD`` and the question.
        given: number of ids that belong to ``LEAD``.
        weight: weight of the retriever's scores.
    """

    most: int
    encoded: EncodedDocuments
    scored: EncodedDocuments
    scope: Scope
    ids: Ids
    given: int
    weight: float

    @property
    def longest(self) -> EncodedDocuments:
        """The ``most`` longest documents. No other choice of this many needs more room."""
        documents = self.encoded.documents
        numbers = sorted(range(len(documents)), key=lambda number: (-documents[number].tokens, number))
        return self.encoded.only(sorted(numbers[: self.most]))

    def with_keys(self, document_kvs: DocumentKVs, scope: Scope) -> Focus:
        """Return the same documents under the model's current keys; ``scope`` is the one of the answer."""
        encoded = self.encoded.with_keys(lambda ids: document_kvs.key(ids, scope))
        scored = self.scored.with_keys(lambda ids: document_kvs.key(ids, self.scope))
        return replace(self, encoded=encoded, scored=scored)


@dataclass(frozen=True, slots=True)
class Choice:
    """The documents that were kept, and the scores of all documents.

    Attributes:
        scored: all of the caller's documents, with the keys of ``origins`` and ``kvs``.
        kept: indices of the kept documents.
        scores: score of every document; None for a blank one.
        origins: where each document's KV came from, by key.
        misses: miss reason of each document that the store did not have, by key.
        kvs: KVs of the kept documents, by key.
        key_kind: kind of all keys.
    """

    scored: EncodedDocuments
    kept: tuple[int, ...]
    scores: tuple[float | None, ...]
    origins: Mapping[str, Origin]
    misses: Mapping[str, str]
    kvs: Mapping[str, DocumentKV] = field(repr=False)
    key_kind: KeyKind

    def sources(self, kept: Sequence[Source]) -> tuple[Source, ...]:
        """Return the sources of all of the caller's documents, given those of the kept ones."""
        scored = self.scored.sources(self.origins, self.misses, self.key_kind)
        sources = [replace(source, used=False) for source in scored]
        for number, source in zip(self.kept, kept, strict=True):
            sources[number] = source if source.origin == "prompt" else replace(source, miss=sources[number].miss)
        return tuple(replace(s, focus_score=score) for s, score in zip(sources, self.scores, strict=True))


def needs_choice(encoded: EncodedDocuments, most: int) -> bool:
    """Return whether there are more than ``most`` distinct documents."""
    return len(_distinct(encoded)) > most


def scored_question(encoder: PlainEncoder, question: str) -> tuple[Ids, int]:
    """Return the ids of ``LEAD`` and the question, and how many of them belong to ``LEAD``."""
    lead, ids = encoder.encode(LEAD, continues=True), encoder.encode(f"{LEAD} {question.strip()}", continues=True)
    given = next((n for n, (a, b) in enumerate(zip(lead, ids, strict=False)) if a != b), min(len(lead), len(ids) - 1))
    return tuple(ids), max(given, 1)


def choose(document_kvs: DocumentKVs, focus: Focus, is_cancelled: Callable[[], bool]) -> Choice:
    """Score every document by the model without its adapter, and keep the best.

    An adapter that was trained on answers is worse at judging questions (docs/focus.md). Documents are computed in
    canonical order and ties are broken by content, so the caller's order changes nothing.
    """
    encoded, scope = focus.scored, focus.scope
    requests = {key: KVRequest(ids) for key, ids in encoded.keys.items()}
    fetched = document_kvs.fetch(requests, None, document_kvs.version, scope, is_cancelled=is_cancelled)
    tokens = document_kvs.model.token_likelihoods(
        document_kvs.prefix_kv(scope), [fetched.kvs[key] for key in encoded.keys], focus.ids, given=focus.given
    )
    of_piece = dict(zip(encoded.keys.values(), tokens, strict=True))
    sums = {ids: math.fsum(values) for ids, values in of_piece.items()}
    scores = document_scores(encoded.documents, sums, focus.weight)
    kept = best_documents(encoded, of_piece, focus.weight, focus.most)
    pieces = {ids for number in kept for ids in encoded.documents[number].pieces}
    kvs = {key: fetched.kvs[key] for key, ids in encoded.keys.items() if ids in pieces}
    return Choice(encoded, kept, scores, fetched.origins, fetched.misses, kvs, document_kvs.key_kind)


def document_scores(
    documents: Sequence[EncodedDocument], of_piece: Mapping[Ids, float], weight: float
) -> tuple[float | None, ...]:
    """Return each document's score: that of its best piece plus ``weight`` times the retriever's standardized score.

    Retrievers use different scales, so their scores are standardized over the question's documents. They count only
    if all documents with text have one.
    """
    found = [max((of_piece[ids] for ids in document.pieces), default=None) for document in documents]
    parts = _retriever_parts(documents, weight)
    return tuple(None if one is None else one + part for one, part in zip(found, parts, strict=True))


def likelihoods(
    documents: Sequence[EncodedDocument], scores: Sequence[float | None], weight: float
) -> tuple[float | None, ...]:
    """Return log p(question | document) of each document, given its score: the score without the retriever's part."""
    parts = _retriever_parts(documents, weight)
    return tuple(None if one is None else one - part for one, part in zip(scores, parts, strict=True))


def counts_scores(documents: Sequence[EncodedDocument], weight: float) -> bool:
    """Return whether the retriever's scores count: they have a weight, and all documents with text have one."""
    return bool(weight) and all(document.document.score is not None for document in documents if document.pieces)


def _retriever_parts(documents: Sequence[EncodedDocument], weight: float) -> list[float]:
    """Return what the retriever's score adds to that of each document."""
    if not counts_scores(documents, weight):
        return [0.0] * len(documents)
    values = [float(document.document.score or 0) for document in documents if document.pieces]
    added = iter(standardized(values)) if values else iter(())
    return [weight * next(added) if document.pieces else 0.0 for document in documents]


def standardized(values: Sequence[float]) -> list[float]:
    """Return ``values`` scaled to mean 0 and standard deviation 1, or zeros if they are equal."""
    mean = math.fsum(values) / len(values)  # exact sums do not depend on the order
    deviation = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / len(values)) or 1.0
    return [(value - mean) / deviation for value in values]


def best_documents(
    encoded: EncodedDocuments, tokens: Mapping[Ids, Sequence[float]], weight: float, most: int
) -> tuple[int, ...]:
    """Return the indices of the best ``most`` distinct documents and their duplicates, in the caller's order.

    Args:
        tokens: log-probability of each token of the question (A) given each piece.
        weight: weight of the retriever's standardized score.
    """
    added: dict[Pieces, float] = {}
    for document, part in zip(encoded.documents, _retriever_parts(encoded.documents, weight), strict=True):
        if document.pieces:
            added[document.pieces] = max(part, added.get(document.pieces, -math.inf))
    key_of = {ids: key for key, ids in encoded.keys.items()}
    left = sorted(added, key=lambda pieces: [key_of[ids] for ids in pieces])  # of equal ones, the first is kept

    def score(pieces: Pieces, explained: Sequence[float]) -> float:
        return added[pieces] + max(math.fsum(map(max, explained, tokens[ids])) for ids in pieces)

    nothing = explained = [-math.inf] * len(next(iter(tokens.values())))
    own = {pieces: score(pieces, nothing) for pieces in left}
    kept: set[Pieces] = set()
    for _ in range(min(most, len(left))):
        best = max(left, key=lambda pieces: score(pieces, explained) + OWN_SHARE * own[pieces])
        left.remove(best)
        kept.add(best)
        explained = [max(values) for values in zip(explained, *(tokens[ids] for ids in best), strict=True)]
    return tuple(number for number, document in enumerate(encoded.documents) if document.pieces in kept)


def _distinct(encoded: EncodedDocuments) -> set[Pieces]:
    return {document.pieces for document in encoded.documents if document.pieces}
