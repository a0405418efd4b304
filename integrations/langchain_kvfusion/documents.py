"""Converts LangChain documents, mappings and strings into kvfusion_rag Documents, in the caller's order."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from numbers import Real
from typing import Any, TypeGuard

from langchain_core.documents import Document as LangChainDocument

from kvfusion_rag import Document, InvalidInputError

DocumentLike = Document | LangChainDocument | str | Mapping[str, Any]
DocumentsArgument = Sequence[DocumentLike] | Sequence[Sequence[DocumentLike]]

TEXT_SEPARATOR = "\n\n"
SCORE_KEYS = ("relevance_score", "score")  # metadata keys, a reranker's before a retriever's


def to_document(item: DocumentLike) -> Document:
    """Convert one item into a Document.

    A LangChain document keeps its metadata and its id, or else gets ``metadata["source"]`` as its id. Its title is
    ``metadata["title"]``, and its score is ``metadata["relevance_score"]`` or else ``metadata["score"]`` if that is a
    finite number. A mapping must have "text" and may have "id", "title", "score" and "metadata"; other entries are
    added to the metadata.

    Raises:
        InvalidInputError: the item has another type, or "text" of a mapping is not a string.
    """
    if isinstance(item, Document):
        return item
    if isinstance(item, str):
        return Document(str(item))
    if isinstance(item, LangChainDocument):
        source = item.metadata.get("source")
        name = item.id if item.id is not None or source is None else str(source)
        return Document(
            item.page_content, name, _title(item.metadata), dict(item.metadata), metadata_score(item.metadata)
        )
    if isinstance(item, Mapping):
        return _from_mapping(item)
    raise InvalidInputError(
        f"a document is a {type(item).__name__}, but it must be a LangChain Document, a kvfusion_rag.Document, "
        'a string, or a mapping with "text".'
    )


def to_documents(items: Sequence[DocumentLike]) -> tuple[Document, ...]:
    """Convert each item into a Document. Repeated ids get the suffix ``#2``, ``#3``, so that citations are unique.

    Raises:
        InvalidInputError: ``items`` is not a list, for example a single string, or see :func:`to_document`.
    """
    if isinstance(items, str | Mapping) or not isinstance(items, Sequence):
        raise InvalidInputError(
            f"documents is a {type(items).__name__}, but it must be a list with one item per document."
        )
    return tuple(_with_distinct_ids(to_document(item) for item in items))


def documents_per_prompt(documents: DocumentsArgument | None, prompts: int) -> list[tuple[Document, ...]]:
    """Return the documents of each prompt: a flat list is used for all prompts, a list of lists has one per prompt.

    Raises:
        InvalidInputError: the number of inner lists differs from ``prompts``, or see :func:`to_documents`.
    """
    if documents is None:
        return [()] * prompts
    if not is_nested(documents):
        return [to_documents(documents)] * prompts  # pyright: ignore[reportArgumentType]
    require_one_list_each(documents, prompts)
    return [to_documents(row) for row in documents]


def require_one_list_each(documents: Sequence[Sequence[DocumentLike]], prompts: int) -> None:
    """Raise InvalidInputError if the number of inner lists differs from ``prompts``."""
    if len(documents) != prompts:
        raise InvalidInputError(
            f"documents has {len(documents)} lists, but there are {prompts} prompts; pass one list per prompt, or one "
            "flat list for all prompts."
        )


def is_nested(documents: object) -> TypeGuard[Sequence[Sequence[DocumentLike]]]:
    """Return whether ``documents`` is a list of lists."""
    return (
        isinstance(documents, list | tuple)
        and len(documents) > 0
        and all(isinstance(row, list | tuple) for row in documents)
    )


def joined_text(documents: Sequence[Document], *, separator: str = TEXT_SEPARATOR, titles: bool = False) -> str:
    """Join the documents as in an ordinary prompt, for traces and for models that take one text.

    Args:
        separator: text between two documents.
        titles: whether to write each document's title above its text.
    """
    return separator.join(
        f"Title: {document.title}\n{document.text}" if titles and document.title else document.text
        for document in documents
    )


def _from_mapping(item: Mapping[str, Any]) -> Document:
    text = item.get("text")
    if not isinstance(text, str):
        raise InvalidInputError(
            f'"text" of a document mapping with the keys {sorted(map(str, item))} is a {type(text).__name__}, but it '
            "must be a string."
        )
    own, name = as_score(item.get("score")), item.get("id")
    read = ("text", "id", "title", "metadata", *(() if own is None else ("score",)))
    metadata = {**(item.get("metadata") or {}), **{k: v for k, v in item.items() if k not in read}}
    score = metadata_score(metadata) if own is None else own
    return Document(text, None if name is None else str(name), _title(item), metadata, score)


def metadata_score(metadata: Mapping[str, Any]) -> float | None:
    """Return the score in ``metadata``, or None."""
    return next((score for key in SCORE_KEYS if (score := as_score(metadata.get(key))) is not None), None)


def as_score(value: object) -> float | None:
    """Return ``value`` as a float if it is a finite number (also of numpy) and not a bool, or else None."""
    if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value):
        return None
    return float(value)


def _title(fields: Mapping[str, Any]) -> str | None:
    title = fields.get("title")
    return title if isinstance(title, str) and title.strip() else None


def _with_distinct_ids(documents: Iterable[Document]) -> Iterable[Document]:
    taken: set[str] = set()
    for document in documents:
        name, number = document.id, 1
        while name is not None and name in taken:
            number += 1
            name = f"{document.id}#{number}"
        if name is not None:
            taken.add(name)
        yield document if name == document.id else replace(document, id=name)
