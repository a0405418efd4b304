"""Writing of training rows, and ``kvfusion build-data``."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from indexes import WordEmbedder, count_words
from towns import TOWNS, rows_of, write

from kvfusion_rag import InvalidInputError
from kvfusion_rag.cli import build_data, main
from kvfusion_rag.data import check_output, write_training_rows
from kvfusion_rag.data.rows import read_rows


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz"])
def test_file_is_written_completely_or_not_at_all(tmp_path, name):
    path = tmp_path / name
    rows = rows_of(TOWNS, passages=(3, 3))
    assert write_training_rows(path, rows) == len(rows) and list(read_rows(path)) == rows
    first = path.read_bytes()

    def broken():
        yield rows[0]
        raise InvalidInputError("broken")

    for bad, message in ((broken(), "broken"), ([], "no rows are left")):
        with pytest.raises(InvalidInputError, match=message):
            write_training_rows(path, bad)
        assert path.read_bytes() == first and list(tmp_path.iterdir()) == [path]
    write_training_rows(tmp_path / f"again-{name}", rows)
    assert (tmp_path / f"again-{name}").read_bytes() == first


def test_existing_files_are_protected(tmp_path):
    old = write(tmp_path / "old.jsonl", "x")
    for path, force, inputs, message in [
        (old, False, [], "already exists"),
        (old, True, [tmp_path / "." / "old.jsonl"], "also an input"),
        (tmp_path, True, [], "is a folder"),
        (tmp_path / "absent" / "x.jsonl", False, [], "folder of .* does not exist"),
    ]:
        with pytest.raises(InvalidInputError, match=message):
            check_output(path, force=force, inputs=inputs)
    check_output(old, force=True)


@pytest.mark.skipif(os.geteuid() == 0, reason="root can write everywhere")
def test_unwritable_folder_raises_before_the_work(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(InvalidInputError, match="cannot be written to"):
        check_output(tmp_path / "rows.jsonl", force=False)


@pytest.fixture
def towns(tmp_path) -> Path:
    lines = [
        {"id": town.id, "question": town.question, "answers": list(town.answers)}
        | {"context": town.golds[0].text, "title": town.golds[0].title}
        for town in TOWNS
    ]
    return write(tmp_path / "towns.jsonl", "\n".join(map(json.dumps, lines)))


def run(*arguments: str | Path) -> int:
    return main(["build-data", *map(str, arguments)])


def test_command_writes_rows_and_report(towns, tmp_path, capsys):
    lines = towns.read_text().splitlines()
    judged = write(tmp_path / "dev.jsonl", lines[0])
    lines.append(
        json.dumps({"question": "Where?", "answers": ["Rome"], "context": "The mill of Arda was built in 1900."})
    )
    write(towns, "\n".join(lines))
    out = tmp_path / "out.jsonl.gz"
    arguments = (towns, "--out", out, "--passages", "3-5", "--exclude", judged, "--no-gold", "0.2")
    assert run(*arguments) == 0
    shown = capsys.readouterr().out
    assert "11 rows of 3 to 5 passages, of 13 questions read" in shown
    assert "12 distinct passages in the pool, 1 others excluded" in shown
    assert "1: answer is not in its context (first: towns.jsonl, line 13)" in shown
    assert "1: question is in an excluded file (first: towns.jsonl, line 1)" in shown
    first = out.read_bytes()
    assert run(*arguments, "--force", "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert out.read_bytes() == first and len(list(read_rows(out))) == report["kept"] == 11
    assert report["dropped"] == {"question is in an excluded file": 1, "answer is not in its context": 1}
    assert run(*arguments, "--force", "--strict") == 2 and out.read_bytes() == first
    assert "towns.jsonl, line 13 (id '13'): answer is not in its context" in capsys.readouterr().err


def test_command_without_rows_left_reports_the_reasons(towns, tmp_path, capsys):
    assert run(towns, "--out", tmp_path / "out.jsonl", "--exclude", towns, "--passages", "2") == 2
    assert "0 distinct passages (and 12 excluded ones)" in capsys.readouterr().err
    lines = [{"question": f"Where? {n}", "answers": ["Rome"], "context": f"{n} is red."} for n in range(3)]
    write(tmp_path / "none.jsonl", "\n".join(map(json.dumps, lines)))
    assert run(tmp_path / "none.jsonl", "--out", tmp_path / "out.jsonl", "--passages", "2") == 2
    error = capsys.readouterr().err
    assert "of 3 questions: 3: answer is not in its context (first: none.jsonl, line 1)" in error
    assert error.count("\n") == 1 and not (tmp_path / "out.jsonl").exists()


def test_command_cuts_and_mines_with_vectors(towns, tmp_path, monkeypatch):
    monkeypatch.setattr("kvfusion_rag.retrieval.SentenceTransformerEmbedder", lambda name, device: WordEmbedder())
    monkeypatch.setattr(build_data, "load_token_counter", lambda model: (count_words, None))
    out = tmp_path / "out.jsonl"
    assert run(towns, "--out", out, "--passages", "4", "--negatives", "dense,bm25", "--max-tokens", "10") == 0
    rows = list(read_rows(out))
    assert len(rows) == 12 and all(row.answers[0] in row.gold[0].text for row in rows)
    assert all(count_words(passage.text) <= 9 for row in rows for passage in row.passages)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--passages", "20"], "passages is 20, but the corpus has 12"),
        (["--passages", "5-2"], "'5-2' is not a number"),
        (["--group", "20"], "passages is 20, but the corpus has 12"),
        (["--group", "4", "--passages", "4"], "--group is given with --passages"),
        (["--group", "4", "--no-gold", "0.1"], "--group is given with --passages or --no-gold"),
        (["--negatives", "bm25,magic"], "is not some of"),
        (["--no-gold", "2"], "not a number from 0 to 1"),
        (["--exclude", "absent.jsonl"], "'absent.jsonl' does not exist"),
        (["--dataset", "squad"], "name one of the two"),
        (["--out", "rows.txt"], "must be a .jsonl"),
    ],
)
def test_wrong_argument_is_one_line_and_nothing_is_written(towns, tmp_path, capsys, arguments, message):
    out = tmp_path / "out.jsonl"
    assert run(towns, "--out", out, *arguments) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and error.startswith("kvfusion: error: ")
    assert list(tmp_path.iterdir()) == [towns]


def test_existing_output_is_only_replaced_with_force(towns, tmp_path, capsys):
    out = write(tmp_path / "out.jsonl", "mine")
    assert run(towns, "--out", out, "--passages", "3") == 2 and out.read_text() == "mine"
    assert run(towns, "--out", towns, "--passages", "3", "--force") == 2
    assert capsys.readouterr().err.count("\n") == 2
    assert run(towns, "--out", out, "--passages", "3", "--force") == 0 and out.read_text() != "mine"
