"""The caller's documents made ready: checked, encoded, split, deduplicated, in canonical order.

Sits between the facade and the engine. Knows templates and limits, but neither weights nor tensors.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from ..errors import ContextLimitError, InvalidInputError
from ..schema import Document, Origin, Source
from .encoder import DocumentEncoder
from .settings import LongDocuments, ModelSettings
from .splitting import encode_up_to, split_document

UNLIMITED = 1 << 62
SLOWEST_FIRST: tuple[Origin, ...] = ("prompt", "computed", "remote", "disk", "memory")

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ReadDocument:
    """One of the caller's documents with its encoded pieces (none if it is blank)."""

    document: Document
    id: str
    pieces: tuple[tuple[int, ...], ...]

    @property
    def tokens(self) -> int:
        return sum(map(len, self.pieces))


@dataclass(frozen=True, slots=True)
class Reading:
    """All documents of one question, in the caller's order, and their distinct pieces in canonical order.

    Canonical order is that of the content keys. It makes every permutation the same computation, bit for
    bit; that no place is favoured comes from the uniform positions.
    """

    documents: tuple[ReadDocument, ...]
    keys: dict[str, tuple[int, ...]] = field(repr=False)

    def with_keys(self, key_of: Callable[[tuple[int, ...]], str]) -> Reading:
        """The same documents under other keys."""
        return Reading(self.documents, dict(sorted((key_of(ids), ids) for ids in self.keys.values())))

    def without(self, number: int) -> Reading:
        """All documents but the one at this place; what it shares with another one stays."""
        return self.only([n for n in range(len(self.documents)) if n != number])

    def only(self, numbers: Iterable[int]) -> Reading:
        """The documents at these places."""
        documents = tuple(self.documents[number] for number in numbers)
        left = {ids for document in documents for ids in document.pieces}
        return Reading(documents, {key: ids for key, ids in self.keys.items() if ids in left})

    @property
    def longest(self) -> int:
        """Tokens of the longest piece, 0 without documents."""
        return max(map(len, self.keys.values()), default=0)

    @property
    def tokens(self) -> int:
        """Tokens of the distinct pieces together."""
        return sum(map(len, self.keys.values()))

    @property
    def joined(self) -> tuple[int, ...]:
        """Ids of all pieces one after the other, in the caller's order: the documents of one joined prompt."""
        return tuple(i for document in self.documents for piece in document.pieces for i in piece)

    @property
    def distinct(self) -> dict[str, tuple[int, ...]]:
        """The distinct pieces by key, in the caller's order of their first appearance."""
        key_of = self._key_of
        return {key_of[ids]: ids for document in self.documents for ids in document.pieces}

    @property
    def cited_order(self) -> list[tuple[str, Document]]:
        """(id, document) pairs with text, in an order that does not depend on the caller's."""
        key_of, full = self._key_of, [d for d in self.documents if d.pieces]
        full.sort(key=lambda d: (key_of[d.pieces[0]], d.document.text, d.id))
        return [(d.id, d.document) for d in full]

    def sources(self, origins: Mapping[str, Origin], misses: Mapping[str, str]) -> tuple[Source, ...]:
        """What became of each of the caller's documents, in the caller's order.

        Args:
            origins: where each key came from.
            misses: why the store had it not, of those that were computed for want of it.
        """
        key_of = self._key_of
        first_with: dict[tuple[tuple[int, ...], ...], str] = {}
        sources = []
        for read in self.documents:
            origin = _slowest({origins[key_of[piece]] for piece in read.pieces})
            twin = first_with.get(read.pieces) if read.pieces else None
            first_with.setdefault(read.pieces, read.id)
            sources.append(
                Source(
                    id=read.id,
                    origin=origin,
                    tokens=read.tokens,
                    title=read.document.title,
                    pieces=len(read.pieces),
                    duplicate_of=twin,
                    miss=next((str(misses[key_of[piece]]) for piece in read.pieces if key_of[piece] in misses), None),
                    metadata=dict(read.document.metadata),
                    used=bool(read.pieces),
                )
            )
        return tuple(sources)

    @property
    def _key_of(self) -> dict[tuple[int, ...], str]:
        return {ids: key for key, ids in self.keys.items()}


def _slowest(origins: Collection[Origin]) -> Origin:
    for origin in SLOWEST_FIRST:
        if origin in origins:
            return origin
    return "blank"


@dataclass(frozen=True, slots=True)
class Limits:
    """Token limits of one model: ``document`` for one piece, ``total`` for all that are fused together."""

    document: int
    total: int
    long_documents: LongDocuments


def limit_of(settings: ModelSettings, window: int | None, prefix_tokens: int) -> int:
    """Most tokens of one document for a model with ``window`` positions."""
    # One position is kept for the question and one for the answer.
    room = UNLIMITED if window is None else window - prefix_tokens - 2
    longest = settings.max_document_tokens
    return room if longest is None else min(room, longest)


def read_documents(
    documents: Sequence[Document | str],
    encoder: DocumentEncoder,
    limits: Limits,
    key_of: Callable[[tuple[int, ...]], str],
) -> Reading:
    """Encode the documents of one question.

    Raises:
        InvalidInputError: ``documents`` is one string, or holds something that is no document.
        ContextLimitError: a document is longer than the model reads, or all together than may be fused.
    """
    require_sequence(documents)
    read = tuple(_read(document, number, encoder, limits) for number, document in enumerate(documents, start=1))
    if blank := [r.id for r in read if not r.pieces]:
        logger.warning("skipped %d blank document(s): %s", len(blank), ", ".join(map(repr, blank[:5])))
    keys = dict(sorted((key_of(piece), piece) for r in read for piece in r.pieces))
    reading = Reading(read, keys)
    if reading.tokens > limits.total:
        raise ContextLimitError(
            f"the {len(read)} documents have {reading.tokens} tokens together, but at most {limits.total} may be "
            "fused; pass fewer documents, or raise max_fused_tokens if the memory is there."
        )
    return reading


def require_sequence(documents: object) -> None:
    """Raise InvalidInputError unless ``documents`` is a sequence that is not itself one document."""
    if isinstance(documents, str | bytes | Document) or not isinstance(documents, Sequence):
        raise InvalidInputError(
            f"documents is one {type(documents).__name__}, but it must be a sequence of documents: pass a list, "
            "with a joined context cut back into its documents."
        )


def is_filled(document: object) -> bool:
    """Whether ``document`` has a text; wrong ones count, so that reading them says what is wrong."""
    text = document.text if isinstance(document, Document) else document
    return not isinstance(text, str) or bool(text.strip())


def is_score(value: object) -> bool:
    """Whether ``value`` can be a retriever's score."""
    return value is None or (isinstance(value, int | float) and math.isfinite(value))


def _read(document: Document | str, number: int, encoder: DocumentEncoder, limits: Limits) -> ReadDocument:
    if isinstance(document, str):
        document = Document(document)
    if not isinstance(document, Document):
        found = f"{type(document).__module__}.{type(document).__name__}"
        raise InvalidInputError(
            f"document {number} is a {found}, but it must be a string or a kvfusion_rag.Document; make one of its "
            "text, id and metadata."
        )
    for name, value in (("text", document.text), ("id", document.id), ("title", document.title)):
        if not isinstance(value, str) and (value is not None or name == "text"):
            raise InvalidInputError(f"the {name} of document {number} is {value!r}, but it must be a string.")
    if not is_score(document.score):
        raise InvalidInputError(f"the score of document {number} is {document.score!r}, but must be a finite number.")
    if not isinstance(document.metadata, Mapping):
        raise InvalidInputError(
            f"the metadata of document {number} is {document.metadata!r:.100}, but must be a dict."
        )
    document_id = document.id if document.id is not None else str(number)
    if not document.text.strip():
        return ReadDocument(document, document_id, ())
    if len(document.text) > 64 * limits.total:  # before a tokenizer spends minutes on it
        raise ContextLimitError(
            f"document {document_id!r} has {len(document.text)} characters, but at most {limits.total} tokens may be "
            "fused; cut it."
        )
    ids = encode_up_to(encoder, document, limits.document)
    if ids is not None:
        return ReadDocument(document, document_id, (ids,) if ids else ())
    if limits.long_documents == "split":
        try:
            pieces = split_document(encoder, document, limits.document, limits.total)
            return ReadDocument(document, document_id, tuple(pieces))
        except ContextLimitError as error:
            raise ContextLimitError(f"of document {document_id!r}, {error}") from error
    raise ContextLimitError(
        f"document {document_id!r} has {len(document.text)} characters, but the model reads at most {limits.document} "
        "tokens in one document, and that are more; split it, or pass long_documents='split'."
    )
