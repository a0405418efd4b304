"""Names of places: as a reader would write them, and right after embedded data is removed."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvfusion_rag.retrieval import read_document
from kvfusion_rag.retrieval.files.reading import Mark
from kvfusion_rag.retrieval.places import name_places
from kvfusion_rag.text.citations import narrowed_place

TEXT = "one two three four"


@pytest.mark.parametrize(
    ("marks", "span", "name"),
    [
        ([Mark(0, "page", 12)], (4, 7), "page 12"),
        ([Mark(0, "page", 12), Mark(8, "page", 13)], (4, 13), "pages 12-13"),
        ([Mark(0, "page", 12), Mark(8, "page", 13)], (4, 8), "page 12"),
        ([Mark(0, "row", 3, within="sheet A"), Mark(8, "row", 9, within="sheet A")], (0, 9), "sheet A, rows 3-9"),
        ([Mark(0, "row", 3, within="A"), Mark(8, "row", 9, within="B")], (0, 9), "A, row 3 to B, row 9"),
        ([Mark(0, "chapter", name="The storm")], (0, 3), 'chapter "The storm"'),
        ([Mark(0, "chapter", name="A"), Mark(4, "chapter", name="B")], (0, 7), 'chapter "A" to chapter "B"'),
        ([Mark(4, "section", name="A")], (0, 7), ""),
        ([], (0, 7), ""),
    ],
)  # fmt: skip
def test_name_of_a_place(marks, span, name):
    assert name_places(TEXT, marks, [span]) == [name]


LINE = st.sampled_from(
    ["a", "b c", "", "A" * 70, "0x7f 45 4c 46 02 01 01 00 00 00", "x" * 1200, "data:a/b;base64," + "A" * 120]
)


@given(st.lists(st.tuples(LINE, st.sampled_from(["\n", "\r\n"])), max_size=40), st.sampled_from(["a.txt", "a.py"]))
def test_every_line_that_is_kept_has_its_own_number(lines, name):
    text = "".join(
        f"{number} {line}{end}" if number % 3 == 0 else line + end for number, (line, end) in enumerate(lines, 1)
    )
    loaded = read_document(Path(name), (text + "z").encode())
    spans: list[tuple[int, int]] = []
    start = 0
    for line in loaded.text.splitlines(keepends=True):
        if line.split()[:1] and line.split()[0].isdigit():
            spans.append((start, start + 1))
        start += len(line)
    for (start, _), place in zip(spans, name_places(loaded.text, loaded.marks, spans), strict=True):
        assert place == f"line {loaded.text[start:].split()[0]}"


@pytest.mark.parametrize(
    ("place", "offset", "narrowed"),
    [
        ("rows 40-42", 3, "row 41"),
        ("lines 40-42", 0, "line 40"),
        ("sheet A, rows 40-42", 7, "sheet A, row 42"),
        ("rows 40-50", 3, "rows 40-50"),  # some are blank
        ("pages 3-4", 3, "pages 3-4"),
        ('chapter "rows 1-2"', 3, 'chapter "rows 1-2"'),
    ],
)
def test_cited_row_is_named(place, offset, narrowed):
    assert narrowed_place(place, "ab\ncd\nef", offset) == narrowed
