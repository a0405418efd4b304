"""E-books, mails, notebooks, source code and compressed texts: their words and places, or a reason."""

from __future__ import annotations

import gzip
import json
import re
from pathlib import Path

import pytest
from indexes import count_words
from made_files import ENTITY_BOMB, EXAMPLES, MAIL, XML, book, code_cell, notebook, text_cell, zipped

from kvfusion_rag.retrieval import read_document
from kvfusion_rag.retrieval.loaders import MAX_FILE_BYTES, UnreadableFileError
from kvfusion_rag.retrieval.places import name_places
from kvfusion_rag.retrieval.splitting import split_text


def places_of(name: str, data: bytes) -> list[tuple[str, str]]:
    loaded = read_document(Path(name), data)
    spans = [match.span() for match in re.finditer(r"[^\n]+", loaded.text)]
    lines = [loaded.text[start:end] for start, end in spans]
    return list(zip(lines, name_places(loaded.text, loaded.marks, spans), strict=True))


def test_chapters_are_read_in_order_and_named_by_their_headings():
    data = book("<h1>The   <i>storm</i></h1><p>It rains.</p>", "<p>It snows.</p>", "<h2>Peace</h2>Sun.")
    assert places_of("a.epub", data) == [
        ("The storm", 'chapter "The storm"'),
        ("It rains.", 'chapter "The storm"'),
        ("It snows.", "part 2"),
        ("Peace", 'chapter "Peace"'),
        ("Sun.", 'chapter "Peace"'),
    ]
    assert read_document(Path("a.epub"), data).title == "The Lamp"


def test_book_with_encrypted_fonts_only_is_read():
    fonts = '<encryption><CipherReference URI="OEBPS/fonts/a.otf"/></encryption>'
    assert read_document(Path("a.epub"), book("<p>It rains.</p>", encryption=fonts)).text == "It rains."


CONTAINER = f'{XML}<container><rootfile full-path="a.xml"/></container>'
SPINE = '<item id="a" href="{}" media-type="application/xhtml+xml"/><itemref idref="a"/>'


@pytest.mark.parametrize(
    ("parts", "reason"),
    [
        ({"a": "b"}, "not an EPUB book"),
        ({"META-INF/container.xml": f"{XML}<container/>"}, "without a table of contents"),
        ({"META-INF/container.xml": CONTAINER}, "its part 'a.xml' is missing"),
        ({"META-INF/container.xml": CONTAINER, "a.xml": f"{XML}{ENTITY_BOMB}<a>&b;</a>"}, "has a DOCTYPE"),
        (
            {"META-INF/container.xml": CONTAINER, "a.xml": f"{XML}<p>{SPINE.format('../../etc/passwd')}</p>"},
            "contains no text except 1 chapters that are missing",
        ),
        (
            {
                "META-INF/container.xml": CONTAINER,
                "a.xml": f"{XML}<p>{SPINE.format('a.html')}</p>",
                "a.html": "<p>locked</p>",
                "META-INF/encryption.xml": f'{XML}<e><CipherReference URI="a.html"/></e>',
            },
            "copy-protected",
        ),
    ],
)
def test_hostile_book_has_a_reason(parts, reason):
    with pytest.raises(UnreadableFileError, match=re.escape(reason)):
        read_document(Path("a.epub"), zipped(parts))


def test_mail_has_headers_text_and_attached_mails():
    loaded = read_document(Path("a.eml"), MAIL)
    assert (loaded.title, loaded.left_out) == ("The öld lamp", ("1 attachment (plan.pdf)",))
    assert places_of("a.eml", MAIL) == [
        ("From: Edda Märsh <edda@harrow.example>", ""),
        ("To: keeper@harrow.example", ""),
        ("Date: Mon, 4 Mar 1911 08:00:00 +0000", ""),
        ("The lämp is lit at six.", ""),
        ("Subject: Oil", "attached mail 1"),
        ("From: keeper@harrow.example", "attached mail 1"),
        ("The oil is in the cellar.", "attached mail 1"),
    ]


@pytest.mark.parametrize(
    ("head", "body", "text"),
    [
        ("", b"plain", "plain"),
        ("Content-Type: text/plain; charset=koi8-r", "Маяк построен".encode("koi8-r"), "Маяк построен"),
        ("Content-Type: text/plain; charset=no-such", "Größe".encode(), "Größe"),
        ("Content-Type: text/plain; charset=us-ascii", "Größe".encode(), "Größe"),
        ("Content-Type: text/html", b"<style>p{}</style><p>Lit at <b>six</b></p>", "Lit at six"),
        ("Content-Type: text/plain\nContent-Transfer-Encoding: base64", b"bGl0", "lit"),
        ("Content-Type: text/plain\nContent-Transfer-Encoding: base64", b"bGl0\n***", "lit"),
        ("Content-Type: text/plain\nContent-Transfer-Encoding: quoted-printable", b"a=\nb", "ab"),
        ("Content-Type: nonsense", b"kept", "kept"),
        ("Content-Type: multipart/mixed", b"no boundary", "no boundary"),
    ],
)
def test_body_of_a_mail(head, body, text):
    data = b"From: a@b.c\n" + (head.encode() + b"\n" if head else b"") + b"\n" + body
    loaded = read_document(Path("a.eml"), data)
    assert loaded.text.removeprefix("From: a@b.c").strip() == text


def parts_of_mail(count: int) -> bytes:
    part = b"--b\nContent-Type: text/plain\n\nx\n"
    return b"From: a@b.c\nContent-Type: multipart/mixed; boundary=b\n\n" + part * count + b"--b--\n"


def nested_mail(depth: int) -> bytes:
    heads = (b"Content-Type: multipart/mixed; boundary=b%d\n\n--b%d\n" % (n, n) for n in range(depth))
    return b"From: a@b.c\n" + b"".join(heads) + b"\nx"


def test_mail_of_many_parts_is_read_in_part():
    loaded = read_document(Path("a.eml"), parts_of_mail(10_500))
    assert loaded.text.count("x") == 9_999 and loaded.left_out == ("parts from 10,001 on",)


@pytest.mark.parametrize(
    "data", [nested_mail(2_000), nested_mail(100) + b"\n" * 300_000, b"no header\n\ntext", b"\n\n"]
)
def test_hostile_mail_has_a_reason(data):
    with pytest.raises(UnreadableFileError, match=r"nested too deeply|too many lines|not a mail"):
        read_document(Path("a.eml"), data)


PICTURE = {"output_type": "display_data", "data": {"image/png": "iVBO" * 500, "text/plain": ["<Figure>"]}}


@pytest.mark.parametrize(
    ("made", "text"),
    [
        (text_cell("# Lamps\n\nA study."), "# Lamps\n\nA study."),
        (code_cell("x = 1\nx"), "```\nx = 1\nx\n```"),
        (code_cell("x", {"data": {"text/plain": "1"}}), "```\nx\n```\n\n```\n1\n```"),
        (code_cell("x", {"output_type": "stream", "text": ["a\n", "b\n"]}), "```\nx\n```\n\n```\na\nb\n```"),
        (code_cell("x", {"output_type": "error", "ename": "E", "evalue": "no"}), "```\nx\n```\n\n```\nE: no\n```"),
        (code_cell("plot()", PICTURE), "```\nplot()\n```\n\n```\n<Figure>\n```"),
        ({"cell_type": "raw", "source": "raw"}, "raw"),
        ({"cell_type": "code", "input": "old"}, "```\nold\n```"),
        ({"cell_type": "code", "source": ["a", 3, None], "outputs": [7, {"data": []}]}, "```\na\n```"),
    ],
)
def test_cells_of_a_notebook(made, text):
    assert read_document(Path("a.ipynb"), notebook(made)).text == text


def test_place_in_a_notebook_is_its_cell():
    data = notebook(text_cell("# Lamps"), text_cell(""), text_cell("Oil"))
    assert places_of("a.ipynb", data) == [("# Lamps", "cell 1"), ("Oil", "cell 3")]
    assert read_document(Path("a.ipynb"), data).title == "Lamps"


def test_long_output_of_a_notebook_is_cut():
    loaded = read_document(Path("a.ipynb"), notebook(code_cell("x", {"text": "line of a log\n" * 1000})))
    assert len(loaded.text) < 2_100 and loaded.left_out == ("outputs beyond 2,000 characters (in 1 cells)",)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"{", "not a notebook"),
        (b"[]", "it has no list of cells"),
        (b'{"cells": {"a": 1}}', "it has no list of cells"),
        (b'{"cells": []}', "contains no text"),
        (b'{"cells": ' + b"[" * 100_000, "nested too deeply"),
        (json.dumps({"cells": [[{}], "x", None]}).encode(), "contains no text"),
        (b'{"cells": [{"source": ' + b"9" * 5000 + b"}]}", "not a notebook"),
    ],
)
def test_hostile_notebook_has_a_reason(data, reason):
    with pytest.raises(UnreadableFileError, match=re.escape(reason)):
        read_document(Path("a.ipynb"), data)


def test_old_notebook_is_read():
    data = json.dumps({"worksheets": [{"cells": [{"cell_type": "markdown", "source": ["a", "b"]}]}]}).encode()
    assert read_document(Path("a.ipynb"), data).text == "ab"


@pytest.mark.parametrize("suffix", ["py", "js", "c", "rs", "go", "java", "sql", "sh", "yaml", "toml"])
def test_source_code_is_split_between_lines_and_keeps_its_indentation(suffix):
    source = "".join(f"def f{n}(x):\n    if x:\n        return {n} * x + 1\n\n" for n in range(30))
    loaded = read_document(Path(f"a.{suffix}"), source.encode())
    chunks = split_text(loaded.text, loaded.kind, 16, count_words)
    lines = source.splitlines()
    places = name_places(loaded.text, loaded.marks, [(chunk.start, chunk.end) for chunk in chunks])
    for chunk, place in zip(chunks, places, strict=True):
        first, last = map(int, re.fullmatch(r"lines (\d+)-(\d+)", place).groups())
        assert chunk.text.splitlines() == lines[first - 1 : last]


def test_compressed_text_is_read_by_the_suffix_in_front():
    loaded = read_document(Path("notes.md.gz"), gzip.compress(b"# Lamps\n\nLit."))
    assert (loaded.title, loaded.kind) == ("Lamps", "markdown")
    two = gzip.compress(b"one\n") + gzip.compress(b"two\n")
    loaded = read_document(Path("notes.txt.gz"), two)
    assert (loaded.text, loaded.title) == ("one\ntwo\n", "notes")
    assert places_of("t.csv.gz", gzip.compress(b"a,b\n1,2\n"))[1] == ("a: 1 | b: 2", "row 2")


def packed(data: bytes) -> bytes:
    """Return gzip data without a time, so that the names of the cases are the same in all test processes."""
    return gzip.compress(data, mtime=0)


@pytest.mark.parametrize(
    ("name", "data", "reason"),
    [
        ("a.txt.gz", b"text", "cannot be unpacked: Not a gzipped file"),
        ("a.txt.gz", packed(b"text" * 100)[:-9], "truncated"),
        ("a.txt.gz", packed(b"text" * 100)[:-1] + b"\x07", "cannot be unpacked"),
        ("a.txt.gz", packed(b""), "empty"),
        ("a.txt.gz", packed(bytes(MAX_FILE_BYTES + 1)), "unpacks to more than the limit"),
        ("a.txt.gz", packed(b"\x00\x01"), "binary"),
        ("a.tar.gz", packed(b"x"), "compressed file of unknown file type '.tar'"),
        ("a.gz", packed(b"x"), "compressed file of unknown file type ''"),
        ("a.txt.gz.gz", packed(b"x"), "compressed file of unknown file type '.gz'"),
    ],
)
def test_hostile_compressed_file_has_a_reason(name, data, reason):
    with pytest.raises(UnreadableFileError, match=re.escape(reason)):
        read_document(Path(name), data)


@pytest.mark.parametrize("name", EXAMPLES)
def test_every_kind_has_an_example_that_is_read(name):
    assert read_document(Path(name), EXAMPLES[name]).text.strip()
