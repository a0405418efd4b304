"""Splits text into sentences with the library sentencex, which supports some 300 languages."""

from __future__ import annotations

import re
from typing import cast

from sentencex import get_sentence_boundaries  # pyright: ignore[reportAttributeAccessIssue, reportMissingTypeStubs, reportUnknownVariableType]

WINDOW = 5_000  # characters; the library's time grows with the square of what it reads at once
# The library fails on lone surrogates and on white space outside ASCII.
_UNREADABLE = re.compile("[^\\S\\x00-\\x7f]|[\ud800-\udfff]")


def sentence_spans(text: str) -> list[tuple[int, int]]:
    """Return (start, end) of each sentence. The spans cover ``text`` without gaps, and are not blank unless it is.

    Time grows linearly with the length of the text. A sentence longer than ``WINDOW`` is cut.
    """
    readable = text if text.isascii() else _UNREADABLE.sub(" ", text)
    ends: list[int] = []
    start = 0
    while start < len(text):
        window = readable[start : start + WINDOW]
        boundaries = cast(list[dict[str, int]], get_sentence_boundaries("en", window))
        found = [start + one["end_index"] for one in boundaries]
        if start + WINDOW < len(text) and len(found) > 1:
            found.pop()  # this sentence may continue after the window
        start = found[-1]
        ends += found
    spans: list[tuple[int, int]] = []
    for start, end in zip([0, *ends], ends, strict=False):
        if spans and not text[start:end].strip():
            spans[-1] = (spans[-1][0], end)
        else:
            spans.append((start, end))
    return spans
