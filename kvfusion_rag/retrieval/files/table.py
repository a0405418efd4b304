"""Reads tables: each row becomes one line, with the names of the columns if the table has them.

A row is read without the others, so it repeats the names: ``Name: Ann | Age: 40``.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterable, Iterator, Sequence

from .reading import Reading, TextBuilder, one_line
from .text import decode

MAX_CELLS = 1_000_000
MAX_COLUMN_NAME = 40  # characters
MAX_TEXT = 32 * 2**20  # characters of all rows; cells may repeat one long text
SAMPLE_LINES = 20

_NUMBER = re.compile(r"[-+$€£]?\d[\d.,:/\s-]*%?$")


class RowWriter:
    """Writes the rows of one table. The first row with several texts, all of them different, names the columns.

    Args:
        within: the sheet of the table, in words, or an empty text.
        label: written in front of each row; empty for nothing.
    """

    def __init__(self, builder: TextBuilder, within: str = "", label: str = "") -> None:
        self._builder = builder
        self._within = within
        self._label = label
        self._names: dict[int, str] | None = None
        self._last_row = 0
        self.cells = 0

    def write(self, row: int, cells: Sequence[tuple[int, str]]) -> bool:
        """Write one row of (column, text) pairs. Return False if there is no room for more."""
        filled = [(column, text) for column, value in cells if (text := one_line(value))]
        self.cells += len(cells)
        if filled:
            self._write_line(row, filled)
        return self.cells <= MAX_CELLS and self._builder.length <= MAX_TEXT

    def _write_line(self, row: int, filled: list[tuple[int, str]]) -> None:
        names = self._names
        if names is None and len(filled) > 1:
            self._names = _column_names(filled)
        texts = [f"{names[column]}: {text}" if names and column in names else text for column, text in filled]
        if self._label:
            texts.insert(0, self._label)
        self._builder.separate("\n")
        if row != self._last_row + 1 or not self._last_row:
            self._builder.mark("row", row, within=self._within, counts_lines=True)
        self._last_row = row
        self._builder.write(" | ".join(texts))


def _column_names(filled: list[tuple[int, str]]) -> dict[int, str]:
    """Return the names of columns in a first row, or nothing if the row contains something else."""
    texts = {text for _, text in filled}
    is_header = len(texts) == len(filled) and not any(map(_NUMBER.match, texts))
    return {column: name for column, name in filled if len(name) <= MAX_COLUMN_NAME} if is_header else {}


def read_table(data: bytes) -> Reading:
    """Return a table of separated values, and marks of its rows. Quotes may contain separators and line ends."""
    decoded = decode(data)
    builder = TextBuilder()
    writer = RowWriter(builder)
    left_out: tuple[str, ...] = ()
    for number, cells in enumerate(_rows(decoded.text), start=1):
        if not writer.write(number, list(enumerate(cells))):
            left_out = (f"rows from {number + 1:,} on, beyond {MAX_CELLS:,} cells",)
            break
    return builder.reading("", (*decoded.note(), *left_out))


def _rows(text: str) -> Iterable[list[str]]:
    """Return the rows of a text. If its quotes are not those of a table, each line is a row."""
    separator = _separator(text)
    if separator is None:
        return ([line] for line in text.splitlines())
    try:
        for _ in csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True):
            pass
    except csv.Error:
        return _plain_rows(text, separator)
    return csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)


def _plain_rows(text: str, separator: str) -> Iterator[list[str]]:
    return (line.split(separator) for line in io.StringIO(text, newline=None))


def _separator(text: str) -> str | None:
    """Return the separator that most lines at the beginning have equally often, or None if there is none."""
    lines = [line for line in text[:100_000].splitlines()[:SAMPLE_LINES] if line.strip()]
    best, most = None, 0
    for separator in "\t;,|":
        counts = [line.count(separator) for line in lines]
        common = max(set(counts), key=counts.count, default=0)
        score = counts.count(common) * 1000 + min(common, 999) if common else sum(map(bool, counts))
        if score > most:
            best, most = separator, score
    return best
