"""Converts LlamaIndex nodes and strings into kvfusion_rag Documents, in the caller's order."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from llama_index.core.schema import BaseNode, MetadataMode, NodeWithScore

from kvfusion_rag import Document, InvalidInputError

DocumentLike = Document | str | BaseNode | NodeWithScore

TITLE_KEY = "title"
PLACE_KEY = "place"


def to_documents(
    items: Sequence[DocumentLike], metadata_mode: MetadataMode = MetadataMode.NONE, *, titles: bool | None = None
) -> list[Document]:
    """Convert each item into a Document. For `metadata_mode` and `titles` see `node_document`.

    Raises InvalidInputError for a single string and for items of other types.
    """
    if isinstance(items, str) or not isinstance(items, Sequence):
        raise InvalidInputError(
            f"documents is a {type(items).__name__}, but it must be a list with one item per document."
        )
    return with_distinct_ids([_to_document(item, n, metadata_mode, titles) for n, item in enumerate(items)])


def node_document(scored: NodeWithScore, metadata_mode: MetadataMode, titles: bool | None = None) -> Document:
    """Convert a retrieved node into a Document with the node's id. Its score and place are in the metadata.

    With `MetadataMode.NONE` the text is the node's text, so citations are offsets into it. With any other mode it
    begins with LlamaIndex's "key: value" header, which contains the title. `titles` says whether ``metadata["title"]``
    becomes the title, unless it is excluded for the LLM. The default is True only for `MetadataMode.NONE`.
    """
    node = scored.node
    with_title = metadata_mode is MetadataMode.NONE if titles is None else titles
    score = None if scored.score is None else float(scored.score)
    return Document(
        text=node.get_content(metadata_mode=metadata_mode),
        id=node.node_id,
        title=_title(node) if with_title else None,
        metadata={**({} if score is None else {"score": score}), **_place(node)},
        score=score if score is None or math.isfinite(score) else None,
    )


def _place(node: BaseNode) -> dict[str, str]:
    """Return where in its file a node is: our name of the place, or the page that LlamaIndex's readers add."""
    place, page = node.metadata.get(PLACE_KEY), node.metadata.get("page_label")
    if isinstance(place, str) and place:
        return {PLACE_KEY: place}
    return {PLACE_KEY: f"page {page}"} if isinstance(page, str) and page else {}


def stripped(document: Document) -> Document:
    """Strip the document's text, as LlamaIndex does when it joins texts."""
    return replace(document, text=document.text.strip())


def with_distinct_ids(documents: Sequence[Document]) -> list[Document]:
    """Append ``#2``, ``#3`` to repeated ids, so that each citation refers to one document."""
    taken: set[str] = set()
    distinct = []
    for document in documents:
        unique, number = document.id, 1
        while unique is not None and unique in taken:
            number += 1
            unique = f"{document.id}#{number}"
        if unique is not None:
            taken.add(unique)
        distinct.append(document if unique == document.id else replace(document, id=unique))
    return distinct


def _to_document(item: DocumentLike, number: int, metadata_mode: MetadataMode, titles: bool | None) -> Document:
    match item:
        case Document():
            return item
        case str():
            return Document(text=item)
        case NodeWithScore():
            return node_document(item, metadata_mode, titles)
        case BaseNode():
            return node_document(NodeWithScore(node=item), metadata_mode, titles)
    raise InvalidInputError(
        f"documents[{number}] is a {type(item).__name__}, but it must be a kvfusion_rag.Document, a str or a "
        "LlamaIndex node with or without a score."
    )


def _title(node: BaseNode) -> str | None:
    title = node.metadata.get(TITLE_KEY)
    if not isinstance(title, str) or not title.strip() or TITLE_KEY in node.excluded_llm_metadata_keys:
        return None
    return title
