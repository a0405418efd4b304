"""Files of documents that anybody may have written: a text or our error, of bounded size, whatever their bytes."""

from __future__ import annotations

import io
import json
import time
import zipfile
from functools import cache
from pathlib import Path

import hypothesis
import pytest
from fuzzing import JSON, damaged, examples, ours
from hypothesis import given
from hypothesis import strategies as st
from indexes import LIGHTHOUSE
from junk_text import without_junk
from made_files import EXAMPLES, word, workbook, zipped

from kvfusion_rag.retrieval.files.charsets import decode_page, decode_text
from kvfusion_rag.retrieval.loaders import KINDS, LoadedText, read_document
from kvfusion_rag.retrieval.splitting import MIN_CHUNK_TOKENS, split_text
from kvfusion_rag.text.sentences import sentence_spans

ENCODINGS = ["utf-8", "cp1252", "cp1251", "koi8-r", "shift_jis", "gb18030", "big5", "euc-kr", "utf-16", "iso2022_jp"]
LABELS = [*ENCODINGS, "", "x-user-defined", "replacement", "utf-7", "idna", "base64", "no such", "a" * 40]
TAGS = (
    *("html", "head", "body", "title", "p", "b", "a", "table", "tr", "td", "pre", "script", "style", "template", "li"),
    *("svg", "math", "select", "option", "ul", "font", "noscript", "plaintext", "textarea", "frameset"),
)
MARKS = (
    *("<!--", "-->", "<![CDATA[", "]]>", "<?xml version='1.0'?>", "<!doctype", "<meta charset=", "&amp", "&#0;"),
    *("&#x110000;", "&#xd800;", "<p hidden>", "<td colspan=99999999>", "<a ", "'", '"', ">", "/>", "\x00", "\ufeff"),
    *("display:none", "\r"),
)
PIECES = st.one_of(
    st.sampled_from(TAGS).map(lambda tag: f"<{tag}>"),
    st.sampled_from(TAGS).map(lambda tag: f"</{tag}>"),
    st.sampled_from(MARKS),
    st.text(max_size=8),
)
MARKDOWN = st.sampled_from(
    (
        *("# ", "#", "```", "~~~", "\n", " ", "    ", "| a ", "|-", "> ", "- ", "1. ", "[a](", "![", "](", "word "),
        *("data:a/b;base64,", "A" * 70, "0x", "7f 45 ", "灯塔", "**", "`", "<p>", "\x00", "\u2028", "\x85", "\x0c"),
    )
)


def check(loaded: LoadedText | None, data: bytes) -> None:
    if loaded is None:
        return
    assert loaded.text.strip() and loaded.title
    assert len(loaded.text) <= 100 * len(data) + 1000
    (loaded.text + loaded.title).encode()  # without lone surrogates
    assert all(loaded.left_out)


@examples(40)
@given(st.lists(PIECES, max_size=30), st.sampled_from(ENCODINGS))
def test_pages_of_any_tags_are_read(pieces, encoding):
    data = "".join(pieces).encode(encoding, "replace")
    check(ours(lambda: read_document(Path("a.html"), data)), data)


@cache
def example(name: str) -> bytes:
    return (LIGHTHOUSE / name).read_bytes()


@pytest.mark.parametrize("name", ["barley_cup.pdf", "port_callan.html", "great_lens.md"])
@examples(20)
@given(data=st.data())
def test_damaged_files_are_read_or_rejected_in_bounded_time(name, data):
    content = data.draw(damaged(example(name)))
    start = time.process_time()
    check(ours(lambda: read_document(Path(name), content)), content)
    assert time.process_time() - start < 10


@pytest.mark.parametrize("name", EXAMPLES)
@examples(20)
@given(data=st.data())
def test_damaged_files_of_each_kind_are_read_or_rejected(name, data):
    content = data.draw(damaged(EXAMPLES[name]))
    check(ours(lambda: read_document(Path(name), content)), content)


@pytest.mark.parametrize("name", [name for name, data in EXAMPLES.items() if zipfile.is_zipfile(io.BytesIO(data))])
@examples(20)
@given(data=st.data())
def test_damaged_parts_of_archives_are_read_or_rejected(name, data):
    with zipfile.ZipFile(io.BytesIO(EXAMPLES[name])) as archive:
        parts = {part: archive.read(part) for part in archive.namelist()}
    part = data.draw(st.sampled_from(sorted(parts)))
    content = zipped({**parts, part: data.draw(damaged(parts[part]))})
    check(ours(lambda: read_document(Path(name), content)), content)


XML_PIECES = st.sampled_from(
    (
        *("<w:p>", "</w:p>", "<w:t>", "</w:t>", "<w:tbl>", "</w:tbl>", "<w:tr>", "</w:tr>", "<w:tc>", "</w:tc>", "x"),
        *("<row r='9'>", "</row>", "<c r='XFD1048576' t='s'>", "</c>", "<v>", "</v>", "<is>", "</is>", "0", "1e308"),
        *("<w:del>", "</w:del>", "<mc:Fallback/>", "<a:t>", "</a:t>", "<p:ph type='title'/>", "<!-- -->", "&#65;"),
        *("<w:pStyle w:val='a'/>", "<w:br/>", "<w:numPr/>", "<c s='99999999999'>", "<![CDATA[a]]>", "&amp;"),
    )
)


@examples(60)
@given(st.lists(XML_PIECES, max_size=30).map("".join))
def test_parts_of_any_tags_are_read_or_rejected(body):
    for name, data in (("a.docx", word(body)), ("a.xlsx", workbook({"S": body}, ["a"]))):
        check(ours(lambda name=name, data=data: read_document(Path(name), data)), data)


@examples(40)
@given(JSON)
def test_notebooks_of_any_json_are_read_or_rejected(content):
    data = json.dumps({"cells": [content, {"cell_type": "code", "source": content, "outputs": content}]}).encode()
    check(ours(lambda: read_document(Path("a.ipynb"), data)), data)


@examples(40)
@given(st.lists(st.sampled_from(["a", ",", ";", '"', "\n", "\r", "\t", "|", "1", " ", "\u2028", "ä"]), max_size=40))
def test_tables_of_any_signs_have_rows_that_ascend(pieces):
    data = "".join(pieces).encode()
    loaded = ours(lambda: read_document(Path("a.csv"), data))
    check(loaded, data)
    if loaded is not None:
        numbers = [mark.number for mark in loaded.marks]
        assert numbers == sorted(set(numbers)) and loaded.marks[0].start == 0


@examples(30)
@given(st.binary(max_size=60), st.sampled_from(sorted(KINDS)), st.sampled_from([b"%PDF-1.7\n", b"<?xml", b"\xff\xfe"]))
def test_any_bytes_are_read_or_rejected(data, suffix, head):
    check(ours(lambda: read_document(Path(f"a{suffix}"), head + data)), head + data)


@examples(60)
@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=60), st.sampled_from(ENCODINGS))
def test_texts_in_any_encoding_are_decoded_without_an_error(text, encoding):
    data = text.encode(encoding, "ignore")
    decoded = decode_text(data)
    assert len(decoded.text) <= len(data) and decoded.invalid <= len(data)
    if encoding == "utf-8" and not text.startswith("\ufeff") and "\x1b" not in text:
        assert (decoded.text, decoded.invalid) == (text, 0)


@examples(60)
@hypothesis.example(b"\x80", "\x00")
@given(st.binary(max_size=80), st.sampled_from(LABELS) | st.text(max_size=10))
def test_any_declared_encoding_is_survived(data, label):
    page = f'<meta charset="{label}">'.encode("utf-8", "replace") + data
    for decoded in (decode_page(page), decode_text(data, label)) if data else ():
        assert decoded.invalid >= 0 and decoded.encoding


@examples(60)
@given(st.lists(MARKDOWN, max_size=60).map("".join))
def test_text_without_junk_has_no_junk(text):
    kept, left_out = without_junk(text)
    assert len(kept) <= len(text) and (kept != text) == bool(left_out)
    again = kept
    for _ in range(5):  # joining what surrounds a removed part may make a new run
        again = without_junk(again)[0]
    assert without_junk(again) == (again, ())


@examples(40)
@given(st.lists(MARKDOWN, max_size=60).map("".join), st.sampled_from(["text", "markdown"]), st.integers(8, 40))
def test_chunks_are_spans_in_order_within_the_limit(text, kind, limit):
    limit = max(limit, MIN_CHUNK_TOKENS)
    chunks = split_text(text, kind, limit, lambda piece: len(piece.encode()))
    assert all(text[c.start : c.end] == c.text and len(c.text.encode()) <= limit for c in chunks)
    assert "".join("".join(c.text.split()) for c in chunks) == "".join(text.split())


@examples(60)
@given(st.text(st.characters(), max_size=60))
def test_sentences_cover_any_text(text):
    spans = sentence_spans(text)
    assert "".join(text[start:end] for start, end in spans) == text
