"""Tables of separated values: one line for each row, with the names of columns, and its number."""

from __future__ import annotations

from pathlib import Path

import pytest
from indexes import count_words, open_index

from kvfusion_rag.retrieval import read_document
from kvfusion_rag.retrieval.places import name_places
from kvfusion_rag.retrieval.splitting import split_text


@pytest.mark.parametrize(
    ("data", "lines"),
    [
        ("name,age\nAnn,40\nBo,41\n", ["name | age", "name: Ann | age: 40", "name: Bo | age: 41"]),
        ("name;age\nAnn;4,5\n", ["name | age", "name: Ann | age: 4,5"]),
        ("name\tage\r\nAnn\t40\r\n", ["name | age", "name: Ann | age: 40"]),
        ("name|age\nAnn|40", ["name | age", "name: Ann | age: 40"]),
        ('a,b\n"x, ""y""",2\n', ["a | b", 'a: x, "y" | b: 2']),
        ('a,b\n"two\nlines",2\n', ["a | b", "a: two lines | b: 2"]),
        ("1,2\n3,4\n", ["1 | 2", "3 | 4"]),
        ("a,a\n3,4\n", ["a | a", "3 | 4"]),
        ("Report 1911\nname,age\nAnn,40\n", ["Report 1911", "name | age", "name: Ann | age: 40"]),
        ("name,age\nAnn,\n,40\n", ["name | age", "name: Ann", "age: 40"]),
        ('a,b\n"open,2\nx,y\n', ["a | b", 'a: "open | b: 2', "a: x | b: y"]),
        ("one\ntwo\n", ["one", "two"]),
        ("a,b\n1,2,3\n", ["a | b", "a: 1 | b: 2 | 3"]),
        (f"a,{'b' * 50}\n1,2\n", [f"a | {'b' * 50}", "a: 1 | 2"]),
    ],
)
def test_rows_of_a_table(data, lines):
    assert read_document(Path("a.csv"), data.encode()).text.splitlines() == lines


def test_table_in_another_encoding():
    assert read_document(Path("a.csv"), "Straße;Größe\nÖl;ü\n".encode("cp1252")).text.endswith("Straße: Öl | Größe: ü")
    assert "name: Ann" in read_document(Path("a.tsv"), "name\tage\nAnn\t1\n".encode("utf-16")).text


def test_each_chunk_names_its_rows():
    data = "name,age\n" + "".join(f"Ann{n},{n}\n" for n in range(2, 8)) + "\n\nBo,9\n"
    loaded = read_document(Path("a.csv"), data.encode())
    chunks = split_text(loaded.text, loaded.kind, 12, count_words)
    places = name_places(loaded.text, loaded.marks, [(chunk.start, chunk.end) for chunk in chunks])
    assert places == ["rows 1-2", "rows 3-4", "rows 5-6", "rows 7-10"]
    assert chunks[-1].text == "name: Ann7 | age: 7\nname: Bo | age: 9"


def test_rows_beyond_the_limit_are_left_out(monkeypatch):
    monkeypatch.setattr("kvfusion_rag.retrieval.files.table.MAX_CELLS", 4)
    loaded = read_document(Path("a.csv"), b"1,1\n2,2\n3,3\n4,4\n")
    assert loaded.text == "1 | 1\n2 | 2\n3 | 3"
    assert loaded.left_out == ("rows from 4 on, beyond 4 cells",)


def test_place_is_in_the_metadata_but_not_in_the_text(tmp_path):
    (tmp_path / "table.csv").write_text("name,age\nAnn,40\n")
    with open_index() as index:
        index.update(tmp_path)
        (found,) = index.search("Ann")
    assert found.metadata["place"] == "rows 1-2" and "row" not in found.text
