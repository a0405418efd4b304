"""Training rows: the laws of gold and negatives, every format, and a command that loses nothing."""

from __future__ import annotations

import gzip
import json
import os
import random
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
from hypothesis import given
from hypothesis import strategies as st
from indexes import WordEmbedder, count_words

from kvfusion_rag import InvalidInputError, MissingDependencyError
from kvfusion_rag.cli import build_data, main
from kvfusion_rag.data import (
    DataBuilder,
    DataOptions,
    Example,
    check_output,
    read_corpus,
    read_dataset,
    read_examples,
    read_ready_rows,
    write_training_rows,
)
from kvfusion_rag.data.exclusion import SHORTEST, Exclusion
from kvfusion_rag.data.mining import (
    FIRST_LOOK,
    BM25Ranking,
    DenseRanking,
    MatchText,
    RandomRanking,
    _best_first,
    text_key,
)
from kvfusion_rag.data.rows import Passage, QARow, read_rows
from kvfusion_rag.data.windows import cut_around, evidence_of, find_answer, sentence_spans, split_passage
from kvfusion_rag.evaluation import answer_in_text, normalize_answer

# Worlds of towns: few words, so that answers stand in many contexts

WORDS = ["mill", "river", "tower", "harbour", "old", "red", "1901", "1902", "Ann", "Ben", "the", "north"]
sentences = st.lists(st.sampled_from(WORDS), min_size=2, max_size=7).map(lambda words: f"It is {' '.join(words)}.")
contexts = st.lists(sentences, min_size=1, max_size=4).map(" ".join)
titles = st.none() | st.sampled_from([*WORDS, "Town"])  # which may hold an answer that the text does not
passages = st.builds(Passage, contexts, titles)


@st.composite
def examples(draw: st.DrawFn) -> Example:
    """A question over a context, most of the time with an answer that stands there."""
    context, title = draw(contexts), draw(titles)
    others = tuple(draw(st.lists(passages, max_size=2)))
    question = f"What is {' '.join(draw(st.lists(st.sampled_from(WORDS), max_size=3)))}?"
    number = str(draw(st.integers(0, 10**6)))
    kind = draw(st.sampled_from(["answered"] * 4 + ["elsewhere", "unanswerable"]))
    if kind == "unanswerable":
        return Example("world", number, question, (), (Passage(context, title), *others))
    answer = draw(st.sampled_from(context.replace(".", "").split() if kind == "answered" else WORDS))
    return Example("world", number, question, (answer, "Zeno"), (*others, Passage(context, title, True)))


worlds = st.lists(examples(), min_size=2, max_size=14, unique_by=lambda example: example.id)
corpora = st.lists(passages, min_size=4, max_size=14)
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


def make_builder(world: list[Example], options: DataOptions, **parts) -> DataBuilder:
    return DataBuilder(lambda: world, options, count_tokens=count_words, embedder=WordEmbedder(), **parts)


def build(world: list[Example], options: DataOptions, **parts) -> list[QARow]:
    """The rows, or none where the world is too small for ``options``."""
    try:
        return list(make_builder(world, options, **parts).rows())
    except InvalidInputError as error:
        assert "distinct passages" in str(error)
        return []


@given(worlds, options, st.none() | corpora)
def test_a_row_has_one_gold_passage_and_no_answer_beside_it(world, options, corpus):
    known = {example.id: example for example in world}
    for row in build(world, options, corpus=corpus):
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


@given(worlds, options)
def test_same_questions_options_and_seed_give_the_same_rows(world, options):
    assert build(world, options) == build(world, options)


@given(worlds, options, worlds)
def test_nothing_excluded_is_left(world, options, judged):
    questions = {text_key(example.question) for example in judged}
    contexts = {text_key(passage.text) for example in judged for passage in example.passages}
    uncut = DataOptions(options.passages, options.negatives, options.no_gold, None, options.seed)
    for row in build(world, uncut, exclude=judged):
        assert text_key(row.question) not in questions
        assert contexts.isdisjoint(text_key(passage.text) for passage in row.passages)


def test_a_context_of_an_excluded_file_goes_whatever_is_asked_of_it():
    unanswerable = Example("x", "x", "When did it burn?", (), (replace(TOWNS[1].golds[0], gold=False),))
    judged = [Example("dev", "d", "Who built it?", ("Ann",), TOWNS[n].golds) for n in (0, 1)]
    builder = make_builder([*TOWNS, unanswerable], DataOptions(passages=(3, 3)), exclude=judged)
    assert [row.id for row in builder.rows()] == [town.id for town in TOWNS[2:]]
    assert builder.report.dropped == {"context is in an excluded file": 3}


words = st.lists(st.sampled_from(WORDS), min_size=1, max_size=40)


@given(st.lists(words, max_size=4), words, st.data())
def test_a_context_that_holds_or_is_part_of_an_excluded_one_is_found(excluded, context, data):
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
def test_contexts_are_excluded_whose_passages_were_cut_in_an_evaluation_row(grouped):
    """Whether the cut passage is gold there or a negative; and a training context may be the shorter one."""
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


@given(worlds, options)
def test_every_question_is_accounted_for(world, options):
    try:
        builder = make_builder(world, options)
    except InvalidInputError:
        return
    rows, report = list(builder.rows()), builder.report
    assert report.read == len(world) == report.kept + report.dropped.total()
    assert report.kept == len(rows)
    assert report.no_gold + report.unanswerable == sum(not row.answers for row in rows)
    assert report.evidence == sum(row.evidence is not None for row in rows)
    own = sum(len(row.passages) - len(row.gold) for row in rows)
    assert report.negatives.total() == own
    assert set(report.first_dropped) == set(report.dropped)


NAMES = ("Arda", "Bree", "Cairn", "Dorn", "Esk", "Firth", "Glen", "Holm", "Inch", "Jura", "Kell", "Lorn")
TOWNS = [
    Example(
        f"towns, line {n}",
        str(n),
        f"When was the mill of {town} built?",
        (str(1900 + n),),
        (Passage(f"{town} lies inland. Its mill was built in {1900 + n}. It is red.", town, True),),
    )
    for n, town in enumerate(NAMES)
]


MILLS = [Passage(f"A mill {word} a river.") for word in ("by", "on", "near", "under")]


def rows_of(world: list[Example], **options) -> list[QARow]:
    return list(make_builder(world, DataOptions(**options)).rows())


def test_the_gold_slot_is_any_slot():
    seeds = range(12)
    slots = {next(n for n, p in enumerate(row.passages) if p.gold) for seed in seeds for row in rows_of(
        TOWNS, passages=(4, 4), seed=seed)}  # fmt: skip
    assert slots == {0, 1, 2, 3}
    assert len({str(rows_of(TOWNS, passages=(4, 4), seed=seed)) for seed in seeds}) == len(seeds)


def test_the_number_of_passages_is_any_of_the_range():
    assert {len(row.passages) for row in rows_of(TOWNS, passages=(1, 4))} == {1, 2, 3, 4}


def test_evidence_is_the_sentence_of_the_answer():
    assert [row.evidence for row in rows_of(TOWNS, passages=(3, 3))][4] == "Its mill was built in 1904."


def test_a_passage_that_answers_a_question_elsewhere_is_no_wrong_one_here():
    swapped = Example("x", "x", TOWNS[0].question, ("1850",), (Passage("Arda's mill: 1850.", None, True),))
    rows = rows_of([*TOWNS[:4], swapped], passages=(4, 4))
    assert all(
        "Arda" not in p.text for row in rows if row.question == swapped.question for p in row.passages if not p.gold
    )
    assert len(rows) == 5


def test_bm25_takes_the_passages_nearest_to_the_question():
    far = [
        Example(str(n), f"f{n}", f"Who sang {n}?", ("Ann",), (Passage(f"Ann sang {n}.", None, True),))
        for n in range(9)
    ]
    row = rows_of([*TOWNS, *far], passages=(6, 6))[0]
    assert all("mill" in passage.text for passage in row.passages)


def test_sources_take_turns_and_chance_fills_up():
    builder = make_builder(TOWNS, DataOptions(passages=(5, 5), negatives=("bm25", "random")))
    list(builder.rows())
    assert builder.report.negatives == {"bm25": 24, "random": 24}
    strange = [Example(str(n), str(n), f"Zzz{n}?", e.answers, e.golds) for n, e in enumerate(TOWNS)]
    builder = make_builder(strange, DataOptions(passages=(5, 5)))
    list(builder.rows())
    assert builder.report.negatives == {"fill": 48}


def test_passages_that_came_with_the_question_are_taken_first():
    others = (Passage("Built in 1900, they say."), Passage("Nobody knows the mill."), Passage("Mills grind."))
    asked = Example("x", "x", TOWNS[0].question, ("1900",), (*others, *TOWNS[0].golds))
    row = rows_of([asked, *TOWNS[1:]], passages=(4, 4))[0]
    texts = {passage.text for passage in row.passages}
    assert {others[1].text, others[2].text} < texts and others[0].text not in texts


def test_a_passage_under_a_title_with_the_answer_is_no_wrong_one():
    """Given, near, or drawn by chance; whether a gold passage answers is judged by its text alone."""
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


def test_an_unanswerable_question_keeps_its_context():
    asked = Example("x", "x", "When did the mill of Arda burn?", (), (Passage("The mill of Arda was red."),))
    row = rows_of([*TOWNS, asked], passages=(4, 4))[-1]
    assert row.answers == () and row.gold == () and "The mill of Arda was red." in [p.text for p in row.passages]


def test_a_question_without_context_gets_the_likeliest_passage_that_holds_the_answer():
    corpus = [passage for example in TOWNS for passage in example.golds] + [Passage("1903 was a year.")]
    asked = [Example("x", "x", "When was the mill of Dorn built?", ("the year 1903", "1903"))]
    builder = make_builder(asked, DataOptions(passages=(5, 5)), corpus=corpus)
    (row,) = builder.rows()
    assert row.gold[0].title == "Dorn" and row.answers[0] == "1903"
    assert row.evidence == "Its mill was built in 1903." and builder.report.gold_found == 1


def test_the_answer_that_stands_in_the_passage_comes_first():
    asked = Example("x", "x", "Where?", ("Inch Town", "Arda"), TOWNS[0].golds)
    assert rows_of([asked, *TOWNS[1:]], passages=(2, 2))[0].answers == ("Arda", "Inch Town")


def test_an_answer_inside_a_word_counts_where_the_file_says_so():
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
def test_a_question_that_cannot_be_used_is_counted_or_an_error(reason):
    world = [*TOWNS, REASONS[reason]]
    builder = make_builder(world, DataOptions(passages=(3, 3), max_tokens=10))
    assert len(list(builder.rows())) == len(TOWNS)
    assert builder.report.dropped == {reason: 1} and builder.report.first_dropped == {reason: "f, line 3"}
    with pytest.raises(InvalidInputError, match=f"f, line 3.*{reason}"):
        rows_of(world, passages=(3, 3), max_tokens=10, strict=True)


def test_strict_leaves_out_what_is_excluded_or_repeated():
    builder = make_builder([*TOWNS, TOWNS[1]], DataOptions(passages=(3, 3), strict=True), exclude=TOWNS[:1])
    assert len(list(builder.rows())) == len(TOWNS) - 1
    assert builder.report.dropped.total() == 2


def test_a_corpus_too_small_and_a_question_without_passage_are_errors():
    with pytest.raises(InvalidInputError, match="passages is 20, but the corpus holds 12"):
        make_builder(TOWNS, DataOptions())
    bare = Example("nq, line 1", "1", "When?", ("1900",))
    with pytest.raises(InvalidInputError, match="nq, line 1 has no context, and without a corpus"):
        make_builder([bare], DataOptions())
    with pytest.raises(InvalidInputError, match="random negatives cannot find"):
        list(make_builder([bare], DataOptions((2, 2), ("random",)), corpus=[Passage("1900"), Passage("b")]).rows())


@pytest.mark.parametrize(
    "wrong", [{"passages": (0, 3)}, {"passages": (4, 3)}, {"negatives": ()}, {"no_gold": 1.5}, {"max_tokens": 0}]
)
def test_options_are_checked(wrong):
    with pytest.raises(InvalidInputError, match=next(iter(wrong))):
        DataOptions(**wrong)


# Mining


@given(st.lists(st.integers(0, 5), min_size=1, max_size=FIRST_LOOK * 3))
def test_best_first_is_a_stable_sort_of_the_positive_scores(scores):
    import numpy as np

    expected = sorted((n for n, score in enumerate(scores) if score > 0), key=lambda n: -scores[n])
    assert list(_best_first(np.array(scores, dtype=np.float32), above=0.0)) == expected


@given(st.integers(0, 30), st.integers())
def test_the_random_ranking_is_a_permutation(size, seed):
    assert sorted(RandomRanking(size).rank("", random.Random(seed))) == list(range(size))


def test_rankings_find_by_words_and_by_vectors():
    passages = [passage for example in TOWNS for passage in example.golds]
    rng = random.Random(0)
    for ranking in (BM25Ranking(passages), DenseRanking(passages, WordEmbedder(4096))):  # no two words in one bucket
        assert next(ranking.rank("the mill of Glen", rng)) == 6
        assert next(ranking.near(6, rng)) == 6
    assert list(BM25Ranking(passages).rank("the of", rng)) == []


def test_questions_are_embedded_together_and_rank_as_alone(monkeypatch):
    calls: list[int] = []
    embed = WordEmbedder.embed_questions

    def counted(self, texts):
        calls.append(len(texts))
        return embed(self, texts)

    monkeypatch.setattr(WordEmbedder, "embed_questions", counted)
    wanted = DataOptions(passages=(3, 3), negatives=("dense",))
    together = list(make_builder(TOWNS, wanted).rows())
    assert calls == [len(TOWNS)]
    monkeypatch.setattr("kvfusion_rag.data.build.PREPARED", 5)
    assert list(make_builder(TOWNS, wanted).rows()) == together and calls[1:] == [5, 5, 2]
    monkeypatch.setattr(DataBuilder, "_prepare", lambda self, examples: None)
    assert list(make_builder(TOWNS, wanted).rows()) == together and calls[4:] == [1] * len(TOWNS)


@given(st.text(max_size=30), st.text(max_size=8))
def test_what_the_metric_finds_is_never_overlooked(text, answer):
    if answer_in_text(text, [answer]) and answer_in_text(answer, [answer]) and MatchText.of(answer).normal.strip():
        assert MatchText.of(text).holds([MatchText.of(answer)])


def test_answers_beside_hyphens_and_genitives_are_seen():
    text = MatchText.of("Nixon's 67-member crew")
    assert text.holds([MatchText.of("Nixon")]) and text.holds([MatchText.of("67")])
    assert not text.holds([MatchText.of("ember"), MatchText.of("the"), MatchText.of("?!")])


# Sentences and windows


@given(st.text(alphabet="ab. \n!?DrA。”", max_size=60))
def test_sentences_are_the_whole_text(text):
    assert "".join(text[start:end] for start, end in sentence_spans(text)) == text


def test_sentences_end_where_a_reader_ends_them():
    text = 'Dr. J. Smith (ca. 1900) of St. Ives left. "Why?" asked Mr. Lee.[1] He paid 3.5 dollars! Then\nnothing.'
    assert [text[start:end].strip() for start, end in sentence_spans(text)] == [
        'Dr. J. Smith (ca. 1900) of St. Ives left.', '"Why?" asked Mr. Lee.[1]', "He paid 3.5 dollars!", "Then",
        "nothing.",
    ]  # fmt: skip


@given(contexts, st.integers(1, 12), st.integers(0, 9), st.data())
def test_a_cut_keeps_the_answer_and_the_budget(text, limit, seed, data):
    words = [(start, start + len(word)) for word in set(text.split()) for start in [text.index(word)]]
    span = data.draw(st.sampled_from(sorted(words)))
    cut = cut_around(text, span, lambda piece: count_words(piece) <= limit, random.Random(seed))
    assert cut is not None and cut[0] <= span[0] and span[1] <= cut[1]
    piece = text[slice(*cut)]
    assert piece == piece.strip() and count_words(piece) <= limit
    assert count_words(piece) == count_words(text) or count_words(text) > limit


@given(contexts, st.integers(1, 12))
def test_pieces_fit_and_leave_no_word_out(text, limit):
    pieces = split_passage(text, lambda piece: count_words(piece) <= limit)
    assert all(count_words(piece) <= limit for piece in pieces)
    assert " ".join(pieces).split() == text.split()


def test_evidence_runs_over_as_many_sentences_as_the_answer():
    text = "One. Two is here. Three is there. Four."
    assert evidence_of(text, (5, 7)) == "Two is here."
    assert evidence_of(text, (12, 23)) == "Two is here. Three is there."
    assert find_answer(text, ["four"]) == (34, 38) and find_answer(text, ["Two"], 5) == (5, 8)
    assert find_answer(text, ["Two"], 9) == (5, 8) and find_answer(text, ["five"]) is None


# Formats

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
def test_rows_with_their_passages_are_ready_as_they_are(tmp_path, name, suffix):
    data = [ROWS[name], ROWS[name] | {"id": "q2"}]
    lines = json.dumps(data) if suffix == ".json" else "\n".join(map(json.dumps, data))
    rows = list(read_ready_rows(write(tmp_path / f"rows{suffix}", lines)))
    assert rows == [QARow(name, "When?", ("1900", "in 1900"), (OTHER, GOLD)) for name in ("q1", "q2")]


@pytest.mark.parametrize("name", [*(name for name in ROWS if name not in READY), "SQuAD", "TriviaQA"])
def test_formats_without_several_passages_are_refused(tmp_path, name):
    data = [ROWS[name]] if name in ROWS else SQUAD if name == "SQuAD" else TRIVIA
    number = "no passages" if name in ("NQ-open", "datasets' TriviaQA", "PopQA", "TriviaQA") else "one context"
    with pytest.raises(InvalidInputError, match=rf"^dev\.json: .*{number}.*kvfusion build-data .* of dev\.json\.$"):
        list(read_ready_rows(write(tmp_path / "dev.json", json.dumps(data))))


def without_place(example: Example) -> tuple:
    return example.id, example.question, example.answers, example.passages


def write(path: Path, content: str) -> Path:
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(content.encode()))
    else:
        path.write_text(content, encoding="utf-8")
    return path


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".json"])
@pytest.mark.parametrize("name", ROWS)
def test_rows_of_every_format(tmp_path, name, suffix):
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


def test_a_hugging_face_dataset_is_read_by_its_fields(monkeypatch):
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


@pytest.mark.parametrize(
    ("row", "field"),
    [
        ({"question": " ", "answers": ["a"]}, "question"),
        ({"answers": ["a"]}, "question"),
        ({"question": "Q?"}, "answers is absent"),
        ({"question": "Q?", "answers": [1]}, "answers"),
        ({"question": "Q?", "answers": [""]}, "answers"),
        ({"question": "Q?", "answer": {}}, "answer is an object"),
        ({"question": "Q?", "answers": []}, "answers is empty"),
        ({"question": "Q?", "possible_answers": "x"}, "possible_answers"),
        ({"question": "Q?", "answers": ["a"], "context": 3}, "context"),
        ({"question": "Q?", "answers": ["a"], "context": "a", "title": 3}, "title"),
        ({"question": "Q?", "answers": ["a"], "context": "a", "answer_start": "0"}, "answer_start"),
        ({"question": "Q?", "answers": ["a"], "ctxs": []}, "ctxs"),
        ({"question": "Q?", "answers": ["a"], "ctxs": [{"text": "a", "isgold": 1}]}, "ctxs 1: isgold"),
        ({"question": "Q?", "answers": ["a"], "passages": [{"text": 1}]}, "passage 1: text"),
        ({"question": "Q?", "answers": [], "passages": [{"text": "a", "gold": True}]}, "answers is empty"),
        ([1], "holds a list"),
    ],
)  # fmt: skip
def test_a_malformed_row_names_file_line_and_field(tmp_path, row, field):
    path = write(tmp_path / "bad.jsonl", json.dumps(ROWS["own rows"]) + "\n\n" + json.dumps(row))
    with pytest.raises(InvalidInputError, match=rf"^bad\.jsonl, line 3.*{field}"):
        list(read_examples(path))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"question": "Q?", "answers": ["a"], "ctxs": [{"text": "a", "isgold": 1}]}, "ctxs 1: isgold is 1, but"),
        ({"question": "Q?", "answers": ["a"], "ctxs": [{"title": "a"}]}, "ctxs 1: text is None, but"),
        ({"question": "Q?", "answers": ["a"], "passages": [{"text": 1}]}, "passage 1: text is 1, but"),
        ({"question": "Q?", "answers": [""], "passages": []}, r"answers is \[''\], but"),
        ({"question": "Q?"}, "passages is None, but"),
        ({"question": "Q?", "passages": [{"text": "a"}]}, "answers is absent"),
        ({"question": "Q?", "answers": [], "passages": [{"text": "a", "gold": True}]}, "answers is empty, but"),
        ({"passages": []}, "question is None, but"),
        ([1], "holds a list, but"),
    ],
)
def test_a_malformed_ready_row_names_file_line_and_field(tmp_path, row, message):
    path = write(tmp_path / "bad.jsonl", json.dumps(ROWS["own rows"]) + "\n\n" + json.dumps(row))
    with pytest.raises(InvalidInputError, match=rf"^bad\.jsonl, line 3.*{message}"):
        list(read_ready_rows(path))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", "{", "line 1 is not JSON"),
        ("a.json", "{", "a.json is not JSON"),
        ("a.json", "{}", "holds a dict"),
        ("a.json", '{"data": [{"title": "x"}]}', r"data\[0\]: paragraphs"),
        ("a.json", '{"data": [{"paragraphs": [{"qas": [{}]}]}]}', r"paragraphs\[0\]: context"),
        ("a.json", '{"Data": [{"Question": "Q?"}]}', r"Data \[0\]: answers"),
        ("a.tsv", "question\nQ?\n", "line 2: answers"),
        ("a.txt", "x", "ends in '.txt'"),
        ("a.jsonl", '{"question": ' + "9" * 5000 + "}", "line 1 is not JSON"),  # more digits than Python reads
        ("a.json", "[" * 99_999, "a.json is not JSON"),
    ],
)
def test_a_malformed_file_is_one_error(tmp_path, name, content, message):
    with pytest.raises(InvalidInputError, match=message):
        list(read_examples(write(tmp_path / name, content)))


def test_a_damaged_file_is_one_error(tmp_path):
    (tmp_path / "a.jsonl.gz").write_bytes(b"no gzip")
    (tmp_path / "b.jsonl").write_bytes(b"\xff\xfe")
    (tmp_path / "c.jsonl.gz").write_bytes(gzip.compress(b"{}" * 999)[:-9])
    for name in ("a.jsonl.gz", "b.jsonl", "c.jsonl.gz", "absent.jsonl"):
        with pytest.raises(InvalidInputError, match=name):
            list(read_examples(tmp_path / name))


def test_half_characters_become_writable(tmp_path):
    path = write(tmp_path / "a.jsonl", '{"question": "Q\\ud800?", "answers": ["a\\udc00"], "context": "a\\udc00 b"}')
    (example,) = read_examples(path)
    assert (example.question, example.answers, example.golds[0].text) == ("Q�?", ("a�",), "a� b")


def test_a_corpus_is_rows_contexts_or_a_folder(tmp_path):
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


def test_a_mark_at_the_beginning_of_a_file_is_passed_over(tmp_path):
    rows = {"a.tsv": "question\tanswer\nQ?\ta\n", "a.jsonl": '{"question": "Q?", "answers": ["a"]}'}
    for name, text in rows.items():
        (example,) = read_examples(write(tmp_path / name, "\ufeff" + text))
        assert (example.question, example.answers) == ("Q?", ("a",))


def test_a_cell_of_a_table_may_hold_a_list_of_answers(tmp_path):
    cells = {'["Bob", "Rob"]': ("Bob", "Rob"), "[1]": ("[1]",), "[sic": ("[sic",), "Bob": ("Bob",)}
    lines = ["question\tanswers", *(f"Q?\t{cell}" for cell in cells)]
    assert [e.answers for e in read_examples(write(tmp_path / "a.tsv", "\n".join(lines)))] == list(cells.values())


# Mining


@pytest.mark.parametrize(
    ("answer", "holding", "other"),
    [
        ("绍兴", "鲁迅的故居在绍兴市。", "鲁迅的故居在北京。"),
        ("Beyoncé", "Then Beyonce\u0301 sang.", "Then Bey sang."),
        ("Zurich", "Zürich lies there.", "Zuric lies there."),
        ("สมชาย", "คุณสมชายมา", "คุณมา"),
        ("서울", "서울은 크다", "부산은 크다"),
        ("art", "An art.", "A part."),
    ],
)
def test_an_answer_is_seen_in_every_script_and_spelling(answer, holding, other):
    wanted = [MatchText.of(answer)]
    assert MatchText.of(holding).holds(wanted) and not MatchText.of(other).holds(wanted)


# Writing


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz"])
def test_a_file_is_written_whole_or_not_at_all(tmp_path, name):
    path = tmp_path / name
    rows = rows_of(TOWNS, passages=(3, 3))
    assert write_training_rows(path, rows) == len(rows) and list(read_rows(path)) == rows
    first = path.read_bytes()

    def broken():
        yield rows[0]
        raise InvalidInputError("broken")

    for bad, message in ((broken(), "broken"), ([], "no row is left")):
        with pytest.raises(InvalidInputError, match=message):
            write_training_rows(path, bad)
        assert path.read_bytes() == first and list(tmp_path.iterdir()) == [path]
    write_training_rows(tmp_path / f"again-{name}", rows)
    assert (tmp_path / f"again-{name}").read_bytes() == first


def test_outputs_are_protected(tmp_path):
    old = write(tmp_path / "old.jsonl", "x")
    for path, force, inputs, message in [
        (old, False, [], "exists already"),
        (old, True, [tmp_path / "." / "old.jsonl"], "also read from"),
        (tmp_path, True, [], "is a folder"),
        (tmp_path / "absent" / "x.jsonl", False, [], "folder of .* does not exist"),
    ]:
        with pytest.raises(InvalidInputError, match=message):
            check_output(path, force=force, inputs=inputs)
    check_output(old, force=True)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_cannot_be_written_to_is_told_before_the_work(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(InvalidInputError, match="cannot be written to"):
        check_output(tmp_path / "rows.jsonl", force=False)


# The command


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


def test_the_command_writes_rows_and_reports(towns, tmp_path, capsys):
    lines = towns.read_text().splitlines()
    judged = write(tmp_path / "dev.jsonl", lines[0])
    lines.append(json.dumps({"question": "Where?", "answers": ["Rome"], "context": CONTEXT}))
    write(towns, "\n".join(lines))
    out = tmp_path / "out.jsonl.gz"
    arguments = (towns, "--out", out, "--passages", "3-5", "--exclude", judged, "--no-gold", "0.2")
    assert run(*arguments) == 0
    shown = capsys.readouterr().out
    assert "11 rows of 3 to 5 passages, of 13 questions read" in shown
    assert "12 distinct passages mined, 1 more left out" in shown
    assert "1: answer is not in its context (first: towns.jsonl, line 13)" in shown
    assert "1: question is in an excluded file (first: towns.jsonl, line 1)" in shown
    first = out.read_bytes()
    assert run(*arguments, "--force", "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert out.read_bytes() == first and len(list(read_rows(out))) == report["kept"] == 11
    assert report["dropped"] == {"question is in an excluded file": 1, "answer is not in its context": 1}
    assert run(*arguments, "--force", "--strict") == 2 and out.read_bytes() == first
    assert "towns.jsonl, line 13 (id '13'): answer is not in its context" in capsys.readouterr().err


def test_a_command_that_keeps_no_row_says_why(towns, tmp_path, capsys):
    assert run(towns, "--out", tmp_path / "out.jsonl", "--exclude", towns, "--passages", "2") == 2
    assert "0 distinct passages beside 12 that are excluded" in capsys.readouterr().err
    lines = [{"question": f"Where? {n}", "answers": ["Rome"], "context": f"{n} is red."} for n in range(3)]
    write(tmp_path / "none.jsonl", "\n".join(map(json.dumps, lines)))
    assert run(tmp_path / "none.jsonl", "--out", tmp_path / "out.jsonl", "--passages", "2") == 2
    error = capsys.readouterr().err
    assert "of 3 questions: 3: answer is not in its context (first: none.jsonl, line 1)" in error
    assert error.count("\n") == 1 and not (tmp_path / "out.jsonl").exists()


def test_the_command_cuts_and_mines_with_vectors(towns, tmp_path, monkeypatch):
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
        (["--passages", "20"], "passages is 20, but the corpus holds 12"),
        (["--passages", "5-2"], "'5-2' is neither"),
        (["--group", "20"], "passages is 20, but the corpus holds 12"),
        (["--group", "4", "--passages", "4"], "--group is given with --passages"),
        (["--group", "4", "--no-gold", "0.1"], "--group is given with --passages or --no-gold"),
        (["--negatives", "bm25,magic"], "does not name some of"),
        (["--no-gold", "2"], "not a number from 0 to 1"),
        (["--exclude", "absent.jsonl"], "'absent.jsonl' does not exist"),
        (["--dataset", "squad"], "name one of the two"),
        (["--out", "rows.txt"], "written to a .jsonl"),
    ],
)
def test_a_mistake_is_one_line_and_nothing_is_written(towns, tmp_path, capsys, arguments, message):
    out = tmp_path / "out.jsonl"
    assert run(towns, "--out", out, *arguments) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and error.startswith("kvfusion: error: ")
    assert list(tmp_path.iterdir()) == [towns]


def test_an_existing_output_stays_without_force(towns, tmp_path, capsys):
    out = write(tmp_path / "out.jsonl", "mine")
    assert run(towns, "--out", out, "--passages", "3") == 2 and out.read_text() == "mine"
    assert run(towns, "--out", towns, "--passages", "3", "--force") == 2
    assert capsys.readouterr().err.count("\n") == 2
    assert run(towns, "--out", out, "--passages", "3", "--force") == 0 and out.read_text() != "mine"
