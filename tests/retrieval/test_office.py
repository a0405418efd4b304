"""Word documents, presentations and workbooks: their words, in order, with their places, or a reason."""

from __future__ import annotations

import re
import zipfile
from pathlib import Path

import pytest
from made_files import (
    ENTITY_BOMB,
    HEADINGS,
    XML,
    cells,
    encrypted,
    paragraph,
    relations,
    row,
    slides,
    with_false_size,
    word,
    workbook,
    zipped,
)

from kvfusion_rag.retrieval import read_document
from kvfusion_rag.retrieval.loaders import UnreadableFileError
from kvfusion_rag.retrieval.places import name_places


def text_of(name: str, data: bytes) -> str:
    return read_document(Path(name), data).text


def places_of(name: str, data: bytes) -> list[tuple[str, str]]:
    """Return each line with its place."""
    loaded = read_document(Path(name), data)
    spans = [match.span() for match in re.finditer(r"[^\n]+", loaded.text)]
    return [
        (loaded.text[start:end], place)
        for (start, end), place in zip(spans, name_places(loaded.text, loaded.marks, spans), strict=True)
    ]


@pytest.mark.parametrize(
    ("body", "text"),
    [
        (paragraph("One & two") + paragraph("three"), "One & two\n\nthree"),
        (paragraph("Storm", "berschrift1") + paragraph("It fell."), "# Storm\n\nIt fell."),
        (paragraph("Storm", "Own"), "# Storm"),
        (f"<w:tbl>{row('a', 'b')}{row('c', 'd')}</w:tbl>{paragraph('e')}", "a | b\nc | d\n\ne"),
        (f"<w:tbl><w:tr><w:tc><w:tbl>{row('a', 'b')}</w:tbl></w:tc></w:tr></w:tbl>", "a | b"),
        ("<w:p><w:r><w:t>a</w:t><w:tab/><w:t>b</w:t><w:br/><w:t>c</w:t></w:r></w:p>", "a\tb\nc"),
        ("<w:p><w:pPr><w:numPr/></w:pPr><w:r><w:t>item</w:t></w:r></w:p>", "- item"),
        (
            "<w:p><w:ins><w:r><w:t>new</w:t></w:r></w:ins><w:del><w:r><w:delText>old</w:delText></w:r></w:del></w:p>",
            "new",
        ),
        ("<w:p><w:moveFrom><w:r><w:t>there</w:t></w:r></w:moveFrom><w:r><w:t>here</w:t></w:r></w:p>", "here"),
        (
            f"<mc:AlternateContent><mc:Choice>{paragraph('box')}</mc:Choice><mc:Fallback>{paragraph('box')}</mc:Fallback>"
            "</mc:AlternateContent>",
            "box",
        ),
        ("<w:p><w:r><w:instrText>PAGE</w:instrText><w:t>1874</w:t></w:r></w:p>", "1874"),
    ],
)
def test_word_document_has_its_visible_text(body, text):
    assert text_of("a.docx", word(body, styles=HEADINGS)) == text


def test_footnotes_and_title_of_a_word_document():
    data = word(paragraph("Text."), footnotes=f'<w:footnotes xmlns:w="w">{paragraph("A note.")}</w:footnotes>')
    assert text_of("a.docx", data) == "Text.\n\nA note."
    core = f'{XML}<c xmlns:dc="dc"><dc:title>Annual  report</dc:title></c>'
    document = f'{XML}<w:document xmlns:w="w">{paragraph("Text.")}</w:document>'
    data = zipped({"word/document.xml": document, "docProps/core.xml": core})
    assert read_document(Path("a.docx"), data).title == "Annual report"


def test_place_in_a_word_document_is_its_section():
    body = paragraph("Preface") + paragraph("Storm  damage", "berschrift1") + paragraph("It fell.")
    assert places_of("a.docx", word(body, styles=HEADINGS)) == [
        ("Preface", ""),
        ("# Storm damage", 'section "Storm damage"'),
        ("It fell.", 'section "Storm damage"'),
    ]


def test_slides_are_read_in_the_order_of_the_presentation_with_notes():
    data = slides(["Plan", "Build a pier"], ["Costs", "40 crowns", "paid"], notes={2: "ask Edda"})
    assert places_of("a.pptx", data) == [
        ("# Plan", "slide 1"),
        ("Build a pier", "slide 1"),
        ("# Costs", "slide 2"),
        ("40 crowns", "slide 2"),
        ("paid", "slide 2"),
        ("ask Edda", "slide 2"),
    ]
    assert read_document(Path("a.pptx"), data).title == "Plan"


def test_missing_slide_is_named():
    parts = {"ppt/presentation.xml": f'{XML}<p xmlns:r="r"><sldId id="1" r:id="r1"/><sldId id="2" r:id="r2"/></p>'}
    parts["ppt/_rels/presentation.xml.rels"] = relations("slides/none.xml", "slides/s.xml")
    parts["ppt/slides/s.xml"] = f'{XML}<s xmlns:a="a"><a:p><a:t>here</a:t></a:p></s>'
    loaded = read_document(Path("a.pptx"), zipped(parts))
    assert (loaded.text, loaded.left_out) == ("here", ("slides that are missing (1, the first is 1)",))


DATES = '<numFmt numFmtId="164" formatCode="dd/mm/yy"/><numFmt numFmtId="165" formatCode="&quot;d&quot;0.0"/>'
STYLES = DATES + "<cellXfs>" + "".join(f'<xf numFmtId="{n}"/>' for n in (0, 14, 164, 165, 20)) + "</cellXfs>"


@pytest.mark.parametrize(
    ("cell", "shown"),
    [
        ("<c><v>0.30000000000000004</v></c>", "0.3"),
        ("<c><v>1874</v></c>", "1874"),
        ('<c t="b"><v>1</v></c>', "TRUE"),
        ('<c t="e"><v>#DIV/0!</v></c>', "#DIV/0!"),
        ('<c t="s"><v>1</v></c>', "second"),
        ('<c t="str"><f>A1</f><v>of a formula</v></c>', "of a formula"),
        ('<c t="inlineStr"><is><r><t>rich </t></r><r><t>text</t></r><rPh><t>no</t></rPh></is></c>', "rich text"),
        ('<c s="1"><v>4080</v></c>', "1911-03-03"),
        ('<c s="2"><v>45000.5</v></c>', "2023-03-15 12:00"),
        ('<c s="3"><v>4</v></c>', "4"),
        ('<c s="4"><v>0.25</v></c>', "06:00"),
        ('<c s="1"><v>1e300</v></c>', "1e300"),
        ('<c s="1"><v>nan</v></c>', "nan"),
    ],
)
def test_cells_are_shown_as_in_the_sheet(cell, shown):
    assert text_of("a.xlsx", workbook({"S": f"<row>{cell}</row>"}, ["first", "second"], STYLES)) == shown


@pytest.mark.parametrize("cell", ['<c t="s"><v>7</v></c>', '<c t="s"><v>-1</v></c>', '<c t="s"><v>x</v></c>', "<c/>"])
def test_cells_without_a_value_are_empty(cell):
    data = workbook({"S": f"<row>{cell}</row>{cells(2, 'x')}"}, ["first", "second"])
    assert text_of("a.xlsx", data) == "x"


def test_rows_have_the_names_of_columns_and_their_own_numbers():
    prices = cells(1, "Item", "Price") + cells(2, "Oil", 4.5) + cells(40, "Wick", 2)
    assert places_of("a.xlsx", workbook({"Prices": prices})) == [
        ("Item | Price", "sheet Prices, row 1"),
        ("Item: Oil | Price: 4.5", "sheet Prices, row 2"),
        ("Item: Wick | Price: 2", "sheet Prices, row 40"),
    ]
    lines = places_of("a.xlsx", workbook({"1911": prices, "1912": cells(7, "Rope", 3)}))
    assert lines[1] == ("1911 | Item: Oil | Price: 4.5", "sheet 1911, row 2")
    assert lines[-1] == ("1912 | Rope | 3", "sheet 1912, row 7")


def test_dates_of_old_macs():
    data = workbook(
        {"S": '<row><c s="1"><v>0</v></c><c s="1"><v>366</v></c></row>'}, (), STYLES, '<workbookPr date1904="1"/>'
    )
    assert text_of("a.xlsx", data).endswith("1905-01-01")


def test_cells_at_the_far_end_cost_nothing():
    rows = "".join(f'<row r="{n}"><c r="XFD{n}"><v>{n}</v></c></row>' for n in (1, 500_000, 1_048_576))
    assert places_of("a.xlsx", workbook({"S": rows}))[-1] == ("1048576", "sheet S, row 1048576")


def test_numbers_of_rows_that_cannot_be_are_ignored():
    rows = '<row r="99999999999999999999"><c r="ZZZZZ9"><v>1</v></c></row><row r="x"><c r=""><v>2</v></c></row>'
    assert [place for _, place in places_of("a.xlsx", workbook({"S": rows}))] == ["sheet S, row 1", "sheet S, row 2"]


def test_cells_beyond_the_limit_are_left_out(monkeypatch):
    monkeypatch.setattr("kvfusion_rag.retrieval.files.table.MAX_CELLS", 4)
    data = workbook({"A": "".join(cells(n, n, n) for n in range(1, 5)), "B": cells(1, 9)})
    loaded = read_document(Path("a.xlsx"), data)
    assert loaded.text.splitlines()[-1] == "A | 3 | 3"
    assert loaded.left_out[0].startswith("the sheet 'A' from row 4 on")


def test_one_long_text_in_many_cells_is_bounded(monkeypatch):
    monkeypatch.setattr("kvfusion_rag.retrieval.files.table.MAX_TEXT", 1_000_000)
    rows = '<row><c t="s"><v>0</v></c></row>' * 1000
    loaded = read_document(Path("a.xlsx"), workbook({"S": rows}, ["long " * 6_000]))
    assert len(loaded.text) < 1_100_000 and "from row" in loaded.left_out[0]


BODY = word(paragraph("Text."))


@pytest.mark.parametrize(
    ("name", "data", "reason"),
    [
        ("a.docx", b"text", "not a complete zip file"),
        ("a.docx", BODY[:-30], "not a complete zip file"),
        ("a.docx", b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + bytes(600), "protected by a password, or in an old format"),
        ("a.docx", workbook({"S": cells(1, 1)}), "not a Word document"),
        ("a.xlsx", BODY, "not an Excel workbook"),
        ("a.pptx", BODY, "not a PowerPoint presentation"),
        ("a.docx", word(""), "contains no text"),
        ("a.docx", word("<w:p>"), "its XML is damaged: mismatched tag"),
        ("a.docx", encrypted(BODY), "protected by a password"),
        ("a.docx", with_false_size(BODY, 20), "is damaged or has a false size"),
        ("a.docx", with_false_size(BODY, 2**31), "unpacks to more than the limit"),
        ("a.docx", word(paragraph(" " * 70_000_000)), "unpacks to more than the limit"),
        ("a.docx", zipped({"word/document.xml": f"{XML}{ENTITY_BOMB}<a>&b;</a>"}), "has a DOCTYPE"),
        ("a.xlsx", zipped({"xl/workbook.xml": f"{XML}{ENTITY_BOMB}<a>&b;</a>"}), "has a DOCTYPE"),
        ("a.docx", zipped({"word/document.xml": "<a/>"}, zipfile.ZIP_BZIP2), "compressed with an unsupported method"),
        ("a.docx", zipped({f"{n}": "" for n in range(10_001)}), "has more than 10,000 parts"),
    ],
    ids=range(16),
)
def test_hostile_office_file_has_a_reason(name, data, reason):
    with pytest.raises(UnreadableFileError, match=re.escape(reason)):
        read_document(Path(name), data)


@pytest.mark.parametrize("tag", ["tbl><w:tr><w:tc", "p", "sp"])
def test_deep_nesting_is_read(tag):
    opened = f"<w:{tag}>" * 20_000
    closed = "".join(f"</w:{one}>" for one in reversed(tag.replace("w:", "").split("><"))) * 20_000
    assert "core" in text_of("a.docx", word(opened + paragraph("core") + closed))
