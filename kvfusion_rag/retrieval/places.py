"""Names the places of chunks as a reader would write them: ``page 12``, ``rows 40-52``, ``chapter "The storm"``."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from ..text.citations import count_line_ends
from .files.reading import Mark


def name_places(text: str, marks: Sequence[Mark], spans: Iterable[tuple[int, int]]) -> list[str]:
    """Return the name of the place of each span of a text; empty for a span that begins before all marks.

    Args:
        marks: in ascending order.
        spans: (start, end) pairs in ascending order, which do not overlap.
    """
    reader = _MarkReader(text, marks)
    names: list[str] = []
    for start, end in spans:
        first, last = reader.at(start), reader.at(max(start, end - 1))
        names.append("" if first is None or last is None else _range(*first, *last))
    return names


def shifted_marks(text: str, marks: Sequence[Mark], removed: Sequence[tuple[int, int]]) -> tuple[Mark, ...]:
    """Return the marks of a text from which the spans ``removed`` are removed. Line numbers continue after each."""
    if not removed or not marks:
        return tuple(marks)
    reader = _MarkReader(text, marks)
    shifted: list[Mark] = []
    number = gone = 0
    for start, end in (*removed, (len(text) + 1, len(text) + 1)):
        while number < len(marks) and marks[number].start < end:
            shifted.append(_moved(marks[number], min(marks[number].start, start) - gone))
            number += 1
        gone += end - start
        after = reader.at(end) if end <= len(text) else None
        if after is not None and after[0].counts_lines:
            shifted.append(_moved(after[0], end - gone, after[1]))
    return tuple(shifted)


class _MarkReader:
    """Finds the mark and the number at positions that ascend, in one pass over the text."""

    def __init__(self, text: str, marks: Sequence[Mark]) -> None:
        self._text = text
        self._marks = marks
        self._current = -1
        self._position = 0
        self._lines = 0  # line ends between the current mark and the position

    def at(self, position: int) -> tuple[Mark, int] | None:
        """Return the mark that covers ``position``, and the number there."""
        while self._current + 1 < len(self._marks) and self._marks[self._current + 1].start <= position:
            self._current += 1
            self._position, self._lines = self._marks[self._current].start, 0
        if self._current < 0:
            return None
        mark = self._marks[self._current]
        if mark.counts_lines:
            self._lines += count_line_ends(self._text, self._position, position)
            self._position = position
        return mark, mark.number + self._lines


def _moved(mark: Mark, start: int, number: int | None = None) -> Mark:
    number = mark.number if number is None else number
    return Mark(start, mark.unit, number, mark.name, mark.within, mark.counts_lines)


def _name(mark: Mark, number: int) -> str:
    within = f"{mark.within}, " if mark.within else ""
    return f"{within}{mark.unit} {number}" if number else f'{within}{mark.unit} "{mark.name}"'


def _range(first: Mark, first_number: int, last: Mark, last_number: int) -> str:
    names = _name(first, first_number), _name(last, last_number)
    if names[0] == names[1]:
        return names[0]
    if (first.unit, first.within) == (last.unit, last.within) and first_number and last_number:
        within = f"{first.within}, " if first.within else ""
        return f"{within}{first.unit}s {first_number}-{last_number}"
    return f"{names[0]} to {names[1]}"
