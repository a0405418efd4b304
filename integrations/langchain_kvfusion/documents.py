"""LangChain documents, mappings and strings on the way in: one Document per item, in the caller's order.

Decides which id and title an item gets and how a ``documents=`` argument is shared out among several prompts.
It knows no prompt, no model and no generator.
"""

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
SCORE_KEYS = ("relevance_score", "score")  # in metadata: a reranker's score, else the retriever's


def to_document(item: DocumentLike) -> Document:
    """One Document.

    A LangChain document keeps its id (``metadata["source"]`` where it has none), takes ``metadata["title"]``
    as its title and carries its metadata; ``metadata["relevance_score"]``, else ``metadata["score"]``, is its score
    if it is a finite number. A mapping has "text" and, if it likes, "id", "title", "score" and "metadata"; its other
    entries are carried as metadata.

    Raises:
        InvalidInputError: any other kind of item, or a mapping whose "text" is no string.
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
        'a string or a mapping with "text".'
    )


def to_documents(items: Sequence[DocumentLike]) -> tuple[Document, ...]:
    """One Document per item; a repeated id gets ``#2``, ``#3``, so that a citation names one document.

    Raises:
        InvalidInputError: ``items`` is no list (a bare string would be read letter by letter), or see
            :func:`to_document`.
    """
    if isinstance(items, str | Mapping) or not isinstance(items, Sequence):
        raise InvalidInputError(
            f"documents is a {type(items).__name__}; pass a list with one item for each document, because every "
            "item is read apart."
        )
    return tuple(_with_distinct_ids(to_document(item) for item in items))


def documents_per_prompt(documents: DocumentsArgument | None, prompts: int) -> list[tuple[Document, ...]]:
    """What a ``documents=`` argument means for each of ``prompts`` prompts.

    A flat list goes to every prompt, a list of lists gives each prompt its own.

    Raises:
        InvalidInputError: there are not as many inner lists as prompts, or see :func:`to_documents`.
    """
    if documents is None:
        return [()] * prompts
    if not is_nested(documents):
        return [to_documents(documents)] * prompts  # pyright: ignore[reportArgumentType]
    if len(documents) != prompts:
        raise InvalidInputError(
            f"documents holds {len(documents)} lists, but there are {prompts} prompts; pass one list for each "
            "prompt, or one flat list for all of them."
        )
    return [to_documents(row) for row in documents]


def is_nested(documents: object) -> TypeGuard[Sequence[Sequence[DocumentLike]]]:
    """Whether ``documents`` is a list of lists: one list for each prompt."""
    return (
        isinstance(documents, list | tuple)
        and len(documents) > 0
        and all(isinstance(row, list | tuple) for row in documents)
    )


def joined_text(documents: Sequence[Document], *, separator: str = TEXT_SEPARATOR, titles: bool = False) -> str:
    """The documents as an ordinary prompt shows them, for traces and for models that take one text.

    Args:
        separator: text between two documents.
        titles: write a document's title above its text.
    """
    return separator.join(
        f"Title: {document.title}\n{document.text}" if titles and document.title else document.text
        for document in documents
    )


def _from_mapping(item: Mapping[str, Any]) -> Document:
    text = item.get("text")
    if not isinstance(text, str):
        raise InvalidInputError(
            f'a document mapping has the keys {sorted(map(str, item))} and "text" is a {type(text).__name__}, but '
            '"text" must be a string.'
        )
    own, name = as_score(item.get("score")), item.get("id")
    read = ("text", "id", "title", "metadata", *(() if own is None else ("score",)))
    metadata = {**(item.get("metadata") or {}), **{k: v for k, v in item.items() if k not in read}}
    score = metadata_score(metadata) if own is None else own
    return Document(text, None if name is None else str(name), _title(item), metadata, score)


def metadata_score(metadata: Mapping[str, Any]) -> float | None:
    """The retriever's score that ``metadata`` carries."""
    return next((score for key in SCORE_KEYS if (score := as_score(metadata.get(key))) is not None), None)


def as_score(value: object) -> float | None:
    """``value`` as a score if it is a finite number (of numpy too), else None; a bool or a string is not a score."""
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
