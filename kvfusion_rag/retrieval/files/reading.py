"""What readers return: the text of a file, and marks where its pages, rows or chapters begin."""

from __future__ import annotations

import re
from dataclasses import dataclass

from ...errors import RetrievalError

MAX_NAME_CHARACTERS = 60

_SPACES = re.compile(r"\s+")


class UnreadableFileError(RetrievalError):
    """A file has no usable text. The message is only the reason."""


@dataclass(frozen=True, slots=True)
class Mark:
    """A place in a file. It covers the text from ``start`` up to the next mark.

    Attributes:
        unit: what is counted or named: "page", "row", "line", "chapter".
        number: from 1; 0 if the place has a name instead.
        name: for example the heading of a chapter.
        within: the larger place around it, such as "sheet Prices".
        counts_lines: the number is that of the first line, and each further line has the next number.
    """

    start: int
    unit: str
    number: int = 0
    name: str = ""
    within: str = ""
    counts_lines: bool = False


@dataclass(frozen=True, slots=True)
class Reading:
    """The text of one file, its own title, what the text lacks, and marks in ascending order."""

    text: str
    title: str = ""
    left_out: tuple[str, ...] = ()
    marks: tuple[Mark, ...] = ()


class TextBuilder:
    """Collects the text of a file piece by piece, and the marks in it."""

    def __init__(self) -> None:
        self.length = 0
        self._pieces: list[str] = []
        self._marks: list[Mark] = []

    def separate(self, separator: str = "\n\n") -> None:
        """Write ``separator`` unless there is no text yet."""
        if self.length:
            self.write(separator)

    def write(self, text: str) -> None:
        """Append a piece of text."""
        self._pieces.append(text)
        self.length += len(text)

    def mark(
        self, unit: str, number: int = 0, *, name: str = "", within: str = "", counts_lines: bool = False
    ) -> None:
        """Say at which place the next piece is."""
        self._marks.append(Mark(self.length, unit, number, name, within, counts_lines))

    def reading(self, title: str = "", left_out: tuple[str, ...] = ()) -> Reading:
        """Return everything that was written."""
        return Reading("".join(self._pieces), title, left_out, tuple(self._marks))


def short_name(text: str) -> str:
    """Return a heading in one line, shortened if it is long."""
    name = _SPACES.sub(" ", text[: 4 * MAX_NAME_CHARACTERS]).strip()
    return name if len(name) <= MAX_NAME_CHARACTERS else f"{name[: MAX_NAME_CHARACTERS - 1].rstrip()}…"


def one_line(text: str) -> str:
    """Return a text in one line, without spaces at its ends."""
    return _SPACES.sub(" ", text).strip()
