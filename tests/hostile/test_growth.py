"""Work grows in step with size, for many shapes of text: times in the nightly run, counted characters in every run."""

from __future__ import annotations

import base64
import contextlib
import gzip
import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
from fakes import RecordingGenerator
from growth import growth_of_time
from made_files import book, notebook, paragraph, slides, text_cell, word, workbook
from serving_client import CHAT, client_of, request

from kvfusion_rag.data.tables import read_table
from kvfusion_rag.errors import KVFusionError
from kvfusion_rag.retrieval.loaders import read_document
from kvfusion_rag.retrieval.places import name_places
from kvfusion_rag.retrieval.splitting import split_text
from kvfusion_rag.schema import Document
from kvfusion_rag.text.encoder import PlainEncoder, TextDocuments
from kvfusion_rag.text.splitting import split_document

MOST = 10  # for four times the size; quadratic work would be 16 times as much
DATA = base64.b64encode(random.Random(1).randbytes(900)).decode()
SHAPES: dict[str, Callable[[int], str]] = {
    "prose": lambda n: "The keeper walks down to the harbour. " * (n // 38),
    "unbroken Chinese": lambda n: "灯塔守护人每天晚上走到港口" * (n // 13),
    "base64": lambda n: DATA * (n // len(DATA)),
    "wrapped base64": lambda n: (DATA[:76] + "\n") * (n // 77),
    "one long line": lambda n: "ab " * (n // 3),
    "blanks": lambda n: "a" + " " * n + "b",
    "line breaks": lambda n: "\n" * n + "a",
    "headings with blanks": lambda n: ("# a" + " " * 500 + "b\n") * (n // 505),
    "one heading": lambda n: "# " + "a #" * (n // 3),
    "nested lists": lambda n: "\n".join("  " * (k % 60) + "- a" for k in range(n // 60)),
    "nested quotes": lambda n: "> " * (n // 2) + "a",
    "Markdown table": lambda n: "| a | b |\n|---|---|\n" + "| c | d |\n" * (n // 10),
    "wide table": lambda n: "|" + " a |" * (n // 8) + "\n|" + "---|" * (n // 8),
    "fences": lambda n: "```\na\n" * (n // 6),
    "open brackets": lambda n: "[" * n,
    "links": lambda n: "[a](b " * (n // 6),
    "emphasis": lambda n: "*a **b " * (n // 7),
    "accents": lambda n: "e\u0301" * (n // 2),
    "paragraphs": lambda n: "<p>a</p>" * (n // 8),
    "open tags": lambda n: "<a " * (n // 3),
    "nested tags": lambda n: "<ul><li>a" * (n // 9),
    "open table": lambda n: "<table><tr><td>a" * (n // 16),
    "entities": lambda n: "&amp;&#65;&" * (n // 11),
    "attributes": lambda n: "<p " + "".join(f"a{k}='" for k in range(n // 8)) + ">x",
    "selects": lambda n: "<select><option>a" * (n // 17),
    "comments": lambda n: "<!-- -- " * (n // 8) + "-->a",
    "quotes": lambda n: '"' * n,
    "quotes in rows": lambda n: 'a\t"b\n' * (n // 5),
    "JSON nesting": lambda n: "[" * (n // 2) + "]" * (n // 2),
    "escapes": lambda n: "\\u0041" * (n // 6),
}


def count(text: str) -> int:
    return (len(text.encode("utf-8", "replace")) + 3) // 4


@pytest.mark.slow
@pytest.mark.parametrize("suffix", [".txt", ".md", ".html"])
@pytest.mark.parametrize("shape", SHAPES)
def test_time_to_read_and_split_a_file(shape, suffix):
    def run(size: int) -> None:
        with contextlib.suppress(KVFusionError):
            loaded = read_document(Path(f"a{suffix}"), SHAPES[shape](size).encode())
            split_text(loaded.text, loaded.kind, 128, count)

    assert growth_of_time(run, 10_000) < MOST


FILES: dict[str, Callable[[int], tuple[str, bytes]]] = {
    "paragraphs": lambda n: ("a.docx", word("<w:p><w:r><w:t>a</w:t></w:r></w:p>" * (n // 40))),
    "nested tables": lambda n: ("a.docx", word("<w:tbl><w:tr><w:tc>" * (n // 40) + paragraph("a" * (n // 2)))),
    "open paragraphs": lambda n: ("a.docx", word("<w:p>" * (n // 20) + "a" + "</w:p>" * (n // 20))),
    "a long namespace": lambda n: ("a.docx", word(f"<b xmlns='{'n' * (n // 2)}'>" + "<a/>" * (n // 8) + "</b>")),
    "XML attributes": lambda n: ("a.docx", word("<w:p " + " ".join(f"a{k}='1'" for k in range(n // 10)) + "/>")),
    "slides": lambda n: ("a.pptx", slides(*[["a", "b"]] * (n // 200))),
    "cells": lambda n: ("a.xlsx", workbook({"S": "<row><c><v>1</v></c></row>" * (n // 26)})),
    "a wide row": lambda n: ("a.xlsx", workbook({"S": f"<row>{'<c><v>1</v></c>' * (n // 15)}</row>"})),
    "a text in many cells": lambda n: ("a.xlsx", workbook({"S": SHARED_CELL * (n // 40)}, ["a" * (n // 1000)])),
    "sheets": lambda n: ("a.xlsx", workbook({f"S{k}": "<row/>" for k in range(n // 100)})),
    "chapters": lambda n: ("a.epub", book(*["<p>a</p>"] * (n // 200))),
    "rows": lambda n: ("a.csv", b"name,age\n" + b"Ann,40\n" * (n // 7)),
    "commas": lambda n: ("a.csv", b"," * n + b"a"),
    "blank rows": lambda n: ("a.csv", b"a,b\n\n" * (n // 5)),
    "open quotes": lambda n: ("a.csv", b'a,"b\n' * (n // 5)),
    "parts of a mail": lambda n: ("a.eml", MAIL_HEAD + b"--b\n\nx\n" * (n // 7)),
    "a long header": lambda n: ("a.eml", b"Content-Type: a/b; x=" + b'";' * (n // 2) + b"\n\nx"),
    "encoded words": lambda n: ("a.eml", b"Subject: " + b"=?utf-8?q?a?= " * (n // 14) + b"\n\nx"),
    "headers": lambda n: ("a.eml", b"A: b\n" * (n // 5) + b"\nx"),
    "addresses": lambda n: ("a.eml", b"To: " + b"a@b.c, " * (n // 7) + b"\n\nx"),
    "lines of a mail": lambda n: ("a.eml", MAIL_HEAD + b"\n" * n),
    "cells of a notebook": lambda n: ("a.ipynb", notebook(*[text_cell("a")] * (n // 40))),
    "gzip members": lambda n: ("a.txt.gz", gzip.compress(b"a\n") * (n // 22)),
    "lines of code": lambda n: ("a.py", b"x = 1\n" * (n // 6)),
    "carriage returns": lambda n: ("a.py", b"x\r" * (n // 2)),
    "data between lines": lambda n: ("a.py", (b"x\n" + b"A" * 1100 + b"\n") * (n // 1103)),
}
SHARED_CELL = "<row><c t='s'><v>0</v></c></row>"
MAIL_HEAD = b"From: a@b.c\nContent-Type: multipart/mixed; boundary=b\n\n"


@pytest.mark.slow
@pytest.mark.parametrize("shape", FILES)
def test_time_to_read_and_split_a_file_of_each_kind(shape):
    def run(size: int) -> None:
        name, data = FILES[shape](size)
        with contextlib.suppress(KVFusionError):
            loaded = read_document(Path(name), data)
            chunks = split_text(loaded.text, loaded.kind, 128, count)
            name_places(loaded.text, loaded.marks, [(chunk.start, chunk.end) for chunk in chunks])

    assert growth_of_time(run, 40_000) < MOST


@pytest.mark.slow
@pytest.mark.parametrize("shape", ["line breaks", "quotes", "quotes in rows", "wrapped base64", "Markdown table"])
def test_time_to_read_a_table(shape):
    def run(size: int) -> None:
        with contextlib.suppress(KVFusionError):
            list(read_table(["a\tb", *SHAPES[shape](size).split("\n")], "a.tsv"))

    assert growth_of_time(run, 20_000) < MOST


PLACES: dict[str, Callable[[str], dict[str, object]]] = {
    "document": lambda text: {"documents": [text]},
    "question": lambda text: {"messages": [{"role": "user", "content": text}]},
    "part": lambda text: {"messages": [{"role": "user", "content": [{"type": "text", "text": text}]}]},
    "ignored": lambda text: {"user": text},
    "unknown": lambda text: {text[:1000]: text},
}


@pytest.mark.slow
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("shape", SHAPES)
def test_time_to_handle_a_request(shape, place):
    client = client_of(RecordingGenerator(), max_body_bytes=1 << 30)

    def run(size: int) -> None:
        body = json.dumps({**request(), **PLACES[place](SHAPES[shape](size))})
        client.post(CHAT, content=body, headers={"content-type": "application/json"})

    assert growth_of_time(run, 100_000) < MOST


@pytest.mark.slow
@pytest.mark.parametrize("body", ["[%s" % ("[" * 9), '{"a":', '"\\', "1", "1e", "[0,", '"\\u00', "-", "true,", " "])
def test_time_to_reject_a_body(body):
    client = client_of(RecordingGenerator(), max_body_bytes=1 << 30)

    def run(size: int) -> None:
        content = body * (size // len(body))
        assert client.post(CHAT, content=content, headers={"content-type": "application/json"}).status_code == 400

    assert growth_of_time(run, 200_000) < MOST


@pytest.mark.parametrize("kind", tiny.TOKENIZER_KINDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_characters_encoded_to_split_a_document(monkeypatch, shape, kind):
    """Encoding takes nearly all the time of splitting a long document."""
    encoded: list[int] = []
    encoding = PlainEncoder._encoding
    monkeypatch.setattr(
        PlainEncoder, "_encoding", lambda self, text, **kw: encoded.append(len(text)) or encoding(self, text, **kw)
    )
    encoder = TextDocuments(PlainEncoder(tiny.tokenizer(kind)), separator="\n\n", titles=True, continues=False)

    def per_character(size: int) -> float:
        encoded.clear()
        text = SHAPES[shape](size)
        list(split_document(encoder, Document(text), 64, 10**9))
        return sum(encoded) / len(text)

    assert per_character(16_000) <= 2.5 * per_character(4_000)  # quadratic work: 4 times
