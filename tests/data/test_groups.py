"""Rows in groups: one set of passages for all, one gold passage for each, and each answer in one passage only."""

from __future__ import annotations

import json
from collections import Counter
from itertools import groupby

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_training import engine, trainer
from towns import TOWNS, build, corpora, worlds, write

from kvfusion_rag import InvalidInputError
from kvfusion_rag.cli import main
from kvfusion_rag.data import DataOptions, Example
from kvfusion_rag.data.mining import text_key
from kvfusion_rag.data.rows import Passage, QARow, read_rows
from kvfusion_rag.evaluation import answer_in_text
from kvfusion_rag.training.examples import encode_row, group_by_documents, require_answerable
from tests.data.test_build import assert_nothing_excluded
from tests.retrieval.test_retrieval import count_words

grouped = st.builds(
    DataOptions,
    passages=st.integers(1, 4).map(lambda n: (n, n)),
    negatives=st.permutations(["bm25", "dense", "random"]).flatmap(
        lambda names: st.integers(1, 3).map(lambda n: tuple(names[:n]))
    ),
    max_tokens=st.sampled_from([None, 5, 9]),
    seed=st.integers(0, 3),
    grouped=st.just(True),
)


def groups_of(rows: list[QARow]) -> list[list[QARow]]:
    """Group adjacent rows with the same passages in the same slots."""
    return [list(group) for _, group in groupby(rows, key=lambda row: [(p.text, p.title) for p in row.passages])]


@settings(max_examples=40)
@given(worlds, grouped, st.none() | corpora, st.just([]) | worlds)
def test_groups_keep_the_laws_of_gold_passages_exclusion_and_counts(world, options, corpus, excluded):
    if (built := build(world, options, corpus=corpus, exclude=excluded)) is None:
        return
    builder, rows = built
    known = {example.id: example for example in world}
    assert max(Counter(row.id for row in rows).values(), default=1) == 1
    for row in rows:
        assert len(row.passages) == options.passages[0] and len(row.gold) == 1
        assert set(row.answers) == set(known[row.id].answers)
        assert len({text_key(passage.text) for passage in row.passages}) == len(row.passages)
        assert all(answer_in_text(p.text, row.answers) == p.gold for p in row.passages)
        assert not any(answer_in_text(p.title or "", row.answers) for p in row.passages if not p.gold)
        assert options.max_tokens is None or all(count_words(p.text) <= options.max_tokens for p in row.passages)
        assert row.evidence is None or row.evidence in row.gold[0].text
        require_answerable(row, row.id)
    assert_nothing_excluded(rows, excluded, options)
    sets = [frozenset(p.text for p in group[0].passages) for group in groups_of(rows)]
    report = builder.report
    assert len(sets) <= report.groups  # adjacent groups can have equal sets by chance
    assert report.read == len(world) == report.kept + report.dropped.total() and report.kept == len(rows)
    assert report.negatives.total() == report.groups * (options.passages[0] - 1)
    assert report.no_gold == report.unanswerable == 0


@settings(max_examples=15)
@given(worlds, grouped)
def test_equal_questions_options_and_seed_give_equal_groups(world, options):
    assert (build(world, options) or [[]])[-1] == (build(world, options) or [[]])[-1]


def test_group_is_a_passage_with_its_nearest_passages_and_all_their_questions():
    far = [
        Example(str(n), f"f{n}", f"Who sang {n}?", (f"Ann{n}",), (Passage(f"Ann{n} sang song {n}.", None, True),))
        for n in range(6)
    ]
    for negatives in ("bm25", "dense"):
        options = DataOptions((6, 6), (negatives,), grouped=True)
        builder, rows = build([*TOWNS, *far], options)
        groups = groups_of(rows)
        assert [len(group) for group in groups] == [6, 6, 6] and builder.report.groups == 3
        assert all(all("mill" in p.text for p in group[0].passages) for group in groups[:2])
        assert all("sang" in passage.text for passage in groups[2][0].passages)


def test_gold_passage_can_be_at_any_slot():
    golds = set()
    for seed in range(8):
        for row in build(TOWNS, DataOptions((4, 4), seed=seed, grouped=True))[1]:
            golds.add(next(n for n, passage in enumerate(row.passages) if passage.gold))
    assert golds == {0, 1, 2, 3}


def test_question_whose_answer_is_in_two_passages_waits_for_another_group():
    mills = [
        Example("m", name, f"Who owns it, {name}?", (owner,), (Passage(f"The {name} mill: {owner}'s.", None, True),))
        for name, owner in [("old", "Ann"), ("new", "Ben"), ("red", "Ben"), ("tall", "Cleo")]
    ]
    builder, rows = build(mills, DataOptions((3, 3), grouped=True))
    assert sorted(row.id for row in rows) == ["new", "old", "red", "tall"]
    assert builder.report.passed_over >= 2 and not builder.report.dropped
    for row in rows:
        assert sum(row.answers[0] in passage.text for passage in row.passages) == 1


def test_passage_with_the_answer_in_its_title_is_not_in_the_group():
    asked = [
        Example("m", "seed", "Who owns the old mill?", ("Ann",), (Passage("Ann's is the old mill.", "Mills", True),)),
        Example("m", "near", "How is the old mill?", ("red",), (Passage("The old mill is red.", "Ann", True),)),
        Example("m", "far", "What of the tower?", ("tall",), (Passage("A tall tower it is.", "Towers", True),)),
    ]
    builder, rows = build(asked, DataOptions((2, 2), grouped=True))
    assert {row.id: {p.title for p in row.passages} for row in rows} == {
        "seed": {"Mills", "Towers"}, "far": {"Mills", "Towers"}, "near": {"Ann", "Mills"}
    }  # fmt: skip
    asked[0], asked[1] = (
        Example("m", one.id, one.question, one.answers, (Passage(one.golds[0].text, title, True),))
        for one, title in zip(asked, ("Mills", "Tall mills"), strict=False)
    )
    builder, rows = build(asked, DataOptions((3, 3), grouped=True))  # "far" would join without a title there
    assert [row.id for row in rows] == ["seed", "near"] and builder.report.passed_over == 1
    assert builder.report.dropped == {"too few passages without the answer": 1}


def test_unanswerable_questions_are_dropped_and_gold_passages_can_come_from_the_corpus():
    bare = Example("nq, line 1", "bare", "When was the mill of Dorn built?", ("1903",))
    never = Example("s, line 1", "never", "When did Arda burn?", (), (Passage("Arda is red."),))
    corpus = [passage for town in TOWNS for passage in town.golds]
    builder, rows = build([bare, never, TOWNS[0]], DataOptions((4, 4), grouped=True), corpus=corpus)
    assert {row.id for row in rows} == {"bare", TOWNS[0].id} and builder.report.gold_found == 1
    assert list(builder.report.dropped) == ["has no answer, so the passages near its context may answer it"]
    with pytest.raises(InvalidInputError, match=r"s, line 1.*has no answer"):
        build([never, TOWNS[0]], DataOptions((2, 2), strict=True, grouped=True), corpus=corpus)


def test_pieces_of_a_long_context_are_shared_and_an_answer_across_them_is_dropped():
    context = "One two three four. Five six seven eight. Nine ten."
    asked = [
        Example("l, line 1", "in", "What is after five?", ("six seven",), (Passage(context, None, True),)),
        Example("l, line 2", "over", "What is after three?", ("four. Five",), (Passage(context, None, True),)),
    ]
    builder, rows = build([*asked, *TOWNS], DataOptions((3, 3), max_tokens=5, grouped=True))
    row = next(row for row in rows if row.id == "in")
    assert row.gold[0].text == "Five six seven eight." and "One" not in str(row.passages)
    assert builder.report.dropped["answer is split over two pieces of its context"] == 1


def test_gold_piece_contains_the_given_start():
    context = "Many took part in it. Then came art at last. More of it."
    passage = Passage(context, None, True)
    at = Example("l, line 1", "at", "What came?", ("art",), (passage,), answer_start=context.index(" art ") + 1)
    inside = Example("l, line 2", "inside", "What took many?", ("art",), (passage,), answer_start=context.index("art"))
    _, rows = build([at, *TOWNS], DataOptions((3, 3), max_tokens=5, grouped=True))
    assert next(row for row in rows if row.id == "at").gold[0].text == "Then came art at last."
    _, rows = build([inside, *TOWNS], DataOptions((3, 3), max_tokens=5, grouped=True))
    assert next(row for row in rows if row.id == "inside").gold[0].text == "Many took part in it."


@pytest.mark.parametrize("least", [1, 2, 4, 7])
def test_small_groups_are_dropped(least):
    far = [
        Example(str(n), f"f{n}", f"Who sang {n}?", (f"Ann{n}",), (Passage(f"Ann{n} sang song {n}.", None, True),))
        for n in range(3)
    ]
    whole = groups_of(build([*TOWNS, *far], DataOptions((3, 3), grouped=True))[1])
    builder, rows = build([*TOWNS, *far], DataOptions((3, 3), grouped=True, group_questions=least))
    kept = [group for group in whole if len(group) >= least]
    assert groups_of(rows) == kept and builder.report.groups == len(kept)
    left_out = sum(map(len, whole)) - sum(map(len, kept))
    assert builder.report.dropped["belongs to a group of too few questions"] == left_out
    assert builder.report.negatives.total() == 2 * len(kept)


def test_invalid_options_raise():
    for wrong in ({"passages": (2, 3)}, {"passages": (3, 3), "no_gold": 0.5}):
        with pytest.raises(InvalidInputError, match="share one set"):
            DataOptions(**wrong, grouped=True)
    for wrong in ({"group_questions": 2}, {"group_questions": 0, "grouped": True, "passages": (2, 2)}):
        with pytest.raises(InvalidInputError, match="1 unless rows are grouped"):
            DataOptions(**wrong)


def test_command_writes_groups_that_training_packs(tmp_path, capsys):
    lines = [
        {"id": town.id, "question": town.question, "answers": list(town.answers), "context": town.golds[0].text}
        for town in TOWNS
    ]
    source = write(tmp_path / "towns.jsonl", "\n".join(map(json.dumps, lines)))
    out = tmp_path / "rows.jsonl.gz"
    assert main(["build-data", str(source), "--out", str(out), "--group", "4"]) == 0
    assert "12 rows in 3 groups that share 4 passages, of 12 questions read" in capsys.readouterr().out
    made = engine()
    examples = [
        encode_row(row, made, end_id=made.model.decoder.end_id, evidence=False, joined=False) for row in read_rows(out)
    ]
    assert [len(group) for group in group_by_documents(examples)] == [4, 4, 4]


def test_shared_documents_of_adjacent_rows_are_encoded_once(tmp_path, monkeypatch):
    passages = [tuple(Passage(f"{letter} {n} stands here.", gold=n == 0) for n in range(3)) for letter in "ab"]
    rows = [QARow(f"{n}", f"which {n}", ("here",), passages[n // 3]) for n in range(6)]
    made = engine()
    expected = [encode_row(row, made, end_id=made.model.decoder.end_id, evidence=False, joined=False) for row in rows]
    read, asked = made.read, []
    monkeypatch.setattr(made, "read", lambda documents, layout: asked.append(documents) or read(documents, layout))
    run = trainer(tmp_path, made, rows)
    assert run.examples == expected and len(asked) == 2
