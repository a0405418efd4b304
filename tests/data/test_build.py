"""Training rows: the laws of gold passages and negatives, and how passages are chosen."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from indexes import count_words
from towns import MILLS, NAMES, TOWNS, WORDS, build, corpora, make_builder, rows_of, worlds

from kvfusion_rag import InvalidInputError
from kvfusion_rag.data import DataOptions, Example
from kvfusion_rag.data.exclusion import SHORTEST, Exclusion
from kvfusion_rag.data.mining import text_key
from kvfusion_rag.data.rows import Passage, QARow
from kvfusion_rag.evaluation import answer_in_text, normalize_answer

options = st.builds(
    DataOptions,
    passages=st.tuples(st.integers(1, 2), st.integers(2, 4)),
    negatives=st.permutations(["bm25", "dense", "random"]).flatmap(
        lambda names: st.integers(1, 3).map(lambda n: tuple(names[:n]))
    ),
    no_gold=st.sampled_from([0.0, 0.5, 1.0]),
    max_tokens=st.sampled_from([None, 5, 9]),
    seed=st.integers(0, 3),
)


@settings(max_examples=40)
@given(worlds, options, st.none() | corpora, st.just([]) | worlds)
def test_rows_keep_the_laws_of_gold_passages_exclusion_and_counts(world, options, corpus, excluded):
    if (built := build(world, options, corpus=corpus, exclude=excluded)) is None:
        return
    builder, rows = built
    known = {example.id: example for example in world}
    for row in rows:
        answers = known[row.id].answers
        assert options.passages[0] <= len(row.passages) <= options.passages[1]
        assert len(row.gold) == bool(row.answers)
        assert set(row.answers) in (set(), set(answers))
        assert len({text_key(passage.text) for passage in row.passages}) == len(row.passages)
        for passage in row.passages:
            assert answer_in_text(passage.text, answers) == passage.gold
            assert passage.gold or not answer_in_text(passage.title or "", answers)
            assert options.max_tokens is None or count_words(f"{passage.title or ''} {passage.text}") <= 9
        if row.evidence is not None:
            assert row.evidence in row.gold[0].text and answer_in_text(row.evidence, row.answers[:1])
    assert_nothing_excluded(rows, excluded, options)
    report = builder.report
    assert report.read == len(world) == report.kept + report.dropped.total()
    assert report.kept == len(rows)
    assert report.no_gold + report.unanswerable == sum(not row.answers for row in rows)
    assert report.evidence == sum(row.evidence is not None for row in rows)
    assert report.negatives.total() == sum(len(row.passages) - len(row.gold) for row in rows)
    assert set(report.first_dropped) == set(report.dropped)


def assert_nothing_excluded(rows: list[QARow], excluded: list[Example], options: DataOptions) -> None:
    questions = {text_key(example.question) for example in excluded}
    contexts = {text_key(passage.text) for example in excluded for passage in example.passages}
    for row in rows:
        assert text_key(row.question) not in questions
        if options.max_tokens is None:  # a piece of another text can equal an excluded context
            assert contexts.isdisjoint(text_key(passage.text) for passage in row.passages)


@settings(max_examples=15)
@given(worlds, options)
def test_equal_questions_options_and_seed_give_equal_rows(world, options):
    assert (build(world, options) or [[]])[-1] == (build(world, options) or [[]])[-1]


def test_excluded_context_drops_all_its_questions():
    unanswerable = Example("x", "x", "When did it burn?", (), (replace(TOWNS[1].golds[0], gold=False),))
    judged = [Example("dev", "d", "Who built it?", ("Ann",), TOWNS[n].golds) for n in (0, 1)]
    builder = make_builder([*TOWNS, unanswerable], DataOptions(passages=(3, 3)), exclude=judged)
    assert [row.id for row in builder.rows()] == [town.id for town in TOWNS[2:]]
    assert builder.report.dropped == {"context is in an excluded file": 3}


words = st.lists(st.sampled_from(WORDS), min_size=1, max_size=40)


@given(st.lists(words, max_size=4), words, st.data())
def test_context_that_contains_or_is_part_of_an_excluded_one_is_found(excluded, context, data):
    source = data.draw(st.sampled_from([*excluded, context]))
    start = data.draw(st.integers(0, len(source) - 1))
    part = source[start : data.draw(st.integers(start + 1, len(source)))]
    if data.draw(st.booleans()):
        excluded = [*excluded, part]
    else:
        context = part
    judged = Exclusion([Example("dev", "d", "?", (), tuple(Passage(" ".join(words)) for words in excluded))])
    texts, text = [normalize_answer(" ".join(words)) for words in excluded], normalize_answer(" ".join(context))
    expected = text in texts or any(
        (a in b or b in a) and min(len(a.split()), len(b.split())) >= SHORTEST for a, b in ((text, t) for t in texts)
    )
    assert judged.has_context(b"", text) == expected


@pytest.mark.parametrize("grouped", [False, True])
def test_truncated_evaluation_passages_exclude_their_contexts(grouped):
    """The passage can be gold or a negative there, and the training context can be the shorter text."""
    sentence = "It has {} hills, two lakes and one road."
    long = [
        Example("t", f"t{n}", f"Where is {name}?", ("inland",),
                (Passage(f"{name} is inland. {sentence.format(n)} It is red.", name, True),))
        for n, name in enumerate(NAMES)
    ]  # fmt: skip
    cut = (Passage(sentence.format(1), "Bree", True), Passage(sentence.format(3), "Dorn"))
    judged = [
        Example("dev", "d", "How many hills has Bree?", ("1 hills",), cut),
        Example("dev", "e", "What is red?", ("Esk",), (Passage(f"{long[4].golds[0].text} Esk is red.", None, True),)),
    ]
    builder = make_builder(long, DataOptions((3, 3), grouped=grouped), corpus=MILLS, exclude=judged)
    rows = list(builder.rows())
    assert {row.id for row in rows} == {one.id for one in long} - {"t1", "t3", "t4"}
    assert builder.report.dropped == {"context is in an excluded file": 3}
    assert not any(word in p.text for word in ("Bree", "Dorn", "Esk") for row in rows for p in row.passages)


def test_gold_passage_can_be_at_any_slot():
    seeds = range(12)
    slots = {next(n for n, p in enumerate(row.passages) if p.gold) for seed in seeds for row in rows_of(
        TOWNS, passages=(4, 4), seed=seed)}  # fmt: skip
    assert slots == {0, 1, 2, 3}
    assert len({str(rows_of(TOWNS, passages=(4, 4), seed=seed)) for seed in seeds}) == len(seeds)


def test_number_of_passages_covers_the_range():
    assert {len(row.passages) for row in rows_of(TOWNS, passages=(1, 4))} == {1, 2, 3, 4}


def test_evidence_is_the_sentence_with_the_answer():
    assert [row.evidence for row in rows_of(TOWNS, passages=(3, 3))][4] == "Its mill was built in 1904."


def test_passage_that_answers_the_question_elsewhere_is_not_a_negative():
    swapped = Example("x", "x", TOWNS[0].question, ("1850",), (Passage("Arda's mill: 1850.", None, True),))
    rows = rows_of([*TOWNS[:4], swapped], passages=(4, 4))
    assert all(
        "Arda" not in p.text for row in rows if row.question == swapped.question for p in row.passages if not p.gold
    )
    assert len(rows) == 5


def test_bm25_chooses_similar_passages():
    far = [
        Example(str(n), f"f{n}", f"Who sang {n}?", ("Ann",), (Passage(f"Ann sang {n}.", None, True),))
        for n in range(9)
    ]
    row = rows_of([*TOWNS, *far], passages=(6, 6))[0]
    assert all("mill" in passage.text for passage in row.passages)


def test_sources_are_used_in_turn_and_random_passages_fill_up():
    builder = make_builder(TOWNS, DataOptions(passages=(5, 5), negatives=("bm25", "random")))
    list(builder.rows())
    assert builder.report.negatives == {"bm25": 24, "random": 24}
    strange = [Example(str(n), str(n), f"Zzz{n}?", e.answers, e.golds) for n, e in enumerate(TOWNS)]
    builder = make_builder(strange, DataOptions(passages=(5, 5)))
    list(builder.rows())
    assert builder.report.negatives == {"fill": 48}


def test_given_passages_are_used_before_mined_ones():
    others = (Passage("Built in 1900, they say."), Passage("Nobody knows the mill."), Passage("Mills grind."))
    asked = Example("x", "x", TOWNS[0].question, ("1900",), (*others, *TOWNS[0].golds))
    row = rows_of([asked, *TOWNS[1:]], passages=(4, 4))[0]
    texts = {passage.text for passage in row.passages}
    assert {others[1].text, others[2].text} < texts and others[0].text not in texts


def test_passage_with_the_answer_in_its_title_is_not_a_negative():
    """This holds for given, similar and random passages. A gold passage is judged only by its text."""
    asked = Example(
        "x", "x", "Who built the mill of Arda?", ("Edda Marsh",),
        (Passage("She was born in Bree.", "Edda Marsh"), Passage("Edda Marsh built the mill of Arda.", None, True)),
    )  # fmt: skip
    corpus = [Passage(f"The mill of Arda was built in part {n}.", "Edda Marsh (builder)") for n in range(4)]
    corpus += [Passage(f"The mill of Arda has part {n}.", "Mills") for n in range(3)]
    for negatives in (("bm25",), ("random",)):
        (row,) = make_builder([asked], DataOptions((4, 4), negatives), corpus=corpus).rows()
        assert sorted(passage.title or "" for passage in row.passages) == ["", "Mills", "Mills", "Mills"]
    builder = make_builder([asked], DataOptions((5, 5)), corpus=corpus)
    assert not list(builder.rows()) and builder.report.dropped == {"too few passages without the answer": 1}
    titled = Example("y", "y", "Who?", ("Edda Marsh",), (Passage("She built it.", "Edda Marsh", True),))
    builder = make_builder([titled], DataOptions((2, 2)), corpus=corpus)
    assert not list(builder.rows()) and builder.report.dropped == {"answer is not in its context": 1}


def test_unanswerable_question_keeps_its_context():
    asked = Example("x", "x", "When did the mill of Arda burn?", (), (Passage("The mill of Arda was red."),))
    row = rows_of([*TOWNS, asked], passages=(4, 4))[-1]
    assert row.answers == () and row.gold == () and "The mill of Arda was red." in [p.text for p in row.passages]


def test_question_without_context_gets_the_best_passage_with_the_answer():
    corpus = [passage for example in TOWNS for passage in example.golds] + [Passage("1903 was a year.")]
    asked = [Example("x", "x", "When was the mill of Dorn built?", ("the year 1903", "1903"))]
    builder = make_builder(asked, DataOptions(passages=(5, 5)), corpus=corpus)
    (row,) = builder.rows()
    assert row.gold[0].title == "Dorn" and row.answers[0] == "1903"
    assert row.evidence == "Its mill was built in 1903." and builder.report.gold_found == 1


def test_answer_in_the_passage_comes_first():
    asked = Example("x", "x", "Where?", ("Inch Town", "Arda"), TOWNS[0].golds)
    assert rows_of([asked, *TOWNS[1:]], passages=(2, 2))[0].answers == ("Arda", "Inch Town")


def test_answer_within_a_word_counts_if_the_file_gives_its_start():
    gold = (Passage("The 67-member house met in 1990–91.", None, True),)
    found = Example("x", "x", "In which year?", ("1990",), gold, answer_start=27)
    assert rows_of([found, *TOWNS], passages=(3, 3))[0].evidence == gold[0].text


REASONS = {
    "answer is not in its context": Example("f, line 3", "x", "When?", ("2050",), TOWNS[0].golds),
    "no passage is marked gold": Example("f, line 3", "x", "When?", ("1900",), (Passage("Arda: 1900."),)),
    "more than one passage is marked gold": Example("f, line 3", "x", "?", ("1900",), TOWNS[0].golds + TOWNS[1].golds),
    "answer is longer than max_tokens": Example(
        "f, line 3", "x", "?", ("a b c d e f g h i j k l",), (Passage("a b c d e f g h i j k l m.", None, True),)
    ),
    "too few passages without the answer": Example(
        "f, line 3", "x", "?", ("mill",), (Passage("A mill.", None, True),)
    ),
}  # fmt: skip


@pytest.mark.parametrize("reason", REASONS)
def test_unusable_question_is_counted_or_raises(reason):
    world = [*TOWNS, REASONS[reason]]
    builder = make_builder(world, DataOptions(passages=(3, 3), max_tokens=10))
    assert len(list(builder.rows())) == len(TOWNS)
    assert builder.report.dropped == {reason: 1} and builder.report.first_dropped == {reason: "f, line 3"}
    with pytest.raises(InvalidInputError, match=f"f, line 3.*{reason}"):
        rows_of(world, passages=(3, 3), max_tokens=10, strict=True)


def test_strict_drops_excluded_and_repeated_questions():
    builder = make_builder([*TOWNS, TOWNS[1]], DataOptions(passages=(3, 3), strict=True), exclude=TOWNS[:1])
    assert len(list(builder.rows())) == len(TOWNS) - 1
    assert builder.report.dropped.total() == 2


def test_small_corpus_and_missing_context_raise():
    with pytest.raises(InvalidInputError, match="passages is 20, but the corpus has 12"):
        make_builder(TOWNS, DataOptions())
    bare = Example("nq, line 1", "1", "When?", ("1900",))
    with pytest.raises(InvalidInputError, match="nq, line 1 has no context, and there is no corpus"):
        make_builder([bare], DataOptions())
    with pytest.raises(InvalidInputError, match="random negatives cannot find"):
        list(make_builder([bare], DataOptions((2, 2), ("random",)), corpus=[Passage("1900"), Passage("b")]).rows())


@pytest.mark.parametrize(
    "wrong", [{"passages": (0, 3)}, {"passages": (4, 3)}, {"negatives": ()}, {"no_gold": 1.5}, {"max_tokens": 0}]
)
def test_invalid_options_raise(wrong):
    with pytest.raises(InvalidInputError, match=next(iter(wrong))):
        DataOptions(**wrong)
