"""An evaluation that was interrupted anywhere resumes to the figures of an uninterrupted one."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from readers import Reader, rows

from kvfusion_rag import InvalidInputError
from kvfusion_rag.evaluation.journal import BEGINNING, Journal
from kvfusion_rag.evaluation.orders import plan_conditions
from kvfusion_rag.evaluation.runner import predict

FACTS = {"rows": "digest", "documents": 5, "seed": 0, "batch_size": 3}


def readers() -> list[Reader]:
    return [Reader("all"), Reader("first two", 2), Reader("few", limit=4)]  # the last cannot answer


def run(path, made, systems, conditions=None):
    journal = Journal(path, FACTS)
    journal.require(systems)
    return predict(made, systems, plan_conditions(made, conditions), batch_size=3, journal=journal)


@settings(max_examples=40)
@given(st.integers(1, 8), st.data())
def test_run_interrupted_at_any_byte_resumes_to_equal_answers(tmp_path_factory, count, data):
    path, made = tmp_path_factory.mktemp("journal") / "answers.jsonl", rows(count)
    expected = run(path, made, readers())
    assert expected == predict(made, readers(), plan_conditions(made), batch_size=3)
    content = path.read_bytes()
    path.write_bytes(content[: data.draw(st.sampled_from([0, *range(len(BEGINNING), len(content) + 1)]))])
    assert run(path, made, readers()) == expected
    assert run(path, made, systems := readers()) == expected
    assert not any(system.batches for system in systems)  # all answers are in the file


@pytest.mark.parametrize(
    "content", ["[" * 100_000, "3", "[1]", '{"identity": 3}', '{"answer": [1], "system": 2}', "\xff"]
)
def test_file_that_is_not_a_journal_is_an_error(tmp_path, content):
    (tmp_path / "a").write_bytes(content.encode("latin-1") + b"\n")
    with pytest.raises(InvalidInputError, match="is not a journal"):
        Journal(tmp_path / "a", FACTS)


def test_incomplete_batches_are_asked_again(tmp_path):
    made = rows(6)
    expected = run(tmp_path / "a", made, readers(), ["original"])
    lines = (tmp_path / "a").read_bytes().splitlines(keepends=True)
    (tmp_path / "a").write_bytes(b"".join(lines[:-1]))  # the last system's last row of two batches
    systems = readers()
    assert run(tmp_path / "a", made, systems, ["original"]) == expected
    assert [system.batches[:1] for system in systems] == [[], [], [3]]


def test_run_with_more_systems_and_conditions_resumes(tmp_path):
    made = rows(4)
    run(tmp_path / "a", made, readers()[:1], ["original"])
    systems = readers()[:2]
    assert run(tmp_path / "a", made, systems, ["original", "slot:5"]) == predict(
        made, readers()[:2], plan_conditions(made, ["original", "slot:5"]), batch_size=3
    )
    assert systems[0].batches == [3, 1] and systems[1].batches == [3, 3, 1, 1]


def test_file_of_another_run_or_kind_is_rejected_and_unchanged(tmp_path):
    path, made = tmp_path / "a", rows(3)
    run(path, made, readers())
    content = path.read_bytes()
    with pytest.raises(InvalidInputError, match="another run: seed is 0 there and 1 here"):
        Journal(path, FACTS | {"seed": 1})
    changed = Reader("all")
    changed.identity = lambda: {"model_id": "another"}
    with pytest.raises(InvalidInputError, match="model_id of 'all' is 'fake/all' there and 'another' here"):
        Journal(path, FACTS).require([changed])
    assert path.read_bytes() == content
    for other in (
        b"mine",
        b"mine\n",
        b'{"id": 3}\n',
        b"[1]\n",
        b'{"system": "a", "identity": {}}\n',
        b"\xff\n",
        b"3\n",
    ):
        path.write_bytes(other)
        with pytest.raises(InvalidInputError, match="is not a journal of an evaluation"):
            Journal(path, FACTS)
        assert path.read_bytes() == other


def test_command_resumes(capsys, command, tmp_path):
    options = ["rows.jsonl.gz", "--conditions", "original,slot:2", "--resume", "answers.jsonl", "--json"]
    options += ["--systems", "fusion,concat"]

    def figures(*more):
        assert command(*options, *more) == 0
        found = json.loads(capsys.readouterr().out)
        return found["cells"], found["differences"]

    expected = figures()
    lines = (tmp_path / "answers.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "answers.jsonl").write_text("".join(lines[: len(lines) // 2]))
    assert figures() == expected == figures()
    assert command(*options, "--seed", 3) == 2 and "seed is 0 there and 3 here" in capsys.readouterr().err
    assert command(*options, "--output", "answers.jsonl") == 2 and "named twice" in capsys.readouterr().err
