"""Finds retrieved documents in a prompt by their text, and removes them from it."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from dataclasses import replace

from langchain_core.documents import Document as LangChainDocument

from kvfusion_rag import Document, DocumentsPlace

from .documents import TEXT_SEPARATOR, to_document
from .framing import Extraction

MIN_CHARACTERS = 16  # a shorter text may occur in a question or a template by chance

Match = tuple[int, int, Document]  # start and end in the text, and the document found there


def cut_out(text: str, documents: Sequence[LangChainDocument]) -> Extraction:
    """Remove the documents that occur verbatim in ``text``.

    If all of them are separated by the same text, place and separator reproduce ``text`` exactly. Otherwise, for
    example if the prompt numbers its documents, each document is removed, the gaps are closed, and the place is that
    of the first document.

    Longer documents are searched first, and matches do not overlap. A document shorter than ``MIN_CHARACTERS``, or
    found only inside a word, is not removed.
    """
    before, after, matches, gaps = text, "", [], []
    for strips in (False, True):
        matches = _find(text, documents, strips=strips)
        if not matches:
            return Extraction(text)
        before, after = text[: matches[0][0]], text[matches[-1][1] :]
        gaps = [text[end:start] for (_, end, _), (start, _, _) in itertools.pairwise(matches)]
        separator = gaps[0] if gaps else TEXT_SEPARATOR
        if len(set(gaps)) <= 1 and _is_separator(separator, before):
            place = DocumentsPlace(len(before), separator)
            return Extraction(before + after, tuple(document for *_, document in matches), place)
    mark = "|"  # stands for the documents, so that the white space after them is kept
    rest = functools.reduce(close_gap, [*gaps, after], mark).removeprefix(mark)
    distinct = {document.text: document for *_, document in matches}
    return Extraction(before + rest, tuple(distinct.values()), DocumentsPlace(len(before)))


def close_gap(before: str, after: str) -> str:
    """Join the texts around removed documents, and keep the longer of the two white spaces."""
    left, right = before.rstrip(), after.lstrip()
    if not left or not right:
        return left + right
    return left + max(before[len(left) :], after[: len(after) - len(right)], key=len) + right


def _find(text: str, documents: Sequence[LangChainDocument], *, strips: bool) -> list[Match]:
    """Return the matches of ``documents`` in ``text``, ordered by position.

    Args:
        strips: search only for stripped texts, because some chains strip white space around documents.
    """
    matches: list[Match] = []

    def is_free(start: int, end: int) -> bool:
        return all(end <= other_start or start >= other_end for other_start, other_end, _ in matches)

    for document in sorted(documents, key=_longest_first):
        original, content = document.page_content, document.page_content.strip()
        margin = len(original) - len(original.lstrip())
        for place in _places(text, content) if len(content) >= MIN_CHARACTERS else ():
            for start, variant in ((place - margin, original), (place, content))[strips:]:
                end = start + len(variant)
                if start >= 0 and text.startswith(variant, start) and is_free(start, end):
                    matches.append((start, end, replace(to_document(document), text=variant)))
                    break
    return sorted(matches, key=lambda place: place[:2])


def _longest_first(document: LangChainDocument) -> tuple[int, int]:
    return -len(document.page_content.strip()), -len(document.page_content)


def _is_separator(gap: str, before: str) -> bool:
    """Return whether ``gap`` could separate any two documents.

    A gap with words must also occur before the first document, because numbers and sources differ by document.
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
    """Return whether the characters before and at ``position`` belong to one word."""
    return 0 < position < len(text) and text[position - 1].isalnum() and text[position].isalnum()
