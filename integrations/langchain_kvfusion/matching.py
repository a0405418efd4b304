"""Retrieved documents inside a finished prompt: where they stand, and what is left of the prompt without them.

Pure functions of strings and documents.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from dataclasses import replace

from langchain_core.documents import Document as LangChainDocument

from kvfusion_rag import Document, DocumentsPlace

from .documents import TEXT_SEPARATOR, to_document
from .framing import Extraction

SHORTEST = 16  # characters; shorter texts may stand in a question or a template by chance

Found = tuple[int, int, Document]  # start and end in the text, and the document that stands there


def cut_out(text: str, documents: Sequence[LangChainDocument]) -> Extraction:
    """Take the documents that stand word for word in ``text`` out of it.

    If the same separator stands between all of them, the place and the separator reproduce ``text`` exactly. Otherwise
    (the prompt numbers its documents, or shows some of them elsewhere) each document is taken once, the gaps are
    closed, and the place is that of the first.

    Longer documents are looked for first, and no place is part of two. A document that is shorter than
    ``SHORTEST`` characters, or that only stands inside a word, stays where it is.
    """
    before, after, found, gaps = text, "", [], []
    for strips in (False, True):
        found = _find(text, documents, strips=strips)
        if not found:
            return Extraction(text)
        before, after = text[: found[0][0]], text[found[-1][1] :]
        gaps = [text[end:start] for (_, end, _), (start, _, _) in itertools.pairwise(found)]
        separator = gaps[0] if gaps else TEXT_SEPARATOR
        if len(set(gaps)) <= 1 and _is_separator(separator, before):
            place = DocumentsPlace(len(before), separator)
            return Extraction(before + after, tuple(document for *_, document in found), place)
    mark = "|"  # for the documents, so that the white space behind them is kept
    rest = functools.reduce(close_gap, [*gaps, after], mark).removeprefix(mark)
    distinct = {document.text: document for *_, document in found}
    return Extraction(before + rest, tuple(distinct.values()), DocumentsPlace(len(before)))


def close_gap(before: str, after: str) -> str:
    """``before`` and ``after`` joined where the documents were, with the wider of the two white spaces."""
    left, right = before.rstrip(), after.lstrip()
    if not left or not right:
        return left + right
    return left + max(before[len(left) :], after[: len(after) - len(right)], key=len) + right


def _find(text: str, documents: Sequence[LangChainDocument], *, strips: bool) -> list[Found]:
    """Where documents stand in ``text``, in order; each with its text as it stands there.

    Args:
        strips: look for them without the white space around them only, since some chains strip it.
    """
    found: list[Found] = []

    def is_free(start: int, end: int) -> bool:
        return all(end <= begun or start >= ended for begun, ended, _ in found)

    for document in sorted(documents, key=_longest_first):
        whole, content = document.page_content, document.page_content.strip()
        margin = len(whole) - len(whole.lstrip())
        for place in _places(text, content) if len(content) >= SHORTEST else ():
            for start, shown in ((place - margin, whole), (place, content))[strips:]:
                end = start + len(shown)
                if start >= 0 and text.startswith(shown, start) and is_free(start, end):
                    found.append((start, end, replace(to_document(document), text=shown)))
                    break
    return sorted(found, key=lambda place: place[:2])


def _longest_first(document: LangChainDocument) -> tuple[int, int]:
    return -len(document.page_content.strip()), -len(document.page_content)


def _is_separator(gap: str, before: str) -> bool:
    """Whether ``gap`` is the same between any two documents.

    A gap with words counts only if the first document has the same label: numbers and sources differ.
    """
    label = gap.lstrip()
    return not any(map(str.isalnum, label)) or before.endswith(label)


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
