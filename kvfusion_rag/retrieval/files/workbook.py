"""Reads Excel workbooks: the values of all sheets, as they were when the file was saved.

Only cells that are in the file cost time. (Libraries that return whole rows also visit the empty cells in front of a
cell at the far end of a sheet.)
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextlib import suppress
from datetime import datetime, timedelta

from .archive import Archive, attribute, parse_xml, relation_id
from .reading import Reading, TextBuilder, UnreadableFileError, short_name
from .table import MAX_CELLS, RowWriter

WORKBOOK_PART = "xl/workbook.xml"
STRINGS_PART = "xl/sharedStrings.xml"
STYLES_PART = "xl/styles.xml"
MAX_ROW = 1_048_576
MAX_COLUMN = 16_384
MAX_CELL = 32_767  # characters, Excel's own limit
MAX_STYLE = 100_000

_REFERENCE = re.compile(r"([A-Z]{1,3})([0-9]{1,7})$")
_DATE_FORMATS = frozenset({*range(14, 23), *range(27, 37), *range(45, 48), *range(50, 59)})  # built into Excel
_QUOTED = re.compile(r'"[^"]*"|\[[^\]]*\]|\\.')
_DATE_SIGN = re.compile(r"[dmyhs]", re.IGNORECASE)
_EPOCH = datetime(1899, 12, 30)
_EPOCH_OF_1904 = datetime(1904, 1, 1)


class _EndOfSheetError(Exception):
    """There is no room for more rows."""


class _Sheet:
    """Turns the tags of one sheet into rows."""

    def __init__(self, writer: RowWriter, strings: list[str], dates: set[int], epoch: datetime) -> None:
        self._writer = writer
        self._strings = strings
        self._dates = dates
        self._epoch = epoch
        self.row = 0
        self._column = 0
        self._cells: list[tuple[int, str]] = []
        self._kind = ""
        self._style = ""
        self._value: list[str] = []
        self._in_value = 0
        self._in_phonetic = 0

    def start(self, tag: str, attributes: Mapping[str, str]) -> None:
        if tag == "row":
            self.row = _number(attribute(attributes, "r"), MAX_ROW) or self.row + 1
            self._column = 0
            self._cells = []
        elif tag == "c":
            self._column = _column(attribute(attributes, "r")) or self._column + 1
            self._kind = attribute(attributes, "t")
            self._style = attribute(attributes, "s")
            self._value = []
        elif tag in ("v", "t"):
            self._in_value += 1
        elif tag == "rPh":
            self._in_phonetic += 1

    def end(self, tag: str) -> None:
        if tag == "row":
            if not self._writer.write(self.row, self._cells):
                raise _EndOfSheetError
        elif tag == "c":
            value = "".join(self._value)
            if value:
                self._cells.append((self._column, self._shown(value)[:MAX_CELL]))
        elif tag in ("v", "t"):
            self._in_value -= 1
        elif tag == "rPh":
            self._in_phonetic -= 1

    def text(self, text: str) -> None:
        if self._in_value and not self._in_phonetic:
            self._value.append(text)

    def _shown(self, value: str) -> str:
        """Return a value as a reader of the sheet would write it."""
        if self._kind == "s":
            number = _number(value.strip(), len(self._strings) - 1, least=0)
            return "" if number is None else self._strings[number]
        if self._kind == "b":
            return {"1": "TRUE", "0": "FALSE"}.get(value.strip(), value)
        if self._kind in ("", "n"):
            with suppress(ValueError, OverflowError):
                amount = float(value)
                is_date = (_number(self._style, MAX_STYLE, least=0) or 0) in self._dates
                return self._date(amount) if is_date else format(amount, ".15g")
        return value

    def _date(self, days: float) -> str:
        moment = self._epoch + timedelta(seconds=round(days * 86_400))
        if 0 <= days < 1:
            return moment.strftime("%H:%M")
        return moment.strftime("%Y-%m-%d" if moment.hour == moment.minute == moment.second == 0 else "%Y-%m-%d %H:%M")


def read_workbook(data: bytes) -> Reading:
    """Return all rows of all sheets, and marks of them."""
    archive = Archive(data)
    if WORKBOOK_PART not in archive:
        raise UnreadableFileError("not an Excel workbook")
    sheets: list[tuple[str, str]] = []
    epoch = _EPOCH

    def start(tag: str, attributes: Mapping[str, str]) -> None:
        nonlocal epoch
        if tag == "sheet":
            sheets.append((short_name(attribute(attributes, "name")), relation_id(attributes)))
        elif tag == "workbookPr" and attribute(attributes, "date1904") in ("1", "true"):
            epoch = _EPOCH_OF_1904

    parse_xml(archive.read(WORKBOOK_PART), start)
    parts = archive.relations(WORKBOOK_PART)
    strings = _shared_strings(archive)
    dates = _date_styles(archive)
    builder = TextBuilder()
    left_out: list[str] = []
    cells = 0
    for name, relation in sheets:
        part = parts.get(relation, "")
        if part not in archive:
            left_out.append(f"the sheet {name!r}, which is missing")
            continue
        writer = RowWriter(builder, f"sheet {name}", name if len(sheets) > 1 else "")
        writer.cells = cells
        sheet = _Sheet(writer, strings, dates, epoch)
        try:
            parse_xml(archive.read(part), sheet.start, sheet.end, sheet.text)
        except _EndOfSheetError:
            left_out.append(f"the sheet {name!r} from row {sheet.row + 1:,} on, beyond {MAX_CELLS:,} cells")
            break
        cells = writer.cells
    return builder.reading("", tuple(left_out))


def _shared_strings(archive: Archive) -> list[str]:
    """Return the texts to which cells refer by number."""
    strings: list[str] = []
    pieces: list[str] = []
    open_texts = open_phonetics = 0

    def start(tag: str, attributes: Mapping[str, str]) -> None:
        nonlocal open_texts, open_phonetics
        open_texts += tag == "t"
        open_phonetics += tag == "rPh"

    def end(tag: str) -> None:
        nonlocal open_texts, open_phonetics
        open_texts -= tag == "t"
        open_phonetics -= tag == "rPh"
        if tag == "si":
            strings.append("".join(pieces)[:MAX_CELL])
            pieces.clear()

    def text(text: str) -> None:
        if open_texts and not open_phonetics:
            pieces.append(text)

    if STRINGS_PART in archive:
        parse_xml(archive.read(STRINGS_PART), start, end, text)
    return strings


def _date_styles(archive: Archive) -> set[int]:
    """Return the numbers of the cell styles that show numbers as dates."""
    formats = set(_DATE_FORMATS)
    styles: list[int] = []
    is_open = False  # inside the list of cell styles

    def start(tag: str, attributes: Mapping[str, str]) -> None:
        nonlocal is_open
        identity = _number(attribute(attributes, "numFmtId"), MAX_STYLE) or 0
        if tag == "numFmt" and _DATE_SIGN.search(_QUOTED.sub("", attribute(attributes, "formatCode"))):
            formats.add(identity)
        elif tag == "cellXfs":
            is_open = True
        elif tag == "xf" and is_open:
            styles.append(identity)

    def end(tag: str) -> None:
        nonlocal is_open
        is_open = is_open and tag != "cellXfs"

    if STYLES_PART in archive:
        parse_xml(archive.read(STYLES_PART), start, end)
    return {number for number, one in enumerate(styles) if one in formats}


def _number(text: str, most: int, least: int = 1) -> int | None:
    """Return a whole number from ``least`` to ``most``, or None."""
    number = int(text) if text.isascii() and text.isdigit() and len(text) < 10 else -1
    return number if least <= number <= most else None


def _column(reference: str) -> int | None:
    """Return the number of the column of a cell, such as 2 for "B7"."""
    match = _REFERENCE.match(reference)
    if match is None:
        return None
    number = 0
    for letter in match[1]:
        number = 26 * number + ord(letter) - 64
    return number if number <= MAX_COLUMN else None
