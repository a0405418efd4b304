"""Web pages and encodings: the words that a browser shows are found, and the time grows in step with the page."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest
from growth import growth_of_time

from kvfusion_rag.retrieval import read_document
from kvfusion_rag.retrieval.loaders import UnreadableFileError


def read(data: bytes | str, name: str = "page.html") -> str:
    return read_document(Path(name), data.encode() if isinstance(data, str) else data).text


# Structure


@pytest.mark.parametrize(
    "page",
    [
        "<html><head><title>Lock</title><meta charset=utf-8><body><p>Words.",
        "<title>Lock</title><p>Words.",
        "<head><title>Lock</title><p>Words.",
        "<html><head><link rel=x><h1>Lock</h1>Words.",
        "<!doctype html><table><tr><td>Words.<tr><td>More",
        "<body><ul><li>Words.<li>More</ul>",
        "<div><nav>Menu<ul><li>x</div>Words.",  # the end of <div> ends <nav>
        "<p>Words.<script>var a = '<p>No.';",
        "<p>Words.<!-- No.",
        "Words.",
        "<dl><dt>A<dd>Words.",
        "<select><option>A<option>Words.",
        "<noscript>No.</noscript><p>Words.",
        "<html>" * 500 + "<body a=1>" * 500 + "Words.",
        "<b>" * 500 + "<p>Words.",
        "<div>" * 20_000 + "Words.",
        '<?xml version="1.0"?><html><head><title/><script src="x"/></head><body><nav/><p>Words.</p></body></html>',
    ],
)
def test_pages_with_missing_or_odd_tags_show_their_words(page):
    text = read(page)
    assert "Words." in text
    assert "No." not in text
    assert "var a" not in text


@pytest.mark.parametrize(
    "hidden",
    [
        "<p hidden>No.</p>",
        "<div style='color: red; Display : none'>No.</div>",
        "<ul role=navigation><li>No.</ul>",
        "<template>No.</template>",
        "<iframe>No.</iframe>",
        "<svg><title>No.</title></svg>",
        "<datalist><option>No.</datalist>",
    ],
)
def test_text_that_browsers_do_not_show_is_left_out(hidden):
    assert read(f"<p>Before.</p>{hidden}<p hidden=until-found>After.</p>") == "Before.\n\nAfter."


def test_title_is_the_title_of_the_page():
    page = b"<svg><title>Icon</title></svg><h1>Heading</h1><title>Page</title>"
    assert read_document(Path("a.html"), page).title == "Page"
    assert read_document(Path("a.html"), b"<svg><title>Icon</title></svg><h1>Heading</h1>").title == "Heading"


def test_a_wide_table_stays_as_large_as_its_cells():
    table = "<table><tr><td>" + "word " * 2000 + "<td>b" + "<tr><td>a<td>b" * 2000 + "</table>"
    assert len(read(table)) < 2 * len(table)


# Encodings

GERMAN = "Brücke für 7 €, größer als die „Alte“"
SENTENCES = {
    "windows-1252": GERMAN,
    "iso-8859-15": "Die Brücke über den Fluß kostet 7 €, größer als früher.",
    "windows-1250": "Zażółć gęślą jaźń. Latarnik mieszka w Łodzi.",
    "iso-8859-2": "Příliš žluťoučký kůň úpěl ďábelské ódy.",
    "windows-1251": "Смотритель маяка живёт в Архангельске.",
    "koi8-r": "Смотритель маяка живёт в Архангельске.",
    "windows-1253": "Ο φαροφύλακας ζει στην Αθήνα και γράφει.",
    "windows-1255": "שומר המגדלור גר בחיפה וכותב מכתבים.",
    "windows-1256": "يعيش حارس المنارة في الإسكندرية.",
    "cp874": "ผู้ดูแลประภาคารอาศัยอยู่ที่ภูเก็ต",
    "shift_jis": "灯台守は毎晩港まで歩いていく。",
    "euc_jp": "灯台守は毎晩港まで歩いていく。",
    "iso2022_jp": "灯台守は毎晩港まで歩いていく。",
    "gbk": "灯塔守护人每天晚上走到港口。",
    "big5": "燈塔守護人每天晚上走到港口。",
    "euc_kr": "등대지기는 매일 저녁 항구까지 걸어간다.",
    "utf-16": GERMAN,
    "utf-8-sig": GERMAN,
}


@pytest.mark.parametrize("encoding", SENTENCES)
@pytest.mark.parametrize("declaration", ["{0}", "none", "utf-8", "windows-1252"])
def test_a_page_is_read_in_its_encoding(encoding, declaration):
    names = {"cp874": "windows-874", "iso2022_jp": "iso-2022-jp", "euc_jp": "euc-jp", "euc_kr": "euc-kr"}
    label = declaration.format(names.get(encoding, encoding))
    if encoding == "iso-8859-15" and label != encoding:
        pytest.skip("one letter in a hundred tells it from windows-1252")
    if label == "windows-1252" and encoding not in ("windows-1252", "utf-16", "utf-8-sig", "iso2022_jp"):
        pytest.skip("a wrong declaration that fits all bytes is believed, as in browsers")
    meta = "" if label == "none" else f'<meta http-equiv="Content-Type" content="text/html; charset={label}">'
    page = f"<html><head>{meta}<title>x</title><body><p>{SENTENCES[encoding]}"
    assert SENTENCES[encoding] in read(page.encode(encoding))


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ('<meta charset="utf-8"><p>Brücke für 7 €</p><p>'.encode() + b"\xff</p>", "Brücke für 7 €"),
        ('<meta charset="utf-8"><p>Brücke für 7 €</p>'.encode() + b"\xe2\x82", "Brücke für 7 €"),
        ('<meta charset="iso-8859-1"><p>Brücke für 7 €</p>'.encode(), "Brücke für 7 €"),
        (b'<meta charset="iso-8859-1"><p>Br\xfccke f\xfcr 7 \x80</p>', "Brücke für 7 €"),
        (b'<meta charset="latin1"><p>Br\xfccke \x84Alte\x93</p>', "Brücke „Alte“"),
        ("<meta charset=gb2312><p>朱镕基</p>".encode("gbk"), "朱镕基"),  # 镕 is not in GB 2312
        ("<meta charset=shift_jis><p>①髙い灯台</p>".encode("cp932"), "①髙い灯台"),
        ("<meta charset=windows-1251><p>Смотритель маяка</p>".encode("cp1251") + b"\x98", "Смотритель маяка"),
        ("<meta charset=nonsense><p>Brücke</p>".encode(), "Brücke"),
        ("<!-- <meta charset=windows-1251> --><p>Die Brücke über den Fluß</p>".encode("cp1252"), "Brücke"),
        ('<?xml version="1.0" encoding="windows-1251"?><p>Смотритель маяка</p>'.encode("cp1251"), "Смотритель маяка"),
    ],
)
def test_wrong_bytes_and_wrong_declarations_do_not_garble_a_page(data, words):
    assert words in read(data)


def test_text_files_are_read_in_their_encoding_and_wrong_bytes_are_counted():
    assert read("Смотритель маяка живёт в Архангельске.".encode("koi8-r"), "a.txt").startswith("Смотритель")
    loaded = read_document(Path("a.txt"), "Größe und Maß. ".encode() + b"\xff\xfe")
    assert (loaded.text, loaded.left_out) == ("Größe und Maß. \ufffd\ufffd", ("2 bytes that are not UTF-8",))
    with pytest.raises(UnreadableFileError, match="neither UTF-8 nor another known encoding"):
        read(bytes(range(128, 256)) * 4, "a.txt")


# Time

SHAPES = {
    "paragraphs": lambda n: "<p>a</p>" * n,
    "open links": lambda n: "<a " * n,
    "nested lists": lambda n: "<ul><li>x" * n,
    "nested": lambda n: "<div>" * n + "x",
    "attributes": lambda n: "<p " + " ".join(f"a{i}=1" for i in range(n)) + ">x",
    "roots": lambda n: "".join(f"<html a{i}=1>" for i in range(n)) + "x",
    "open styles": lambda n: "".join(f"<font x={i}>" for i in range(n)) + "<div>x</div>" * n,
    "styles across blocks": lambda n: "<div><b>x</div>" * n,
    "long cell": lambda n: "<table><tr><td>" + "x " * n + "<tr><td>a" * n,
    "many columns": lambda n: "<table><tr>" + "<td>a" * n + "<tr><td>b" * n,
    "comments": lambda n: "<p>x<!-- " * n,
    "declarations": lambda n: "<meta charset" * n,
    "self-closing": lambda n: "<?xml?>" + "<a" * n + "<b/>" * n,
}


@pytest.mark.parametrize("shape", SHAPES)
def test_time_grows_in_step_with_the_page(shape):
    def run(size: int) -> None:
        with contextlib.suppress(UnreadableFileError):
            read(SHAPES[shape](size))

    assert growth_of_time(run, 2_000) < 10
