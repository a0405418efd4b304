"""Sentences: which one holds the answer, and how a passage is cut to a budget around it.

Pure functions on text; the caller says what fits, so no model and no tokenizer is known here.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from itertools import pairwise

from ..schema import Document
from ..text.citations import find_citations

Span = tuple[int, int]
Fits = Callable[[str], bool]

_BORDER = re.compile(r"""(?<![.!?…])[.!?…]++["'”’»)\]]*+(?:\[\d+\])*+\s+|[。！？]++\s*|\n+\s*""")
_WORD = re.compile(r"\S+\s*")
_ABBREVIATIONS = frozenset(
    (
        *("approx", "ca", "capt", "cf", "co", "col", "corp", "dept", "dr", "e.g", "etc", "fig", "gen", "gov", "i.e"),
        *("inc", "jr", "lt", "ltd", "mr", "mrs", "ms", "mt", "no", "prof", "rev", "sen", "sgt", "sr", "st", "vol"),
        "vs",
    )
)


def find_answer(text: str, answers: Sequence[str], start: int | None = None) -> Span | None:
    """Where the first answer that can be found stands; ``start`` is believed if ``answers[0]`` stands there."""
    if start is not None and answers and start >= 0 and text.startswith(answers[0], start):
        return start, start + len(answers[0])
    document = Document(text)
    found = (c for answer in answers for c in find_citations(answer, [("", document)]))
    return next(((citation.start, citation.end) for citation in found), None)


def sentence_spans(text: str) -> list[Span]:
    """(start, end) of every sentence with the white space behind it; together they are the whole text."""
    borders = [0, *(m.end() for m in _BORDER.finditer(text) if _ends_sentence(text, m)), len(text)]
    return [(start, end) for start, end in pairwise(borders) if start < end]


def evidence_of(text: str, span: Span) -> str:
    """The sentence around ``span``, or the sentences that it runs over."""
    spans = sentence_spans(text)
    first, last = _covering(spans, span)
    return text[spans[first][0] : spans[last][1]].strip()


def split_passage(text: str, fits: Fits) -> list[str]:
    """Pieces that fit, in order: runs of sentences, of words where one sentence is too long.

    A word that does not fit by itself is left out.
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
    """(start, end) of the widest run of sentences around ``span`` that fits, of words where one sentence is too long.

    The side that grows next is drawn from ``rng``, so the answer does not always come to stand in the middle.
    ``None`` where not even the words of the span fit.
    """
    if fits(text):
        return 0, len(text)
    for units in (sentence_spans(text), [m.span() for m in _WORD.finditer(text)]):
        first, last = _covering(units, span)
        if fits(text[units[first][0] : units[last][1]].strip()):
            return _stripped(text, _grow(text, units, first, last, fits, rng))
    return None


def _grow(text: str, units: list[Span], first: int, last: int, fits: Fits, rng: random.Random) -> Span:
    """Add units on either side of ``first`` to ``last`` until none fits any more."""
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
    """Numbers of the first and the last unit that ``span`` touches."""
    touched = [n for n, (start, end) in enumerate(units) if start < span[1] and span[0] < end]
    return touched[0], touched[-1]


def _ends_sentence(text: str, border: re.Match[str]) -> bool:
    """Not after an initial or an abbreviation, nor where the next word goes on in lower case."""
    mark = border.group()
    if "\n" in mark or mark[0] in "。！？":
        return True
    if text[border.end() : border.end() + 1].islower():
        return False
    word = re.split(r"[\s(\[\"“]", text[max(0, border.start() - 12) : border.start()])[-1]
    return not (mark[0] == "." and ((len(word) == 1 and word.isalpha()) or word.lower() in _ABBREVIATIONS))
