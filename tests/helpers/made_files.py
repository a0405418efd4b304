"""Small files of each kind, made in memory: as programs write them, and as an attacker would."""

from __future__ import annotations

import gzip
import io
import json
import struct
import zipfile
from collections.abc import Mapping, Sequence
from xml.sax.saxutils import escape, quoteattr

XML = '<?xml version="1.0" encoding="UTF-8"?>'
ENTITY_BOMB = '<!DOCTYPE a [<!ENTITY a "ha"><!ENTITY b "&a;&a;&a;&a;">]>'
_RELATIONS = "http://schemas.openxmlformats.org/officeDocument/2006/relationships"


def zipped(parts: Mapping[str, str | bytes], method: int = zipfile.ZIP_DEFLATED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive:
        for name, content in parts.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def with_false_size(data: bytes, size: int) -> bytes:
    """Return a zip file that declares another unpacked size for its first part, in both places."""
    changed = bytearray(data)
    for mark, offset in ((b"PK\x03\x04", 22), (b"PK\x01\x02", 24)):
        struct.pack_into("<I", changed, data.index(mark) + offset, size)
    return bytes(changed)


def encrypted(data: bytes) -> bytes:
    """Return a zip file whose first part is marked as encrypted."""
    changed = bytearray(data)
    for mark, offset in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        changed[data.index(mark) + offset] |= 1
    return bytes(changed)


def relations(*targets: str) -> str:
    links = "".join(f'<Relationship Id="r{n}" Target="{target}"/>' for n, target in enumerate(targets, start=1))
    return f"{XML}<Relationships>{links}</Relationships>"


def paragraph(text: str, style: str = "", tag: str = "w") -> str:
    properties = f'<{tag}:pPr><{tag}:pStyle {tag}:val="{style}"/></{tag}:pPr>' if style else ""
    return f"<{tag}:p>{properties}<{tag}:r><{tag}:t>{escape(text)}</{tag}:t></{tag}:r></{tag}:p>"


def row(*cells: str, tag: str = "w") -> str:
    return f"<{tag}:tr>{''.join(f'<{tag}:tc>{paragraph(cell, tag=tag)}</{tag}:tc>' for cell in cells)}</{tag}:tr>"


def word(body: str, **parts: str) -> bytes:
    """Return a Word document. ``parts`` are other XML files in its folder, such as ``styles``."""
    return zipped(
        {
            "word/document.xml": f'{XML}<w:document xmlns:w="w"><w:body>{body}</w:body></w:document>',
            **{f"word/{name}.xml": f"{XML}{content}" for name, content in parts.items()},
        }
    )


HEADINGS = (
    '<w:styles xmlns:w="w"><w:style w:styleId="berschrift1"><w:name w:val="heading 1"/></w:style>'
    '<w:style w:styleId="Own"><w:name w:val="Own"/><w:basedOn w:val="berschrift1"/></w:style></w:styles>'
)


def slides(*texts: Sequence[str], notes: Mapping[int, str] | None = None) -> bytes:
    """Return a presentation. The first text of each slide is its title. ``notes`` are by number from 1."""
    parts: dict[str, str] = {}
    for number, (title, *points) in enumerate(texts, start=1):
        name = f"ppt/slides/slide{number}.xml"
        body = "".join(f"<a:p><a:r><a:t>{escape(point)}</a:t></a:r></a:p>" for point in points)
        parts[name] = (
            f'{XML}<p:sld xmlns:p="p" xmlns:a="a"><p:sp><p:nvPr><p:ph type="title"/></p:nvPr><a:p><a:t>{escape(title)}'
            f'</a:t></a:p></p:sp><p:sp>{body}</p:sp><p:sp><p:ph type="sldNum"/><a:p><a:t>{number}</a:t></a:p></p:sp>'
            "</p:sld>"
        )
        if notes and number in notes:
            parts[f"ppt/slides/_rels/slide{number}.xml.rels"] = relations(f"../notesSlides/notesSlide{number}.xml")
            note = f'{XML}<p:notes xmlns:p="p" xmlns:a="a"><a:p><a:t>{escape(notes[number])}</a:t></a:p></p:notes>'
            parts[f"ppt/notesSlides/notesSlide{number}.xml"] = note
    ids = "".join(f'<p:sldId id="{255 + n}" r:id="r{n}"/>' for n in range(1, len(texts) + 1))
    return zipped(
        {
            "ppt/presentation.xml": f'{XML}<p:presentation xmlns:p="p" xmlns:r="{_RELATIONS}">{ids}</p:presentation>',
            "ppt/_rels/presentation.xml.rels": relations(*(f"slides/slide{n + 1}.xml" for n in range(len(texts)))),
            **parts,
        }
    )


def workbook(sheets: Mapping[str, str], strings: Sequence[str] = (), formats: str = "", properties: str = "") -> bytes:
    """Return a workbook. ``sheets`` are the rows of each sheet in XML, and ``formats`` the cell styles."""
    names = "".join(f'<sheet name={quoteattr(name)} r:id="r{n}"/>' for n, name in enumerate(sheets, start=1))
    parts = {
        f"xl/worksheets/sheet{n}.xml": f"{XML}<worksheet><sheetData>{rows}</sheetData></worksheet>"
        for n, rows in enumerate(sheets.values(), start=1)
    }
    texts = "".join(f"<si><t>{escape(text)}</t></si>" for text in strings)
    return zipped(
        {
            "xl/workbook.xml": f'{XML}<workbook xmlns:r="r">{properties}<sheets>{names}</sheets></workbook>',
            "xl/_rels/workbook.xml.rels": relations(*(f"/{name}" for name in parts)),
            "xl/sharedStrings.xml": f"{XML}<sst>{texts}</sst>",
            "xl/styles.xml": f"{XML}<styleSheet>{formats}</styleSheet>",
            **parts,
        }
    )


def cells(number: int, *values: str | float) -> str:
    """Return a row of a sheet with texts and numbers from column A on."""
    shown = (
        f"<c><v>{value}</v></c>"
        if not isinstance(value, str)
        else f'<c t="inlineStr"><is><t>{escape(value)}</t></is></c>'
        for value in values
    )
    return f'<row r="{number}">{"".join(shown)}</row>'


def book(*chapters: str, title: str = "The Lamp", **parts: str) -> bytes:
    """Return a book of chapters in HTML. ``parts`` are files in ``META-INF``, such as ``encryption``."""
    items = "".join(
        f'<item id="c{n}" href="text/chapter%20{n}.xhtml" media-type="application/xhtml+xml"/>'
        for n in range(1, len(chapters) + 1)
    )
    order = "".join(f'<itemref idref="c{n}"/>' for n in range(1, len(chapters) + 1))
    return zipped(
        {
            "mimetype": "application/epub+zip",
            "META-INF/container.xml": f'{XML}<container><rootfile full-path="OEBPS/content.xml"/></container>',
            "OEBPS/content.xml": f"{XML}<package><dc:title>{escape(title)}</dc:title>{items}{order}</package>",
            **{f"META-INF/{name}.xml": f"{XML}{content}" for name, content in parts.items()},
            **{
                f"OEBPS/text/chapter {n}.xhtml": f"<!DOCTYPE html><title>{title}</title><body>{text}</body>"
                for n, text in enumerate(chapters, start=1)
            },
        }
    )


def notebook(*made: dict[str, object]) -> bytes:
    return json.dumps({"cells": list(made), "nbformat": 4, "metadata": {}}).encode()


def code_cell(source: str, *outputs: dict[str, object]) -> dict[str, object]:
    return {"cell_type": "code", "source": source.splitlines(keepends=True), "outputs": list(outputs)}


def text_cell(source: str) -> dict[str, object]:
    return {"cell_type": "markdown", "source": source}


MAIL = b"""From: =?utf-8?q?Edda_M=C3=A4rsh?= <edda@harrow.example>
To: keeper@harrow.example
Date: Mon, 4 Mar 1911 08:00:00 +0000
Subject: =?utf-8?b?VGhlIMO2bGQgbGFtcA==?=
MIME-Version: 1.0
Content-Type: multipart/mixed; boundary="b"

--b
Content-Type: multipart/alternative; boundary="c"

--c
Content-Type: text/plain; charset=iso-8859-1
Content-Transfer-Encoding: quoted-printable

The l=E4mp is lit at six.
--c
Content-Type: text/html; charset=utf-8

<p>The lamp is lit at <b>six</b>.</p>
--c--
--b
Content-Type: application/pdf
Content-Disposition: attachment; filename="plan.pdf"
Content-Transfer-Encoding: base64

JVBERi0=
--b
Content-Type: message/rfc822

From: keeper@harrow.example
Subject: Oil

The oil is in the cellar.
--b--
"""

EXAMPLES: dict[str, bytes] = {
    "a.docx": word(paragraph("Storm", "berschrift1") + paragraph("The pier fell.") + row("a", "b"), styles=HEADINGS),
    "a.pptx": slides(["Plan", "Build a pier"], ["Costs", "40 crowns"], notes={2: "ask Edda"}),
    "a.xlsx": workbook({"Prices": cells(1, "Item", "Price") + cells(2, "Oil", 4.5)}, ["x"]),
    "a.csv": b"name;age\nAnn;40\nBo;41\n",
    "a.epub": book("<h1>One</h1><p>It rains.</p>", "<p>It snows.</p>"),
    "a.eml": MAIL,
    "a.ipynb": notebook(text_cell("# Lamps\n\nA study."), code_cell("x = 1\nx", {"text": ["1"]})),
    "a.py": b"def f(x):\n    return x\n",
    "a.txt.gz": gzip.compress(b"The lamp is lit at six.", mtime=0),
}
