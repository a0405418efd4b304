"""LlamaIndex nodes, strings and Documents on the way in: one Document per item, in the caller's order.

Decides what the model reads of a node (its text, its title, or LlamaIndex's metadata header) and which id
sources and citations will name. It knows no model and no generator.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from llama_index.core.schema import BaseNode, MetadataMode, NodeWithScore

from kvfusion_rag import Document, InvalidInputError

DocumentLike = Document | str | BaseNode | NodeWithScore

TITLE_KEY = "title"


def to_documents(
    items: Sequence[DocumentLike], metadata_mode: MetadataMode = MetadataMode.NONE, *, titles: bool | None = None
) -> list[Document]:
    """One Document per item. Nodes are read as `metadata_mode` and `titles` say, see `node_document`.

    Raises InvalidInputError for a bare string (it would be read letter by letter) and for unknown kinds.
    """
    if isinstance(items, str) or not isinstance(items, Sequence):
        raise InvalidInputError(
            f"documents is a {type(items).__name__}; pass a list of documents, one item for each, "
            "because every item is read apart."
        )
    found = [_to_document(item, number, metadata_mode, titles) for number, item in enumerate(items)]
    return with_distinct_ids(found)


def node_document(scored: NodeWithScore, metadata_mode: MetadataMode, titles: bool | None = None) -> Document:
    """The Document of one retrieved node; its id is the node id, and its score is in the metadata too.

    With `MetadataMode.NONE` the text is the node's own text, so that citations are offsets into it. With any other
    mode it begins with LlamaIndex's "key: value" header, which holds the title already. `titles` says whether
    ``metadata["title"]`` (unless excluded for the LLM) becomes the title; by default with `MetadataMode.NONE` only.
    """
    node = scored.node
    with_title = metadata_mode is MetadataMode.NONE if titles is None else titles
    score = None if scored.score is None else float(scored.score)
    return Document(
        text=node.get_content(metadata_mode=metadata_mode),
        id=node.node_id,
        title=_title(node) if with_title else None,
        metadata={} if score is None else {"score": score},
        score=score if score is None or math.isfinite(score) else None,
    )


def stripped(document: Document) -> Document:
    """The same document without white space around its text, as LlamaIndex joins texts."""
    return replace(document, text=document.text.strip())


def with_distinct_ids(documents: Sequence[Document]) -> list[Document]:
    """The same documents; a repeated id gets ``#2``, ``#3``, so that a citation names one document."""
    taken: set[str] = set()
    distinct = []
    for document in documents:
        fresh = _fresh_id(document.id, taken)
        if fresh is not None:
            taken.add(fresh)
        distinct.append(document if fresh == document.id else replace(document, id=fresh))
    return distinct


def _fresh_id(wanted: str | None, taken: set[str]) -> str | None:
    if wanted is None or wanted not in taken:
        return wanted
    number = 2
    while f"{wanted}#{number}" in taken:
        number += 1
    return f"{wanted}#{number}"


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
        f"documents[{number}] is a {type(item).__name__}; allowed are kvfusion_rag.Document, str and "
        "LlamaIndex nodes (with or without score)."
    )


def _title(node: BaseNode) -> str | None:
    title = node.metadata.get(TITLE_KEY)
    if not isinstance(title, str) or not title.strip() or TITLE_KEY in node.excluded_llm_metadata_keys:
        return None
    return title
