"""Retrieved documents inside a finished prompt: where they stand, and what is left of the prompt without them.

Pure functions of strings and documents.
"""

from __future__ import annotations

from collections.abc import Sequence

from langchain_core.documents import Document as LangChainDocument

from kvfusion_rag import Document

from .documents import to_document
from .framing import close_gap

SHORTEST = 16  # characters; shorter texts may stand in a question or a template by chance


def cut_out(text: str, documents: Sequence[LangChainDocument]) -> tuple[str, list[Document]]:
    """``text`` without the documents that stand in it word for word, and these in the order of their first places.

    Longer documents are looked for first, and no place is part of two. A document that is shorter than
    ``SHORTEST`` characters, or that only stands inside a word, stays where it is.
    """
    taken: list[tuple[int, int, LangChainDocument]] = []
    for document in sorted(documents, key=lambda document: -len(document.page_content.strip())):
        content = document.page_content.strip()
        for start in _places(text, content) if len(content) >= SHORTEST else ():
            end = start + len(content)
            if all(end <= begun or start >= ended for begun, ended, _ in taken):
                taken.append((start, end, document))
    taken.sort(key=lambda place: place[:2])
    rest, position = "", 0
    for start, end, _ in taken:
        rest = close_gap(rest, text[position:start]) if position else text[:start]
        position = end
    rest = close_gap(rest, text[position:]) if taken else text
    return rest, list({document.page_content: to_document(document) for *_, document in taken}.values())


def _places(text: str, content: str) -> list[int]:
    places, start = [], text.find(content)
    while start >= 0:
        end = start + len(content)
        if not (_joins(text, start) or _joins(text, end)):
            places.append(start)
        start = text.find(content, end)
    return places


def _joins(text: str, position: int) -> bool:
    """Whether the characters before and at ``position`` belong to one word."""
    return 0 < position < len(text) and text[position - 1].isalnum() and text[position].isalnum()
