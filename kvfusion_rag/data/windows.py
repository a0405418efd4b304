"""Cuts passages to a budget, and finds the sentence that contains the answer.

Pure functions on text. The caller decides what fits, so models and tokenizers are not needed here.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence

from ..schema import Document
from ..text.citations import find_citations
from ..text.sentences import sentence_spans

Span = tuple[int, int]
Fits = Callable[[str], bool]

_WORD = re.compile(r"\S+\s*")


def find_answer(text: str, answers: Sequence[str], start: int | None = None) -> Span | None:
    """Return the span of the first answer that is found, or None. ``start`` is trusted if ``answers[0]`` is there."""
    if start is not None and answers and start >= 0 and text.startswith(answers[0], start):
        return start, start + len(answers[0])
    document = Document(text)
    citations = (c for answer in answers for c in find_citations(answer, [("", document)]))
    return next(((citation.start, citation.end) for citation in citations), None)


def evidence_of(text: str, span: Span) -> str:
    """Return the sentence that contains ``span``, or all sentences that it touches."""
    spans = sentence_spans(text)
    first, last = _covering(spans, span)
    return text[spans[first][0] : spans[last][1]].strip()


def split_passage(text: str, fits: Fits) -> list[str]:
    """Return pieces that fit, in order: runs of sentences, or of words if a sentence is too long.

    A word that does not fit by itself is dropped.
    """
    if fits(text):
        return [text]
    units = [unit for sentence in sentence_spans(text) for unit in _fitting_units(text, sentence, fits)]
    pieces: list[Span] = []
    for start, end in units:
        if pieces and fits(text[pieces[-1][0] : end].strip()):
            pieces[-1] = (pieces[-1][0], end)
        else:
            pieces.append((start, end))
    return [text[start:end].strip() for start, end in pieces]


def cut_around(text: str, span: Span, fits: Fits, rng: random.Random) -> Span | None:
    """Return the longest run of sentences around ``span`` that fits, or of words if one sentence is too long.

    The side to extend is drawn from ``rng``, so that the answer is not always in the middle. Returns None if not even
    the words of the span fit.
    """
    if fits(text):
        return 0, len(text)
    for units in (sentence_spans(text), [m.span() for m in _WORD.finditer(text)]):
        first, last = _covering(units, span)
        if fits(text[units[first][0] : units[last][1]].strip()):
            return _stripped(text, _grow(text, units, first, last, fits, rng))
    return None


def _grow(text: str, units: list[Span], first: int, last: int, fits: Fits, rng: random.Random) -> Span:
    """Extend the run from ``first`` to ``last`` on either side until nothing more fits."""
    sides = ["left", "right"]
    while sides:
        side = rng.choice(sides)
        low, high = (first - 1, last) if side == "left" else (first, last + 1)
        if low >= 0 and high < len(units) and fits(text[units[low][0] : units[high][1]].strip()):
            first, last = low, high
        else:
            sides.remove(side)
    return units[first][0], units[last][1]


def _stripped(text: str, span: Span) -> Span:
    piece = text[slice(*span)]
    return span[0] + len(piece) - len(piece.lstrip()), span[1] - len(piece) + len(piece.rstrip())


def _fitting_units(text: str, sentence: Span, fits: Fits) -> list[Span]:
    start, end = sentence
    if fits(text[start:end].strip()):
        return [sentence]
    return [m.span() for m in _WORD.finditer(text, start, end) if fits(m.group().strip())]


def _covering(units: list[Span], span: Span) -> tuple[int, int]:
    """Return the indices of the first and the last unit that ``span`` touches."""
    touched = [n for n, (start, end) in enumerate(units) if start < span[1] and span[0] < end]
    return touched[0], touched[-1]
