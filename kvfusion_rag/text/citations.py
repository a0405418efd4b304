"""Finds an answer in the documents by a normalized match, in the way SQuAD's metric compares answers.

Case, accents, punctuation, spaces and leading articles are ignored, but a match begins and ends at word boundaries. A
citation has the source's spelling, even if the model is uncased. Pure functions on text.
"""

from __future__ import annotations

import re
import unicodedata
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from ..schema import Citation, Document

MAX_PLACE_CHARACTERS = 200

_WORD = re.compile(r"\w+")
_COUNTED = re.compile(r"(.*\b(?:line|row))s ([0-9]{1,9})-([0-9]{1,9})")
_LEADING_ARTICLES = re.compile(r"^(?:(?:a|an|the)(?:\s+|$))+", re.IGNORECASE)


def find_citations(answer: str, documents: Iterable[tuple[str, Document]]) -> tuple[Citation, ...]:
    """Return the first occurrence of ``answer`` in each document that contains it.

    Args:
        answer: generated text.
        documents: (id, document) pairs; citations come in this order.
    """
    target = _normalize(_LEADING_ARTICLES.sub("", answer.strip()))
    if not target:
        return ()
    spans = ((document_id, document, _find(target, document.text)) for document_id, document in documents)
    return tuple(_citation(document_id, document, *span) for document_id, document, span in spans if span is not None)


def place_of(metadata: Mapping[str, Any]) -> str | None:
    """Return the place in a document's metadata if it is a text of a length that can name a place."""
    place = metadata.get("place")
    if not isinstance(place, str) or not 0 < len(place) <= MAX_PLACE_CHARACTERS:
        return None
    return place.encode(errors="replace").decode()  # lone surrogates could not be written to a file


def narrowed_place(place: str, text: str, offset: int) -> str:
    """Return the place of one character of a chunk at ``place``: the row or line of it, if the chunk has several."""
    match = _COUNTED.fullmatch(place)
    if match is None:
        return place
    first, last = int(match[2]), int(match[3])
    if count_line_ends(text, 0, len(text)) != last - first:  # rows are missing between them
        return place
    return f"{match[1]} {first + count_line_ends(text, 0, offset)}"


def count_line_ends(text: str, start: int, end: int) -> int:
    """Return how many lines end in ``text[start:end]``, whatever their line ends are."""
    returns = text.count("\r", start, end)
    both = text.count("\r\n", start, end) if returns else 0
    return text.count("\n", start, end) + returns - both


def find_shared_phrases(answer: str, question: str, documents: Iterable[tuple[str, Document]]) -> tuple[Citation, ...]:
    """Return the longest phrase that an answer shares with a document, for answers that no document contains.

    A phrase has at least two words. At least one of them is new: it is not in the question, and it is a number or has
    four letters or more. Only the documents with the longest phrase of all are returned, in their order.
    """
    question_words = {_normalize(word) for word in _WORD.findall(question)}
    words = [_normalize(word) for word in _WORD.findall(answer)]
    runs = [(document_id, doc, _longest_run(words, doc.text, question_words)) for document_id, doc in documents]
    most = max((run[0] for _, _, run in runs), default=0)
    if most < 2:
        return ()
    return tuple(
        _citation(document_id, document, start, end)
        for document_id, document, (length, start, end) in runs
        if length == most
    )


def _citation(document_id: str, document: Document, start: int, end: int) -> Citation:
    place = place_of(document.metadata)
    narrowed = None if place is None else narrowed_place(place, document.text, start)
    return Citation(document_id, start, end, document.text[start:end], narrowed)


def _longest_run(words: Sequence[str], text: str, question_words: Collection[str]) -> tuple[int, int, int]:
    """Return length, start and end of the longest run of ``words`` in ``text`` with a new word, or zeros."""
    places = [(match.start(), match.end(), _normalize(match[0])) for match in _WORD.finditer(text)]
    places_of: defaultdict[str, list[int]] = defaultdict(list)
    for n, (_, _, word) in enumerate(places):
        places_of[word].append(n)
    best, lengths = (0, 0, 0), dict[int, int]()  # length of the run that ends at a place, for the previous word
    for word in words:
        lengths = {n: lengths.get(n - 1, 0) + 1 for n in places_of.get(word, ())}
        for n, length in lengths.items():
            run = places[n + 1 - length : n + 1] if length > best[0] else []
            if any(_is_new(other, question_words) for _, _, other in run):
                best = length, run[0][0], run[-1][1]
    return best


def _is_new(word: str, question_words: Collection[str]) -> bool:
    return word not in question_words and (len(word) >= 4 or word.isdecimal())


def _find(target: str, text: str) -> tuple[int, int] | None:
    """Return the first (start, end) in ``text`` that normalizes to ``target`` between word boundaries."""
    normalized, origins = "", list[int]()
    if target not in _normalize(text):  # most documents do not match, so they skip the costly map of origins
        return None
    for index, char in enumerate(text):
        letters = _normalize(char)
        normalized += letters
        origins += [index] * len(letters)
    found = normalized.find(target)
    while found >= 0:
        start, end = origins[found], origins[found + len(target) - 1] + 1
        while end < len(text) and unicodedata.combining(text[end]):
            end += 1
        if _is_boundary(text, start) and _is_boundary(text, end):
            return start, end
        found = normalized.find(target, found + 1)
    return None


def _is_boundary(text: str, index: int) -> bool:
    """Whether a word may begin or end between ``index - 1`` and ``index``."""
    if index == 0 or index == len(text):
        return True
    before, after = text[index - 1], text[index]
    if "Lo" in (unicodedata.category(before), unicodedata.category(after)):  # scripts without spaces
        return True
    return not (before.isalnum() and after.isalnum())


def _normalize(text: str) -> str:
    """Return only the letters and digits, in lower case and without accents. Works character by character."""
    if text.isascii():
        return "".join(filter(str.isalnum, text.lower()))
    return "".join(c for char in text for c in unicodedata.normalize("NFKD", char).casefold() if c.isalnum())
