"""Questions and passages from every file format, and malformed files."""

from __future__ import annotations

import csv
import gzip
import json
import sys
from types import ModuleType

import pytest
from growth import growth_of_time
from towns import write

from kvfusion_rag import InvalidInputError, MissingDependencyError
from kvfusion_rag.data import Example, read_corpus, read_dataset, read_examples, read_ready_rows
from kvfusion_rag.data.rows import Passage, QARow
from kvfusion_rag.data.tables import read_table

CONTEXT = "The mill of Arda was built in 1900."
GOLD = Passage(CONTEXT, "Arda", True)
OTHER = Passage("Bree has none.", "Bree")
QUESTION = {"id": "q1", "question": "When?"}
EXPECTED = Example("", "q1", "When?", ("1900", "in 1900"), (GOLD,))
PAIRS = [{"text": "1900", "answer_start": 30}, {"text": "in 1900", "answer_start": 27}]
SQUAD = {"data": [{"title": "Arda", "paragraphs": [{"context": CONTEXT, "qas": [
    QUESTION | {"answers": PAIRS}, {"id": "q2", "question": "Who?", "answers": [], "is_impossible": True,
                                    "plausible_answers": PAIRS}]}]}]}  # fmt: skip
TRIVIA = {
    "Data": [{"QuestionId": "q1", "Question": "When?", "Answer": {"Value": "1900", "Aliases": ["in 1900", "1900"]}}]
}
ROWS = {
    "one context": QUESTION | {"answers": ["1900", "in 1900"], "context": CONTEXT, "title": "Arda",
                               "answer_start": 30},
    "datasets' SQuAD": QUESTION | {"context": CONTEXT, "title": "Arda",
                                   "answers": {"text": ["1900", "in 1900"], "answer_start": [30, 27]}},
    "NQ-open": QUESTION | {"answer": ["1900", "in 1900"]},
    "datasets' TriviaQA": {"question_id": "q1", "question": "When?",
                           "answer": {"value": "1900", "aliases": ["in 1900"], "normalized_aliases": ["1900"]}},
    "PopQA": QUESTION | {"obj": "1900", "possible_answers": '["1900", "in 1900"]'},
    "lost in the middle": QUESTION | {"answers": ["1900", "in 1900"], "nq_annotated_gold": {}, "ctxs": [
        {"id": 1, "title": "Bree", "text": "Bree has none.", "hasanswer": False, "isgold": False},
        {"id": 2, "title": "Arda", "text": CONTEXT, "hasanswer": True, "isgold": True}]},
    "own rows": QUESTION | {"answers": ["1900", "in 1900"], "passages": [
        {"title": "Bree", "text": "Bree has none.", "gold": False}, {"title": "Arda", "text": CONTEXT, "gold": True}]},
}  # fmt: skip
READY = ("lost in the middle", "own rows")


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".json"])
@pytest.mark.parametrize("name", READY)
def test_rows_with_passages_are_read_unchanged(tmp_path, name, suffix):
    data = [ROWS[name], ROWS[name] | {"id": "q2"}]
    lines = json.dumps(data) if suffix == ".json" else "\n".join(map(json.dumps, data))
    rows = list(read_ready_rows(write(tmp_path / f"rows{suffix}", lines)))
    assert rows == [QARow(name, "When?", ("1900", "in 1900"), (OTHER, GOLD)) for name in ("q1", "q2")]


@pytest.mark.parametrize("name", [*(name for name in ROWS if name not in READY), "SQuAD", "TriviaQA"])
def test_formats_without_several_passages_are_rejected(tmp_path, name):
    data = [ROWS[name]] if name in ROWS else SQUAD if name == "SQuAD" else TRIVIA
    number = "no passages" if name in ("NQ-open", "datasets' TriviaQA", "PopQA", "TriviaQA") else "one context"
    with pytest.raises(InvalidInputError, match=rf"^dev\.json: .*{number}.*kvfusion build-data .* from dev\.json\.$"):
        list(read_ready_rows(write(tmp_path / "dev.json", json.dumps(data))))


def without_place(example: Example) -> tuple:
    return example.id, example.question, example.answers, example.passages


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".json"])
@pytest.mark.parametrize("name", ROWS)
def test_every_format_is_read(tmp_path, name, suffix):
    rows = [ROWS[name]]
    path = write(tmp_path / f"rows{suffix}", json.dumps(rows if suffix == ".json" else rows[0]))
    (example,) = read_examples(path)
    passages = (
        (OTHER, GOLD) if {"ctxs", "passages"} & ROWS[name].keys() else (GOLD,) if "context" in ROWS[name] else ()
    )
    assert without_place(example) == ("q1", "When?", ("1900", "in 1900"), passages)
    assert example.answer_start == (30 if passages == (GOLD,) else None)


def test_squad_with_and_without_answers(tmp_path):
    first, second = read_examples(write(tmp_path / "squad.json", json.dumps(SQUAD)))
    assert without_place(first) == without_place(EXPECTED) and first.answer_start == 30
    assert without_place(second) == ("q2", "Who?", (), (Passage(CONTEXT, "Arda"),))
    assert second.where == "squad.json: data[0].paragraphs[0].qas[1]"


def test_triviaqa_popqa_and_json_lines_named_json(tmp_path):
    (trivia,) = read_examples(write(tmp_path / "trivia.json", json.dumps(TRIVIA)))
    table = 'id\tquestion\tobj\tpossible_answers\nq1\tWhen?\t1900\t"[""1900"", ""in 1900""]"\n'
    (popqa,) = read_examples(write(tmp_path / "popqa.tsv", table))
    lines = "\n".join(json.dumps(ROWS["NQ-open"]) for _ in range(2))
    assert without_place(trivia) == without_place(popqa) == ("q1", "When?", ("1900", "in 1900"), ())
    assert len(list(read_examples(write(tmp_path / "lines.json", lines)))) == 2


def test_hugging_face_dataset_is_read_by_its_fields(monkeypatch):
    library, asked = ModuleType("datasets"), []

    def load_dataset(name, config, *, split):
        asked.append((name, config, split))
        if name == "absent":
            raise FileNotFoundError("no such dataset")
        return [ROWS["datasets' SQuAD"], ROWS["PopQA"]]

    monkeypatch.setitem(sys.modules, "datasets", library)
    monkeypatch.setattr(library, "load_dataset", load_dataset, raising=False)
    assert [example.golds for example in read_dataset("squad", "plain", "dev")] == [(GOLD,), ()]
    assert asked == [("squad", "plain", "dev")]
    with pytest.raises(InvalidInputError, match=r"'absent'.*cannot be loaded: no such dataset"):
        list(read_dataset("absent"))
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(MissingDependencyError, match="pip install datasets"):
        list(read_dataset("squad"))


ROW = {"question": "Q?", "answers": ["a"]}
MALFORMED = [  # for questions of any format, or for ready rows too
    (ROW | {"question": " "}, "question", False),
    ({"answers": ["a"]}, "question", False),
    ({"question": "Q?"}, "answers is missing", False),
    (ROW | {"answers": [1]}, "answers", False),
    (ROW | {"answers": [""]}, "answers", False),
    ({"question": "Q?", "answer": {}}, "answer is an object", False),
    (ROW | {"answers": []}, "answers is empty", False),
    ({"question": "Q?", "possible_answers": "x"}, "possible_answers", False),
    (ROW | {"context": 3}, "context", False),
    (ROW | {"context": "a", "title": 3}, "title", False),
    (ROW | {"context": "a", "answer_start": "0"}, "answer_start", False),
    (ROW | {"ctxs": []}, "ctxs", False),
    (ROW | {"ctxs": [{"text": "a", "isgold": 1}]}, "ctxs 1: isgold is 1, but", True),
    (ROW | {"ctxs": [{"title": "a"}]}, "ctxs 1: text is None, but", True),
    (ROW | {"passages": [{"text": 1}]}, "passage 1: text is 1, but", True),
    (ROW | {"passages": [], "answers": [""]}, r"answers is \[''\], but", True),
    ({"question": "Q?", "passages": [{"text": "a"}]}, "answers is missing", True),
    ({"passages": []}, "question is None, but", True),
    (ROW | {"passages": [{"text": "a", "gold": True}], "answers": []}, "answers is empty, but", True),
    ([1], "is a list, but", True),
]  # fmt: skip


@pytest.mark.parametrize(("row", "message", "ready"), MALFORMED)
def test_malformed_row_names_file_line_and_field(tmp_path, row, message, ready):
    path = write(tmp_path / "bad.jsonl", json.dumps(ROWS["own rows"]) + "\n\n" + json.dumps(row))
    for read in (read_examples, read_ready_rows)[: 1 + ready]:
        with pytest.raises(InvalidInputError, match=rf"^bad\.jsonl, line 3.*{message}"):
            list(read(path))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", "{", "line 1 is not JSON"),
        ("a.json", "{", "a.json is not JSON"),
        ("a.json", "{}", "contains a dict"),
        ("a.json", '{"data": [{"title": "x"}]}', r"data\[0\]: paragraphs"),
        ("a.json", '{"data": [{"paragraphs": [{"qas": [{}]}]}]}', r"paragraphs\[0\]: context"),
        ("a.json", '{"Data": [{"Question": "Q?"}]}', r"Data \[0\]: answers"),
        ("a.tsv", "question\nQ?\n", "line 2: answers"),
        ("a.txt", "x", "ends in '.txt'"),
        ("a.jsonl", '{"question": ' + "9" * 5000 + "}", "line 1 is not JSON"),  # more digits than Python reads
        ("a.json", "[" * 99_999, "a.json is not JSON"),
    ],
)
def test_malformed_file_raises_one_error(tmp_path, name, content, message):
    with pytest.raises(InvalidInputError, match=message):
        list(read_examples(write(tmp_path / name, content)))


def test_damaged_file_raises_one_error(tmp_path):
    (tmp_path / "a.jsonl.gz").write_bytes(b"no gzip")
    (tmp_path / "b.jsonl").write_bytes(b"\xff\xfe")
    (tmp_path / "c.jsonl.gz").write_bytes(gzip.compress(b"{}" * 999)[:-9])
    for name in ("a.jsonl.gz", "b.jsonl", "c.jsonl.gz", "absent.jsonl"):
        with pytest.raises(InvalidInputError, match=name):
            list(read_examples(tmp_path / name))


def test_lone_surrogates_are_replaced(tmp_path):
    path = write(tmp_path / "a.jsonl", '{"question": "Q\\ud800?", "answers": ["a\\udc00"], "context": "a\\udc00 b"}')
    (example,) = read_examples(path)
    assert (example.question, example.answers, example.golds[0].text) == ("Q�?", ("a�",), "a� b")


def test_corpus_can_be_rows_contexts_or_a_folder(tmp_path):
    lines = write(
        tmp_path / "a.jsonl", json.dumps({"text": "One.", "title": "T"}) + "\n" + json.dumps({"text": "Two."})
    )
    table = write(tmp_path / "b.tsv", "id\ttext\ttitle\n1\tOne.\tT\n")
    folder = tmp_path / "docs"
    folder.mkdir()
    write(folder / "c.md", "# Head\n\nThree.")
    write(folder / "skipped.bin", "x")
    assert list(read_corpus(lines)) == [Passage("One.", "T"), Passage("Two.")]
    assert list(read_corpus(table)) == [Passage("One.", "T")]
    assert list(read_corpus(write(tmp_path / "s.json", json.dumps(SQUAD)))) == [Passage(CONTEXT, "Arda")] * 2
    assert [p.title for p in read_corpus(folder)] == ["Head"]
    with pytest.raises(InvalidInputError, match="line 1 of the corpus has neither text nor a context"):
        list(read_corpus(write(tmp_path / "n.jsonl", json.dumps(ROWS["NQ-open"]))))
    with pytest.raises(InvalidInputError, match="line 1 of the corpus has neither text nor a context"):
        list(read_corpus(write(tmp_path / "b.jsonl", '{"title": "T", "body": "Four."}')))
    with pytest.raises(InvalidInputError, match="line 1: text"):
        list(read_corpus(write(tmp_path / "e.jsonl", '{"text": 1}')))


def test_byte_order_mark_is_skipped(tmp_path):
    rows = {"a.tsv": "question\tanswer\nQ?\ta\n", "a.jsonl": '{"question": "Q?", "answers": ["a"]}'}
    for name, text in rows.items():
        (example,) = read_examples(write(tmp_path / name, "\ufeff" + text))
        assert (example.question, example.answers) == ("Q?", ("a",))


CELLS = ['6" pipe', '"yes', '5"', '"Gull"', '""', '"', 'say "x" now', "plain", "'", '"a" and "b"']


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_table_with_any_quotes_has_one_row_for_each_line(tmp_path, end):
    lines = ["question\tanswer\tcontext", *(f"Q{n}?\t{cell}\t{cell} c" for n, cell in enumerate(CELLS))]
    (tmp_path / "a.tsv").write_bytes((end.join(lines) + end).encode())
    examples = list(read_examples(tmp_path / "a.tsv"))
    assert [(e.question, e.answers[0], e.golds[0].text) for e in examples] == [
        (f"Q{n}?", cell, f"{cell} c") for n, cell in enumerate(CELLS)
    ]
    assert [e.where for e in examples][-1] == f"a.tsv, line {len(CELLS) + 1}"


@pytest.mark.parametrize("quoting", [csv.QUOTE_MINIMAL, csv.QUOTE_ALL])
def test_table_of_a_program_is_read_as_it_was_written(tmp_path, quoting):
    cells = [*CELLS, "two\nlines", "a\ttab", 'both "\n\tx', "two\n\nlines"]
    with (tmp_path / "a.tsv").open("w", newline="") as file:
        writer = csv.writer(file, delimiter="\t", quoting=quoting, lineterminator="\n")
        writer.writerows([["question", "answer", "context"], *([f"Q{n}?", c, "x"] for n, c in enumerate(cells))])
    examples = list(read_examples(tmp_path / "a.tsv"))
    assert [(e.question, e.answers) for e in examples] == [(f"Q{n}?", (c,)) for n, c in enumerate(cells)]


def test_row_with_too_many_cells_is_an_error(tmp_path):
    path = write(tmp_path / "a.tsv", "question\tanswer\nQ?\ta\t\nQ?\ta\tb\n")
    rows = read_examples(path)
    assert next(rows).answers == ("a",)
    with pytest.raises(InvalidInputError, match=r"a\.tsv, line 3 has 3 cells, but the header has 2"):
        next(rows)


def test_time_of_tables_grows_in_step_with_their_lines(tmp_path):
    def run(lines: int) -> None:
        list(read_table(['"a\tb\tc', *['x"\t"y', 'x\t"y'] * lines], "a.tsv"))

    assert growth_of_time(run, 1_000) < 10


def test_table_cell_can_be_a_list_of_answers(tmp_path):
    cells = {'["Bob", "Rob"]': ("Bob", "Rob"), "[1]": ("[1]",), "[sic": ("[sic",), "Bob": ("Bob",)}
    lines = ["question\tanswers", *(f"Q?\t{cell}" for cell in cells)]
    assert [e.answers for e in read_examples(write(tmp_path / "a.tsv", "\n".join(lines)))] == list(cells.values())
