"""Reads plain text, Markdown and source code in any encoding. Line ends are unchanged."""

from __future__ import annotations

import re

from .charsets import DecodedText, decode_text, has_mark
from .reading import Mark, Reading, UnreadableFileError

# A file is binary if more than this share of its characters are control characters or invalid UTF-8.
BINARY_SHARE = 0.2
LINES = (Mark(0, "line", 1, counts_lines=True),)

_NOT_TEXT = re.compile("[\x00-\x08\x0b\x0e-\x1f\x7f\ufffd]")
_ATX_HEADING = re.compile(r" {0,3}#{1,6}(?=\s|$)")
_FENCE = re.compile(r" {0,3}(```|~~~)")


def read_text(data: bytes) -> Reading:
    """Return a plain text or source code."""
    decoded = decode(data)
    return Reading(decoded.text, "", decoded.note(), LINES)


def read_markdown(data: bytes) -> Reading:
    """Return a Markdown text, titled by its first heading."""
    decoded = decode(data)
    return Reading(decoded.text, first_heading(decoded.text), decoded.note(), LINES)


def decode(data: bytes) -> DecodedText:
    """Decode a text in any encoding.

    Raises:
        UnreadableFileError: it is binary.
    """
    if b"\x00" in data and not has_mark(data):
        raise UnreadableFileError("binary, not text")
    decoded = decode_text(data)
    if not decoded.known or len(_NOT_TEXT.findall(decoded.text)) > BINARY_SHARE * len(decoded.text):
        raise UnreadableFileError("neither UTF-8 nor another known encoding")
    return decoded


def first_heading(text: str) -> str:
    """Return the first heading of a Markdown text outside of code, or an empty text."""
    fence = ""
    for line in text.splitlines():
        mark = _FENCE.match(line)
        if mark and fence in ("", mark[1]):
            fence = "" if fence else mark[1]
        heading = None if fence else _ATX_HEADING.match(line)
        title = line[heading.end() :].strip().rstrip("#").rstrip() if heading else ""
        if title:
            return title
    return ""
