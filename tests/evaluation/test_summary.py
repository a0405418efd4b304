"""Intervals, scores, and the figures of systems."""

from dataclasses import dataclass

import numpy as np
import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from readers import Reader, row, rows

from kvfusion_rag.data.rows import Passage, QARow
from kvfusion_rag.errors import ContextLimitError, InvalidInputError
from kvfusion_rag.evaluation.bootstrap import Bootstrap
from kvfusion_rag.evaluation.orders import NO_GOLD, ORIGINAL, SHUFFLED, plan_conditions
from kvfusion_rag.evaluation.predictions import Prediction
from kvfusion_rag.evaluation.runner import predict
from kvfusion_rag.evaluation.summary import METRICS, score, summarize
from kvfusion_rag.evaluation.systems import GeneratorSystem

values = st.lists(st.floats(0, 100, allow_nan=False), min_size=1, max_size=60)


@settings(max_examples=30)
@given(values, st.integers(0, 2**32))
def test_intervals_contain_their_mean_and_repeat_with_the_seed(found, seed):
    interval = Bootstrap(seed).interval(found)
    assert min(found) - 1e-9 <= interval.low <= interval.mean <= interval.high <= max(found) + 1e-9
    assert interval == Bootstrap(seed).interval(found)


@given(values, st.sampled_from([0.1, 1 / 3, 100.0]))
def test_equal_values_give_an_exact_interval(found, value):
    difference = Bootstrap().difference(found, found)
    assert (difference.mean, difference.low, difference.high) == (0, 0, 0)
    equal = Bootstrap().interval([value] * len(found))
    assert equal.mean == equal.low == equal.high == value


def test_width_of_intervals_is_that_of_theory():
    share = Bootstrap(3, resamples=4000).interval([100.0] * 80 + [0.0] * 120)
    half = 1.96 * 100 * (0.4 * 0.6 / 200) ** 0.5
    assert share.mean == pytest.approx(40)
    assert (share.low, share.high) == (pytest.approx(40 - half, abs=1), pytest.approx(40 + half, abs=1))


def test_pairing_narrows_differences():
    rng = np.random.default_rng(0)
    hard = rng.uniform(0, 100, 100)
    bootstrap = Bootstrap()
    paired = bootstrap.difference(hard + 5, hard)
    assert (paired.low, paired.high) == (pytest.approx(5), pytest.approx(5))
    assert bootstrap.interval(hard).high - bootstrap.interval(hard).low > 5


def test_resampling_depends_only_on_the_seed_and_the_values():
    found = np.random.default_rng(0).uniform(0, 100, 30)
    bootstrap = Bootstrap(1)
    first = bootstrap.interval(found)
    bootstrap.interval([1.0, 2.0])
    assert bootstrap.interval(found) == first != Bootstrap(2).interval(found)


# Scores and summaries


def test_scores():
    answered = row([True, False])
    right = Prediction("the lima.", "Lima", (1,), ())
    assert score(right, answered, ORIGINAL) == {
        "em": 1.0,
        "em_cited": 1.0,
        "answer_in_text": 1.0,
        "f1": 1.0,
        "abstained": 0.0,
    }
    longer = Prediction("in lima, peru", "lima", (1,), ())
    assert score(longer, answered, ORIGINAL)["em"] == 0 and score(longer, answered, ORIGINAL)["em_cited"] == 1
    for text in ("", " ", "Unanswerable", "unanswerable."):
        silent = Prediction(text, text, (), ())
        assert score(silent, answered, NO_GOLD) == dict.fromkeys(METRICS, 1.0)
        assert score(silent, row([False], answers=()), ORIGINAL)["em"] == 1
        assert score(silent, answered, ORIGINAL)["em"] == 0
    assert score(right, answered, NO_GOLD)["em"] == 0


def summary_of(systems, made, wanted=None, **options):
    plan = plan_conditions(made, wanted)
    return summarize(made, predict(made, systems, plan, **options), Bootstrap())


OTHERS = ("original", "shuffled", "no-gold")


def test_figures_of_a_system_that_reads_two_documents():
    summary = summary_of([Reader("all"), Reader("first two", 2)], rows(40), ["slot:1", "slot:2", "slots", *OTHERS])
    em = {c.name: summary.cell("first two", c).figures["em"].mean for c in summary.slots}
    assert em == {"slot:1": 100, "slot:2": 100, "slot:5": 0}
    assert {one.system: one.points for one in summary.slot_spread} == {"all": 0, "first two": 100}
    match = {one.system: one.figure for one in summary.token_match}
    shuffled = summary.cell("first two", SHUFFLED).figures["em"]
    assert match["all"].mean == 100 and match["first two"].mean < 100
    assert 0 < shuffled.low < shuffled.mean < shuffled.high < 100
    assert summary.cell("all", NO_GOLD).figures.keys() == {"abstained"}
    difference = next(d for d in summary.differences if d.condition.name == "slot:5")
    assert (difference.system, difference.reference, difference.figure.mean) == ("first two", "all", -100)


def test_unchanged_orders_do_not_count_for_token_match():
    for passages, least, most in ((1, 0, 0), (2, 5, 35), (3, 25, 39)):
        match = summary_of([Reader("a")], rows(40, passages), OTHERS[:2]).token_match[0]
        assert least <= match.rows <= most and (match.figure is None) == (passages == 1)


def test_identical_systems_do_not_differ():
    summary = summary_of([Reader("a", 2), Reader("b", 2)], rows(20))
    assert {(d.figure.mean, d.figure.low, d.figure.high) for d in summary.differences} == {(0, 0, 0)}


def test_rows_that_do_not_fit_are_counted_and_excluded():
    made = rows(6)
    plan = plan_conditions(made, ["original", "shuffled", "top:5"])
    small = Reader("small", limit=4)
    predictions = predict(made, [Reader("wide"), small], plan, batch_size=4)
    summary = summarize(made, predictions, Bootstrap())
    assert {summary.cell("small", c).not_fitting for c in plan.conditions} == {6}
    assert not summary.cell("small", ORIGINAL).figures
    assert all(d.figure is None and d.rows == 0 for d in summary.differences)
    assert [one.figure for one in summary.token_match if one.system == "small"] == [None]

    @dataclass
    class Picky(Reader):
        def answer_batch(self, questions, documents):
            if "who built q3?" in questions:
                raise ContextLimitError("q3 is too long")
            return super().answer_batch(questions, documents)

    summary = summarize(made, predict(made, [Reader("wide"), Picky("picky")], plan, batch_size=4), Bootstrap())
    cell = summary.cell("picky", ORIGINAL)
    assert (cell.not_fitting, cell.figures["em"].mean) == (1, 100)
    assert {d.rows for d in summary.differences} == {5}


def test_predictions_do_not_depend_on_the_batch_size():
    made, plan = rows(7), plan_conditions(rows(7))
    found = [predict(made, [Reader("r", 2)], plan, batch_size=size, seed=4) for size in (1, 3, 50)]
    assert found[0] == found[1] == found[2]


def test_equal_orders_are_asked_once():
    reader = Reader("r")
    predict(rows(4), [reader], plan_conditions(rows(4), ["slot:1", "original", "top:5", "slot:2"]), batch_size=4)
    assert reader.batches == [4, 4]


def test_systems_with_equal_names_raise():
    with pytest.raises(InvalidInputError, match="share a name"):
        predict(rows(), [Reader("r"), Reader("r")], plan_conditions(rows()))


# With a real generator


def test_fusion_gives_equal_answers_at_every_slot_and_in_every_order(generator):
    systems = [GeneratorSystem("fusion", generator, "fusion"), GeneratorSystem("concat", generator, "concat")]
    made = rows(5)
    # Random models answer gibberish, so their own answers become the accepted ones of half of the rows.
    truth = predict(made, systems[:1], plan_conditions(made, ["original"]))["fusion", ORIGINAL]
    made = [
        QARow(one.id, one.question, (said.text if n % 2 else "lima",), one.passages)
        for n, (one, said) in enumerate(zip(made, truth, strict=True))
    ]
    plan = plan_conditions(made, ["slot:1", "slot:2", "slot:3", "slot:4", "slot:5", "original", "shuffled"])
    predictions = predict(made, systems, plan, batch_size=2)
    summary = summarize(made, predictions, Bootstrap())
    assert {summary.cell("fusion", c).figures["em"].mean for c in plan.conditions} == {40.0}
    fusion, concat = summary.token_match
    assert (fusion.figure.mean, fusion.figure.low) == (100.0, 100.0)
    assert concat.figure.mean < 100  # a joined prompt depends on the order
    assert summary.slot_spread[0].points == 0.0
    ids = [p.token_ids for p in predictions["fusion", SHUFFLED] if p]
    assert all(ids) and len(set(ids)) == len(made)


def test_joined_prompt_longer_than_the_window_does_not_fit(generator):
    long = [QARow("q", "who?", ("x",), tuple(Passage(tiny.WORDS + str(n), gold=n == 0) for n in range(5)))]
    split = tiny.generator("llama", max_document_tokens=200, long_documents="split", max_new_tokens=2)
    systems = [GeneratorSystem("fusion", split, "fusion"), GeneratorSystem("concat", split, "concat")]
    summary = summary_of(systems, long)
    assert summary.cell("fusion", ORIGINAL).not_fitting == 0
    assert summary.cell("concat", ORIGINAL).not_fitting == 1
