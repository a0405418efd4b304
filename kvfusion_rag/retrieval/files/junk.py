"""Finds data inside texts that no question is about: embedded files, hex dumps and minified code.

Such data costs as much to split, embed and store as prose, and its chunks crowd out others. Prose in any language is
kept: a rule looks only at long runs of ASCII, and only lines of data side by side count as a dump. Each line is looked
at once, so time grows linearly with the text.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator

MIN_RUN = 1_000  # characters without white space; the longest web addresses are about as long
MIN_DATA_LINES = 8
MIN_CODE_LINE = 1_000  # characters
CODE_SPACES = 0.07  # prose has more than 0.12 white space, and minified code less than 0.05
CODE_SIGNS = 0.08  # prose has less than 0.05 of these, and minified code more than 0.12
MAX_OUTSIDE_ASCII = 0.1  # share of a line of minified code; languages without spaces are above

_DATA_URI = re.compile(r"data:[\w/+.;=-]{0,100};base64,[A-Za-z0-9+/=%_-]{100,}+")
_RUN = re.compile(r"[!-~]+")
_ENCODED_LINE = re.compile(r"[ \t>|]*+[A-Za-z0-9+/_=-]{60,}+[ \t\r]*$")
_ADDRESS = re.compile(r"\s*+(?:0x[0-9A-Fa-f]{4,16}|[0-9A-Fa-f]{7,16})[:\s]\s*+")
_HEX_GROUPS = re.compile(r"(?:(?:0x|\\x)?(?:[0-9A-Fa-f]{2}){1,8}(?:[\s,;:|]++|$|(?=\\))){8,}+")
_HEX_LETTER = re.compile(r"[A-Fa-fx]")
_SPACE = re.compile(r"\s")
_CODE_SIGN = re.compile(r"[][(){}<>;:,=\"'|&+*/]")

Span = tuple[int, int, str]  # start and end in the text, and what is there


def without_spans(text: str, spans: Iterable[tuple[int, int]]) -> str:
    """Return the text without some spans, which are in order and do not overlap."""
    kept: list[str] = []
    start = 0
    for first, last in spans:
        kept.append(text[start:first])
        start = last
    kept.append(text[start:])
    return "".join(kept)


def find_junk(text: str) -> tuple[list[tuple[int, int]], tuple[str, ...]]:
    """Return the spans of embedded data in order, and one description for each kind of data."""
    characters: Counter[str] = Counter()
    uris = [match.span() for match in _DATA_URI.finditer(text)]
    if uris:
        characters["embedded base64 data"] = sum(end - start for start, end in uris)
    lines: list[tuple[int, int]] = []
    for first, last, what in _data_lines(without_spans(text, uris)):
        lines.append((first, last))
        characters[what] += last - first
    spans = _merged(uris, _in_whole_text(lines, uris))
    return spans, tuple(f"{what} ({count:,} characters)" for what, count in characters.items())


def _in_whole_text(spans: list[tuple[int, int]], removed: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Return spans of a text as spans of the text from which ``removed`` were not removed."""
    whole: list[tuple[int, int]] = []
    shift = 0
    number = 0
    for start, end in spans:
        ends: list[int] = []
        for position in (start, end - 1):
            while number < len(removed) and removed[number][0] <= position + shift:
                shift += removed[number][1] - removed[number][0]
                number += 1
            ends.append(position + shift)
        whole.append((ends[0], ends[1] + 1))
    return whole


def _merged(first: list[tuple[int, int]], second: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Return the spans of both lists in order, with overlapping ones joined."""
    merged: list[tuple[int, int]] = []
    for start, end in sorted((*first, *second)):
        if merged and start < merged[-1][1]:
            merged[-1] = (merged[-1][0], max(merged[-1][1], end))
        else:
            merged.append((start, end))
    return merged


def _data_lines(text: str) -> Iterator[Span]:
    """Yield long runs inside lines, lines of minified code, and blocks of lines of encoded data."""
    block: list[tuple[int, int]] = []
    block_kind = ""
    start = 0
    for line in text.splitlines(keepends=True):
        end = start + len(line)
        kind = _line_kind(line)
        if kind != block_kind:
            yield from _block(block, block_kind)
            block, block_kind = [], kind
        if kind:
            block.append((start, end))
        elif len(line) >= MIN_RUN:
            yield from _inside_line(line, start)
        start = end
    yield from _block(block, block_kind)


def _block(lines: list[tuple[int, int]], kind: str) -> Iterator[Span]:
    if len(lines) >= MIN_DATA_LINES:
        yield (lines[0][0], lines[-1][1], kind)
        return
    for start, end in lines:
        if end - start > MIN_RUN:
            yield (start, end, "unbroken data")


def _line_kind(line: str) -> str:
    if _ENCODED_LINE.match(line):
        return "encoded data"
    return "a hex dump" if _is_hex(line) else ""


def _is_hex(line: str) -> bool:
    """Return whether the line begins with hex numbers, with or without an address. Decimal numbers are not data."""
    address = _ADDRESS.match(line)
    if address is not None:
        return _HEX_GROUPS.match(line, address.end()) is not None
    groups = _HEX_GROUPS.match(line.lstrip())
    return groups is not None and (bool(_HEX_LETTER.search(groups[0])) or set(groups[0]) <= {"0", *" \t\n"})


def _inside_line(line: str, start: int) -> Iterator[Span]:
    if len(line) >= MIN_CODE_LINE and _is_minified(line):
        yield (start, start + len(line.rstrip()), "minified code or data")
        return
    for match in _RUN.finditer(line):
        if match.end() - match.start() >= MIN_RUN:
            yield (start + match.start(), start + match.end(), "unbroken data")


def _is_minified(line: str) -> bool:
    outside = len(line) - len(line.encode("ascii", "ignore"))
    return (
        outside <= MAX_OUTSIDE_ASCII * len(line)
        and len(_SPACE.findall(line)) <= CODE_SPACES * len(line)
        and len(_CODE_SIGN.findall(line)) >= CODE_SIGNS * len(line)
    )
