"""Where an answer stands in the documents: a normalised match in the manner of SQuAD's metric.

Case, accents, punctuation, spacing and leading articles do not matter; the borders of words do. So an answer
of an uncased model gets the source's spelling back. Pure functions on text.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Collection, Iterable, Sequence

from ..schema import Citation, Document

_WORD = re.compile(r"\w+")
_LEADING_ARTICLES = re.compile(r"^(?:(?:a|an|the)(?:\s+|$))+", re.IGNORECASE)


def find_citations(answer: str, documents: Iterable[tuple[str, Document]]) -> tuple[Citation, ...]:
    """The first place of ``answer`` in each document that holds it.

    Args:
        answer: generated text.
        documents: (id, document) pairs; citations come in their order.
    """
    wanted = _reduce(_LEADING_ARTICLES.sub("", answer.strip()))
    if not wanted:
        return ()
    places = ((document_id, document.text, _find(wanted, document.text)) for document_id, document in documents)
    return tuple(
        Citation(document_id, place[0], place[1], text[place[0] : place[1]])
        for document_id, text, place in places
        if place is not None
    )


def find_shared_phrases(answer: str, question: str, documents: Iterable[tuple[str, Document]]) -> tuple[Citation, ...]:
    """The longest phrase that each document shares with an answer, for answers that stand in no document as a whole.

    A phrase has two words or more, at least one of which is new: neither in the question nor shorter than four letters
    (unless it is a number). Only the documents with the longest phrase of all are returned, in their order.
    """
    known = {_reduce(word) for word in _WORD.findall(question)}
    said = [_reduce(word) for word in _WORD.findall(answer)]
    found = [
        (document_id, document.text, _longest_run(said, document.text, known)) for document_id, document in documents
    ]
    most = max((run[0] for _, _, run in found), default=0)
    if most < 2:
        return ()
    return tuple(
        Citation(document_id, start, end, text[start:end])
        for document_id, text, (length, start, end) in found
        if length == most
    )


def _longest_run(said: Sequence[str], text: str, known: Collection[str]) -> tuple[int, int, int]:
    """Words, first and last character of the longest run of ``said`` in ``text`` with a new word; zeros if none."""
    places = [(match.start(), match.end(), _reduce(match[0])) for match in _WORD.finditer(text)]
    best, row = (0, 0, 0), [0] * (len(places) + 1)
    for word in said:
        grown = [0] * (len(places) + 1)
        for n, (_, end, other) in enumerate(places):
            if word == other:
                length = grown[n + 1] = row[n] + 1
                run = places[n + 1 - length : n + 1]
                if length > best[0] and any(_is_new(w, known) for _, _, w in run):
                    best = length, run[0][0], end
        row = grown
    return best


def _is_new(word: str, known: Collection[str]) -> bool:
    return word not in known and (len(word) >= 4 or word.isdecimal())


def _find(wanted: str, text: str) -> tuple[int, int] | None:
    """First (start, end) in ``text`` whose reduced form is ``wanted`` and that begins and ends with a word."""
    reduced, origins = "", []
    if wanted not in _reduce(text):  # most documents end here, without the costly map of origins
        return None
    for index, char in enumerate(text):
        letters = _reduce(char)
        reduced += letters
        origins += [index] * len(letters)
    found = reduced.find(wanted)
    while found >= 0:
        start, end = origins[found], origins[found + len(wanted) - 1] + 1
        while end < len(text) and unicodedata.combining(text[end]):
            end += 1
        if _is_border(text, start) and _is_border(text, end):
            return start, end
        found = reduced.find(wanted, found + 1)
    return None


def _is_border(text: str, index: int) -> bool:
    """Whether a word may begin or end between ``index - 1`` and ``index``."""
    if index == 0 or index == len(text):
        return True
    before, after = text[index - 1], text[index]
    if "Lo" in (unicodedata.category(before), unicodedata.category(after)):  # scripts without spaces
        return True
    return not (before.isalnum() and after.isalnum())


def _reduce(text: str) -> str:
    """Lower-case letters and digits alone, without accents; of a text the same as of its characters, joined."""
    if text.isascii():
        return "".join(filter(str.isalnum, text.lower()))
    return "".join(c for char in text for c in unicodedata.normalize("NFKD", char).casefold() if c.isalnum())
