"""Reads Word documents and PowerPoint presentations.

Both write paragraphs ``p`` of texts ``t``, and tables of rows ``tr`` and cells ``tc``. Headings become those of
Markdown, and rows become lines. Deleted text, and the second version of a drawing for old programs, are left out.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from .archive import Archive, attribute, parse_xml, relation_id
from .reading import Reading, TextBuilder, UnreadableFileError, one_line, short_name

DOCUMENT_PART = "word/document.xml"
PRESENTATION_PART = "ppt/presentation.xml"
MAX_NESTED_TABLES = 10  # deeper ones are read as paragraphs, because each level copies its text
MAX_HEADING_LEVEL = 6

_SPACES = {"tab": "\t", "br": "\n", "cr": "\n", "noBreakHyphen": "-"}
_IGNORED = frozenset({"Fallback", "del", "moveFrom"})
_TITLES = frozenset({"title", "ctrTitle"})
_FURNITURE = frozenset({"dt", "ftr", "hdr", "sldImg", "sldNum"})  # date, footer and number of a slide
_HEADING = re.compile(r"heading ([1-9])$", re.IGNORECASE)


@dataclass(slots=True)
class _Paragraph:
    pieces: list[str] = field(default_factory=list)
    level: int = 0  # heading level
    is_item: bool = False


@dataclass(slots=True)
class _Cells:
    """An open row: the texts of its finished cells, and the paragraphs of the open one."""

    finished: list[str] = field(default_factory=list)
    open_cell: list[str] = field(default_factory=list)


class _Flow:
    """Turns the tags of one part into blocks of text.

    Args:
        add: receives each block, the level of its heading or 0, and whether it is a row of a table.
        levels: the level of each style of headings.
    """

    def __init__(self, add: Callable[[str, int, bool], object], levels: Mapping[str, int]) -> None:
        self._add = add
        self._levels = levels
        self._paragraphs: list[_Paragraph] = []
        self._rows: list[_Cells | None] = []  # None for rows that are nested too deeply
        self._ignored = 0  # open tags whose content is left out
        self._in_text = 0
        self._shape = ""  # role of the open shape of a slide

    def start(self, tag: str, attributes: Mapping[str, str]) -> None:
        if tag in _IGNORED:
            self._ignored += 1
        elif tag == "p":
            self._paragraphs.append(_Paragraph(level=int(self._shape in _TITLES)))
        elif tag == "t":
            self._in_text += 1
        elif tag == "tr":
            self._rows.append(_Cells() if len(self._rows) < MAX_NESTED_TABLES else None)
        elif tag == "sp":
            self._shape = ""
        elif tag == "ph":
            self._shape = attribute(attributes, "type")
        elif self._paragraphs:
            paragraph = self._paragraphs[-1]
            if tag in _SPACES:
                paragraph.pieces.append(_SPACES[tag])
            elif tag == "pStyle":
                paragraph.level = self._levels.get(attribute(attributes, "val"), 0)
            elif tag == "numPr":
                paragraph.is_item = True

    def end(self, tag: str) -> None:
        if tag in _IGNORED:
            self._ignored -= 1
        elif tag == "p":
            self._finish_paragraph(self._paragraphs.pop())
        elif tag == "t":
            self._in_text -= 1
        elif tag == "sp":
            self._shape = ""
        elif tag == "tc" and self._rows and self._rows[-1] is not None:
            row = self._rows[-1]
            row.finished.append(" ".join(row.open_cell))
            row.open_cell = []
        elif tag == "tr":
            row = self._rows.pop()
            if row is not None and any(row.finished):
                self._block(" | ".join(row.finished), 0, is_row=True)

    def text(self, text: str) -> None:
        if self._in_text and self._paragraphs and not self._ignored and self._shape not in _FURNITURE:
            self._paragraphs[-1].pieces.append(text)

    def _finish_paragraph(self, paragraph: _Paragraph) -> None:
        text = "".join(paragraph.pieces).strip()
        if not text:
            return
        if paragraph.level:
            text = one_line(text)
        self._block(f"- {text}" if paragraph.is_item and not paragraph.level else text, paragraph.level, is_row=False)

    def _block(self, text: str, level: int, *, is_row: bool) -> None:
        row = next((row for row in reversed(self._rows[: MAX_NESTED_TABLES + 1]) if row is not None), None)
        if row is None:
            self._add(text, level, is_row)
        else:
            row.open_cell.append(one_line(text))


def read_word(data: bytes) -> Reading:
    """Return the text of a Word document with its footnotes, and marks of its sections."""
    archive = Archive(data)
    if DOCUMENT_PART not in archive:
        raise UnreadableFileError("not a Word document")
    builder = TextBuilder()
    was_row = False

    def add(text: str, level: int, is_row: bool) -> None:
        nonlocal was_row
        builder.separate("\n" if is_row and was_row else "\n\n")
        was_row = is_row
        if level:
            builder.mark("section", name=short_name(text))
        builder.write(f"{'#' * level} {text}" if level else text)

    levels = _heading_levels(archive)
    for part in (DOCUMENT_PART, "word/footnotes.xml", "word/endnotes.xml"):
        if part in archive:
            flow = _Flow(add, levels)
            parse_xml(archive.read(part), flow.start, flow.end, flow.text)
    return builder.reading(_core_title(archive))


def _heading_levels(archive: Archive) -> dict[str, int]:
    """Return the level of each style of headings. Their names are English in every language."""
    levels: dict[str, int] = {}
    style = ""

    def start(tag: str, attributes: Mapping[str, str]) -> None:
        nonlocal style
        value = attribute(attributes, "val")
        if tag == "style":
            style = attribute(attributes, "styleId")
        elif tag == "name" and (match := _HEADING.match(value)):
            levels[style] = min(int(match[1]), MAX_HEADING_LEVEL)
        elif tag == "name" and value.lower() == "title":
            levels[style] = 1
        elif tag == "outlineLvl" and value in ("0", "1", "2", "3", "4", "5"):
            levels.setdefault(style, int(value) + 1)
        elif tag == "basedOn" and value in levels:
            levels.setdefault(style, levels[value])

    if "word/styles.xml" in archive:
        parse_xml(archive.read("word/styles.xml"), start)
    return levels


def read_slides(data: bytes) -> Reading:
    """Return the text of a presentation with the speaker's notes, and a mark of each slide."""
    archive = Archive(data)
    if PRESENTATION_PART not in archive:
        raise UnreadableFileError("not a PowerPoint presentation")
    ids: list[str] = []
    parse_xml(
        archive.read(PRESENTATION_PART),
        lambda tag, attributes: ids.append(relation_id(attributes)) if tag == "sldId" else None,
    )
    parts = archive.relations(PRESENTATION_PART)
    builder = TextBuilder()
    title = ""
    missing: list[int] = []
    for number, name in enumerate((parts.get(one, "") for one in ids), start=1):
        if name not in archive:
            missing.append(number)
            continue
        slide = _SlideText()
        slide.read(archive, name)
        for note in (part for part in archive.relations(name).values() if "notesSlide" in part and part in archive):
            slide.read(archive, note)
        title = title or slide.title
        builder.separate()
        builder.mark("slide", number)
        builder.write("\n\n".join(slide.blocks))
    left_out = (f"slides that are missing ({len(missing)}, the first is {missing[0]})",) if missing else ()
    return builder.reading(_core_title(archive) or title, left_out)


class _SlideText:
    """The blocks of one slide, and its title."""

    def __init__(self) -> None:
        self.blocks: list[str] = []
        self.title = ""
        self._was_row = False

    def read(self, archive: Archive, name: str) -> None:
        flow = _Flow(self._add, {})
        parse_xml(archive.read(name), flow.start, flow.end, flow.text)

    def _add(self, text: str, level: int, is_row: bool) -> None:
        if level and not self.title:
            self.title = text
        if is_row and self._was_row:
            self.blocks[-1] += f"\n{text}"
        else:
            self.blocks.append(f"# {text}" if level else text)
        self._was_row = is_row


def _core_title(archive: Archive) -> str:
    """Return the title among the properties of an Office file."""
    pieces: list[str] = []
    open_titles = 0

    def start(tag: str, attributes: Mapping[str, str]) -> None:
        nonlocal open_titles
        open_titles += tag == "title"

    def end(tag: str) -> None:
        nonlocal open_titles
        open_titles -= tag == "title"

    if "docProps/core.xml" in archive:
        parse_xml(
            archive.read("docProps/core.xml"), start, end, lambda text: pieces.append(text) if open_titles else 0
        )
    title = one_line("".join(pieces))
    return "" if title.lower() in ("powerpoint presentation", "word document") else title
