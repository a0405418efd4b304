"""Tables and rows that anybody may have written: rows or our error, and what was written is read again."""

from __future__ import annotations

import csv
import io
import json

import pytest
from fuzzing import DEEP, JSON, LARGE, TEXTS, damaged, examples, ours
from hypothesis import given
from hypothesis import strategies as st

from kvfusion_rag import InvalidInputError
from kvfusion_rag.data import read_corpus, read_examples, read_ready_rows
from kvfusion_rag.data.formats import parse_example
from kvfusion_rag.data.rows import Passage, QARow, read_rows, row_from, write_rows
from kvfusion_rag.data.tables import read_table

NAMES = st.sampled_from(["id", "question", "Question", "answers", "answer", "Answer", "possible_answers", "context",
                         "title", "answer_start", "ctxs", "passages", "text", "gold", "isgold", "score", "value",
                         "Value", "aliases", "Aliases", "is_impossible", "evidence"])  # fmt: skip
ROWS = st.recursive(
    JSON | st.sampled_from(["Q?", "a", DEEP, "[", '["a"]']),
    lambda items: st.dictionaries(NAMES, items, max_size=6) | st.lists(items, max_size=3),
    max_leaves=10,
)
CELLS = st.text(st.sampled_from("\"\t\n\r a,;'é\\"), max_size=12)
WORDS = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12).filter(str.strip)


@examples(50)
@given(st.dictionaries(NAMES, ROWS, max_size=6) | ROWS)
def test_any_object_is_a_row_or_our_error(value):
    ours(lambda: parse_example(value, "a.jsonl, line 1", 0))
    ours(lambda: row_from(value, "a.jsonl, line 1"))


@examples(20)
@given(ROWS, st.sampled_from([".json", ".jsonl"]))
def test_any_file_of_json_is_read_or_our_error(tmp_path, value, suffix):
    path = tmp_path / f"a{suffix}"
    for content in (value, [value], {"data": value}, {"Data": value}, {"data": [{"paragraphs": value}]}):
        path.write_text(json.dumps(content))
        for read in (read_examples, read_ready_rows, read_corpus, read_rows):
            ours(lambda read=read: list(read(path)))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"question": "Q?", "possible_answers": DEEP}, "possible_answers is .*, but it must be a JSON list"),
        ({"question": "Q?", "answer": {"value": "x", "aliases": 5}}, "aliases is 5, but it must be a list of texts"),
        ({"question": "Q?", "answer": {"Value": "x", "Aliases": {"a": 1}}}, "Aliases is .*, but it must be a list"),
        ({"question": "Q?", "answers": ["a"], "passages": [{"text": "a", "score": LARGE}]}, "score is 10*"),
        ({"question": "Q?", "answers": ["a"], "passages": [{"text": "a", "score": True}]}, "score is True"),
    ],
)
def test_wrong_field_is_named(tmp_path, row, message):
    (tmp_path / "a.jsonl").write_text(json.dumps(row))
    with pytest.raises(InvalidInputError, match=f"^a.jsonl, line 1.*{message}"):
        list(read_examples(tmp_path / "a.jsonl"))


@examples(60)
@given(st.lists(st.lists(CELLS, min_size=1, max_size=4), min_size=1, max_size=6))
def test_lines_of_any_cells_are_rows_or_our_error(rows):
    lines = "\n".join("\t".join(cells) for cells in rows).split("\n")
    found = ours(lambda: list(read_table(lines, "a.tsv")))
    assert found is None or len(found) <= len(lines)


@examples(60)
@given(st.lists(st.tuples(WORDS, CELLS), max_size=6), st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL]))
def test_tables_of_programs_are_read_as_they_were_written(rows, quoting):
    # Lines that look like rows on their own are ambiguous: a quote may be a sign of the text.
    rows = [(q.replace("\r", ""), a.replace("\r", "")) for q, a in rows if "\t" not in q + a and "\n" not in q]
    rows = [(q, a) for q, a in rows if not any(mark in q for mark in "\v\f\x1c\x1d\x1e\x85\u2028\u2029") and q.strip()]
    file = io.StringIO()
    csv.writer(file, delimiter="\t", quoting=quoting, lineterminator="\n").writerows([("question", "answer"), *rows])
    found = [tuple(row.values()) for row, _ in read_table(file.getvalue().split("\n"), "a.tsv")]
    if not any("\n" in answer for _, answer in rows):
        assert found == rows


PASSAGES = st.builds(
    Passage, TEXTS.map(lambda t: t.encode("utf-8", "replace").decode()), st.none() | WORDS, st.just(False),
    st.none() | st.floats(allow_nan=False, allow_infinity=False),
)  # fmt: skip


@examples(20)
@given(st.lists(st.builds(QARow, WORDS, WORDS, st.lists(WORDS).map(tuple), st.lists(PASSAGES).map(tuple)), max_size=3))
def test_written_rows_are_read_again(tmp_path, rows):
    for name in ("a.jsonl", "a.jsonl.gz"):
        write_rows(tmp_path / name, rows)
        assert list(read_rows(tmp_path / name)) == rows


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
@examples(20)
@given(data=st.data())
def test_damaged_files_are_read_or_our_error(tmp_path, name, data):
    row = QARow("1", "Who built it?", ("Amara",), (Passage("Amara built it.", "Mill", True), Passage("Rain.")))
    write_rows(tmp_path / f"whole-{name}", [row] * 3)
    (tmp_path / name).write_bytes(data.draw(damaged((tmp_path / f"whole-{name}").read_bytes())))
    for read in (read_rows, read_examples, read_corpus):
        ours(lambda read=read: list(read(tmp_path / name)))
