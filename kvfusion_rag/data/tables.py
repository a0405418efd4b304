"""Reads tables of tab-separated values, whatever their quotes mean.

Some programs put cells with quotes, tabs or line breaks into quotes and double the quotes inside, and others write
cells as they are. So a line is a row if it has the number of cells of the header, and a cell loses its quotes only if
it needed them. A cell with an unbalanced quote never swallows the rows after it.
"""

from __future__ import annotations

import csv
import itertools
import re
from collections.abc import Iterable, Iterator

from ..errors import InvalidInputError

MAX_ROW_LINES = 200  # lines of one row, if its quoted cells contain line breaks

_QUOTED = re.compile(r'"((?:[^"]|"")*+)"')


def read_table(lines: Iterable[str], name: str) -> Iterator[tuple[dict[str, str], int]]:
    """Yield each row by the names in the header, and the number of its last line. Missing cells are left out.

    Raises:
        InvalidInputError: a row has more cells than the header. Names ``name`` and the line.
    """
    numbered = enumerate((line.rstrip("\r\n") for line in lines), start=1)
    header_line = next((line for _, line in numbered if line.strip()), "")
    header = header_line.split("\t")
    quotes_all = all(_QUOTED.fullmatch(cell) for cell in header)
    header = [_unquoted(cell, quotes_all) for cell in header]
    ahead: list[tuple[int, str]] = []
    while True:
        number, line = ahead.pop(0) if ahead else next(numbered, (0, ""))
        if not number:
            return
        if not line.strip():
            continue
        cells = line.split("\t")
        if len(cells) != len(header) and '"' in line:
            joined = _quoted_row(line, len(header), ahead, numbered)
            if joined is not None:
                cells, count = joined
                number = ahead[count - 1][0] if count else number
                del ahead[:count]
                yield dict(zip(header, cells, strict=True)), number
                continue
        while len(cells) > len(header) and not cells[-1]:
            cells.pop()
        if len(cells) > len(header):
            raise InvalidInputError(f"{name}, line {number} has {len(cells)} cells, but the header has {len(header)}.")
        yield {key: _unquoted(cell, quotes_all) for key, cell in zip(header, cells, strict=False)}, number


def _quoted_row(
    line: str, width: int, ahead: list[tuple[int, str]], numbered: Iterator[tuple[int, str]]
) -> tuple[list[str], int] | None:
    """Return the cells of a row with tabs or line breaks in quotes, and how many lines of ``ahead`` belong to it.

    Return ``None`` if the line is no such row. A row ends with the first line after which quotes are balanced.
    """
    parts = [line]
    quotes = line.count('"')
    count = 0
    while quotes % 2:
        if count == MAX_ROW_LINES:
            return None
        if count == len(ahead):
            ahead.extend(itertools.islice(numbered, 1))
        if count == len(ahead):
            return None
        part = ahead[count][1]
        parts.append(part)
        quotes += part.count('"')
        count += 1
    text = "\n".join(parts)
    if len(text) >= csv.field_size_limit():
        return None
    try:
        rows = list(csv.reader([text], delimiter="\t", strict=True))
    except csv.Error:
        return None
    return (rows[0], count) if len(rows) == 1 and len(rows[0]) == width else None


def _unquoted(cell: str, quotes_all: bool) -> str:
    """Return the content of a cell that had to be quoted, or the cell unchanged."""
    match = _QUOTED.fullmatch(cell)
    if match is None or not (quotes_all or '""' in match[1]):
        return cell
    return match[1].replace('""', '"')
