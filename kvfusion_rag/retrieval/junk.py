"""Finds data inside texts that nobody can ask about: embedded files, hex dumps and minified code.

Such data costs as much to split, embed and store as prose, and its chunks crowd out others. Prose in any language is
kept: a rule looks only at long runs of ASCII, and only lines of data side by side count as a dump. Each line is looked
at once, so time grows linearly with the text.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator

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


def without_junk(text: str) -> tuple[str, tuple[str, ...]]:
    """Return the text without embedded data, and one description for each kind of data that was left out."""
    characters: Counter[str] = Counter()

    def without(match: re.Match[str]) -> str:
        characters["embedded base64 data"] += match.end() - match.start()
        return ""

    text = _DATA_URI.sub(without, text)
    kept: list[str] = []
    start = 0
    for first, last, what in _data_lines(text):
        kept.append(text[start:first])
        characters[what] += last - first
        start = last
    kept.append(text[start:])
    return "".join(kept), tuple(f"{what} ({count:,} characters)" for what, count in characters.items())


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
