"""Prepares the documents of one question: checks, encodes and splits them, and removes duplicates.

It knows about templates and limits, but not about weights or tensors.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from ..errors import ContextLimitError, InvalidInputError
from ..schema import Document, KeyKind, Origin, Source
from .encoder import LONGEST_TOKEN, DocumentEncoder
from .json_text import is_a, is_mapping, is_number
from .settings import LongDocuments, ModelSettings
from .splitting import encode_up_to, split_document
from .steps import finish

UNLIMITED = 1 << 62
SLOWEST_FIRST: tuple[Origin, ...] = ("prompt", "computed", "remote", "disk", "memory")

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class EncodedDocument:
    """One of the caller's documents with its encoded pieces. A blank document has no pieces."""

    document: Document
    id: str
    pieces: tuple[tuple[int, ...], ...]

    @property
    def tokens(self) -> int:
        return sum(map(len, self.pieces))


@dataclass(frozen=True, slots=True)
class EncodedDocuments:
    """All documents of one question in the caller's order, and their distinct pieces in canonical order.

    The canonical order sorts by content key, so every permutation is the same computation, bit for bit.

    Attributes:
        keys: ids of each distinct piece by content key.
    """

    documents: tuple[EncodedDocument, ...]
    keys: dict[str, tuple[int, ...]] = field(repr=False)

    def with_keys(self, key_of: Callable[[tuple[int, ...]], str]) -> EncodedDocuments:
        """Return the same documents with the keys that ``key_of`` computes."""
        return EncodedDocuments(self.documents, dict(sorted((key_of(ids), ids) for ids in self.keys.values())))

    def without(self, number: int) -> EncodedDocuments:
        """Return all documents except the one with this number. Pieces shared with another document are kept."""
        return self.only([n for n in range(len(self.documents)) if n != number])

    def only(self, numbers: Iterable[int]) -> EncodedDocuments:
        """Return only the documents with these numbers."""
        documents = tuple(self.documents[number] for number in numbers)
        remaining = {ids for document in documents for ids in document.pieces}
        return EncodedDocuments(documents, {key: ids for key, ids in self.keys.items() if ids in remaining})

    @property
    def longest(self) -> int:
        """Tokens of the longest piece, or 0 if there are no documents."""
        return max(map(len, self.keys.values()), default=0)

    @property
    def tokens(self) -> int:
        """Tokens of all distinct pieces together."""
        return sum(map(len, self.keys.values()))

    @property
    def joined(self) -> tuple[int, ...]:
        """Ids of all pieces in the caller's order, as in one joined prompt."""
        return tuple(i for document in self.documents for piece in document.pieces for i in piece)

    @property
    def distinct(self) -> dict[str, tuple[int, ...]]:
        """Ids of the distinct pieces by key, in the caller's order."""
        key_of = self._key_of
        return {key_of[ids]: ids for document in self.documents for ids in document.pieces}

    @property
    def cited_order(self) -> list[tuple[str, Document]]:
        """(id, document) pairs of all documents with text, in an order that does not depend on the caller's."""
        key_of, filled = self._key_of, [d for d in self.documents if d.pieces]
        filled.sort(key=lambda d: (key_of[d.pieces[0]], d.document.text, d.id))
        return [(d.id, d.document) for d in filled]

    @property
    def keys_by_id(self) -> dict[str, list[str]]:
        """Keys of each document's pieces, by document id."""
        key_of = self._key_of
        return {document.id: [key_of[piece] for piece in document.pieces] for document in self.documents}

    def ids_with(self, keys: Collection[str]) -> list[str]:
        """Return the ids of the documents with a piece that has one of ``keys``."""
        return [name for name, own in self.keys_by_id.items() if not set(own).isdisjoint(keys)]

    def sources(
        self, origins: Mapping[str, Origin], misses: Mapping[str, str], key_kind: KeyKind | None = None
    ) -> tuple[Source, ...]:
        """Return the source of each document, in the caller's order.

        Args:
            origins: origin of each key.
            misses: miss reason of each key that had to be computed.
            key_kind: kind of all keys, or None if the documents are in a joined prompt.
        """
        key_of = self._key_of
        first_with: dict[tuple[tuple[int, ...], ...], str] = {}
        sources: list[Source] = []
        for encoded in self.documents:
            keys = [key_of[piece] for piece in encoded.pieces]
            duplicate_of = first_with.get(encoded.pieces) if encoded.pieces else None
            first_with.setdefault(encoded.pieces, encoded.id)
            sources.append(
                Source(
                    id=encoded.id,
                    origin=_slowest({origins[key] for key in keys}),
                    tokens=encoded.tokens,
                    title=encoded.document.title,
                    pieces=len(keys),
                    duplicate_of=duplicate_of,
                    miss=next((str(misses[key]) for key in keys if key in misses), None),
                    metadata=dict(encoded.document.metadata),
                    used=bool(keys),
                    key_kind=key_kind if keys else None,
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
    """Token limits of one model: ``document`` for one piece, ``total`` for all fused documents."""

    document: int
    total: int
    long_documents: LongDocuments


def limit_of(settings: ModelSettings, window: int | None, prefix_tokens: int) -> int:
    """Return the maximum number of tokens of one document, for a model with ``window`` positions."""
    # One position is reserved for the question and one for the answer.
    room = UNLIMITED if window is None else window - prefix_tokens - 2
    longest = settings.max_document_tokens
    return room if longest is None else min(room, longest)


def encode_documents(
    documents: Sequence[Document | str],
    encoder: DocumentEncoder,
    limits: Limits,
    key_of: Callable[[tuple[int, ...]], str],
) -> EncodedDocuments:
    """Encode the documents of one question.

    Raises:
        InvalidInputError: ``documents`` is one string, or contains something that is not a document.
        ContextLimitError: a document is longer than the model can read, or all documents together are too long.
    """
    return finish(encoding_steps(documents, encoder, limits, key_of))


def encoding_steps(
    documents: Sequence[Document | str],
    encoder: DocumentEncoder,
    limits: Limits,
    key_of: Callable[[tuple[int, ...]], str],
) -> Generator[None, None, EncodedDocuments]:
    """Like :func:`encode_documents`, with a pause after each document and each piece of a long one."""
    require_sequence(documents)
    each: list[EncodedDocument] = []
    for number, document in enumerate(documents, start=1):
        each.append((yield from _encode(document, number, encoder, limits)))
        yield
    encoded = tuple(each)
    if blank := [one.id for one in encoded if not one.pieces]:
        logger.warning("skipped %d blank document(s): %s", len(blank), ", ".join(map(repr, blank[:5])))
    result = EncodedDocuments(encoded, dict(sorted((key_of(piece), piece) for one in encoded for piece in one.pieces)))
    if result.tokens > limits.total:
        raise ContextLimitError(
            f"the {len(encoded)} documents have {result.tokens} tokens together, but at most {limits.total} can be "
            "fused; pass fewer documents, or raise max_fused_tokens if there is enough memory."
        )
    return result


def require_sequence(documents: object) -> None:
    """Raise InvalidInputError unless ``documents`` is a sequence that is not itself one document."""
    if isinstance(documents, str | bytes | Document) or not isinstance(documents, Sequence):
        raise InvalidInputError(
            f"documents is of type {type(documents).__name__}, but it must be a sequence of documents: pass a "
            "list, and split a joined context into its documents."
        )


def is_filled(document: object) -> bool:
    """Whether ``document`` has a text. Invalid documents count, so that encoding them reports the error."""
    text = document.text if isinstance(document, Document) else document
    return not isinstance(text, str) or bool(text.strip())


def is_score(value: object) -> bool:
    """Whether ``value`` can be a retriever's score."""
    return value is None or isinstance(value, bool) or is_number(value)


def _encode(
    document: Document | str, number: int, encoder: DocumentEncoder, limits: Limits
) -> Generator[None, None, EncodedDocument]:
    document = _checked(document, number)
    document_id = document.id if document.id is not None else str(number)
    if not document.text.strip():
        return EncodedDocument(document, document_id, ())
    if document.title and encoder.plain.exceeds(document.title, limits.document):
        raise ContextLimitError(
            f"the title of document {document_id!r} has {len(document.title)} characters, but the model reads at "
            f"most {limits.document} tokens in one document; shorten the title."
        )
    if len(document.text) > LONGEST_TOKEN * limits.total:  # before a tokenizer spends minutes on it
        raise ContextLimitError(
            f"document {document_id!r} has {len(document.text)} characters, but at most {limits.total} tokens can be "
            "fused; shorten it."
        )
    ids = encode_up_to(encoder, document, limits.document)
    if ids is not None:
        return EncodedDocument(document, document_id, (ids,) if ids else ())
    if limits.long_documents != "split":
        raise ContextLimitError(
            f"document {document_id!r} has {len(document.text)} characters, but the model reads at most "
            f"{limits.document} tokens in one document; split it, or pass long_documents='split'."
        )
    pieces: list[tuple[int, ...]] = []
    try:
        for piece in split_document(encoder, document, limits.document, limits.total):
            pieces.append(piece)
            yield
    except ContextLimitError as error:
        raise ContextLimitError(f"in document {document_id!r}, {error}") from error
    return EncodedDocument(document, document_id, tuple(pieces))


def _checked(document: Document | str, number: int) -> Document:
    """Return ``document`` as a Document, or raise InvalidInputError if it is not one."""
    if isinstance(document, str):
        document = Document(document)
    if not is_a(document, Document):
        type_name = f"{type(document).__module__}.{type(document).__name__}"
        raise InvalidInputError(
            f"document {number} is a {type_name}, but it must be a string or a kvfusion_rag.Document; make one from "
            "its text, id and metadata."
        )
    for name, value in (("text", document.text), ("id", document.id), ("title", document.title)):
        if not isinstance(value, str) and (value is not None or name == "text"):
            raise InvalidInputError(f"the {name} of document {number} is {value!r}, but it must be a string.")
    if not is_score(document.score):
        raise InvalidInputError(
            f"the score of document {number} is {document.score!r}, but it must be a finite number."
        )
    if not is_mapping(document.metadata):
        raise InvalidInputError(
            f"the metadata of document {number} is {document.metadata!r:.100}, but it must be a dict."
        )
    return document
