"""Focus: choose the documents that make the question likely, then fuse only those.

The question is read over each document's own cache; log p(question | document) (UPR, arXiv 2204.07496; as path pruning
in Superposition Prompting, arXiv 2404.06910) plus the retriever's score, if all documents have one, ranks them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from ..fusion.likelihood import text_log_probabilities
from ..model.kv import DocumentKV
from ..schema import Origin, Source
from ..store import KVRequest
from ..text.documents import ReadDocument, Reading
from ..text.encoder import PlainEncoder
from .document_kvs import DocumentKVs

Ids = tuple[int, ...]
LEAD = "Question:"  # in front of the question that is scored; read, not scored


@dataclass(frozen=True, slots=True)
class Focus:
    """What choosing needs, before anything is computed.

    Attributes:
        most: documents to keep.
        reading: all documents as the answer reads them.
        scored: all documents, in the same places, with the keys of the KVs over which the question is read.
        prefix: ids in front of each of those.
        ids: the question behind ``LEAD``.
        given: ids of ``LEAD``.
        weight: of the retriever's scores.
    """

    most: int
    reading: Reading
    scored: Reading
    prefix: Ids
    ids: Ids
    given: int
    weight: float

    @property
    def longest(self) -> Reading:
        """The ``most`` longest documents: whatever is kept needs no more room."""
        documents = self.reading.documents
        numbers = sorted(range(len(documents)), key=lambda number: (-documents[number].tokens, number))
        return self.reading.only(sorted(numbers[: self.most]))

    def with_keys(self, key_of: Callable[[Ids, Ids], str], prefix: Ids) -> Focus:
        """The same documents under other keys, made of ids and prefix; ``prefix`` is the one of the answer."""
        reading = self.reading.with_keys(lambda ids: key_of(ids, prefix))
        scored = self.scored.with_keys(lambda ids: key_of(ids, self.prefix))
        return replace(self, reading=reading, scored=scored)


@dataclass(frozen=True, slots=True)
class Choice:
    """Which documents were kept, and why.

    Attributes:
        scored: all of the caller's documents, with the keys of ``origins`` and ``kvs``.
        kept: places of the kept ones.
        scores: of every document in its place; None for a blank one.
        origins: where each key's KV came from.
        misses: why the store did not have it.
        kvs: of the kept documents, by key.
    """

    scored: Reading
    kept: tuple[int, ...]
    scores: tuple[float | None, ...]
    origins: Mapping[str, Origin]
    misses: Mapping[str, str]
    kvs: Mapping[str, DocumentKV] = field(repr=False)

    def sources(self, kept: Sequence[Source]) -> tuple[Source, ...]:
        """Sources of all of the caller's documents; ``kept`` are those of the kept ones."""
        sources = [replace(source, used=False) for source in self.scored.sources(self.origins, self.misses)]
        for number, source in zip(self.kept, kept, strict=True):
            sources[number] = source if source.origin == "prompt" else replace(source, miss=sources[number].miss)
        return tuple(replace(s, focus_score=score) for s, score in zip(sources, self.scores, strict=True))


def needs_choice(reading: Reading, most: int) -> bool:
    """Whether there are more than ``most`` distinct documents."""
    return len(_distinct(reading)) > most


def scored_question(encoder: PlainEncoder, question: str) -> tuple[Ids, int]:
    """Ids of ``LEAD`` and the question, and how many of them belong to ``LEAD``."""
    lead, ids = encoder.encode(LEAD, continues=True), encoder.encode(f"{LEAD} {question.strip()}", continues=True)
    given = next((n for n, (a, b) in enumerate(zip(lead, ids, strict=False)) if a != b), min(len(lead), len(ids) - 1))
    return tuple(ids), max(given, 1)


def choose(supply: DocumentKVs, focus: Focus) -> Choice:
    """Score every document by the model without its adapter, and keep the best.

    An adapter that was trained on answers only is worse at judging questions (docs/focus.md).

    Documents are computed in canonical order and equal scores are broken by content, so the caller's order changes
    nothing.
    """
    reading = focus.scored
    wanted = {key: KVRequest(ids) for key, ids in reading.keys.items()}
    fetched = supply.fetch(wanted, None, supply.model, prefix=focus.prefix)
    likelihoods = text_log_probabilities(
        supply.backbone,
        supply.prefix_kv(focus.prefix),
        [fetched.kvs[key] for key in reading.keys],
        focus.ids,
        given=focus.given,
    )
    of_piece = dict(zip(reading.keys.values(), likelihoods, strict=True))
    scores = document_scores(reading.documents, of_piece, focus.weight)
    kept = best_documents(reading, scores, focus.most)
    pieces = {ids for number in kept for ids in reading.documents[number].pieces}
    kvs = {key: fetched.kvs[key] for key, ids in reading.keys.items() if ids in pieces}
    return Choice(reading, kept, scores, fetched.origins, fetched.misses, kvs)


def document_scores(
    documents: Sequence[ReadDocument], of_piece: Mapping[Ids, float], weight: float
) -> tuple[float | None, ...]:
    """Each document's score: that of its best piece plus ``weight`` times the retriever's standardized score.

    Standardized over the question's documents, since retrievers have scales of their own. Left out unless all
    documents with text have one.
    """
    found = [max((of_piece[ids] for ids in read.pieces), default=None) for read in documents]
    given = [read.document.score for read in documents if read.pieces]
    values = [float(score) for score in given if score is not None]
    if not weight or len(values) < len(given):
        return tuple(found)
    added = iter(standardized(values))
    return tuple(None if score is None else score + weight * next(added) for score in found)


def standardized(values: Sequence[float]) -> list[float]:
    """``values`` with mean 0 and standard deviation 1; all 0 if they are equal."""
    mean = math.fsum(values) / len(values)  # exact sums, which do not depend on the order
    deviation = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / len(values)) or 1.0
    return [(value - mean) / deviation for value in values]


def best_documents(reading: Reading, scores: Sequence[float | None], most: int) -> tuple[int, ...]:
    """Places of the ``most`` best distinct documents, and of their duplicates, in the caller's order."""
    key_of = {ids: key for key, ids in reading.keys.items()}
    best: dict[tuple[Ids, ...], float] = {}
    for read, score in zip(reading.documents, scores, strict=True):
        if score is not None:
            best[read.pieces] = max(score, best.get(read.pieces, -math.inf))
    ranked = sorted(best, key=lambda pieces: (-best[pieces], [key_of[ids] for ids in pieces]))
    kept = set(ranked[:most])
    return tuple(number for number, read in enumerate(reading.documents) if read.pieces in kept)


def _distinct(reading: Reading) -> set[tuple[Ids, ...]]:
    return {read.pieces for read in reading.documents if read.pieces}
