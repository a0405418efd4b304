"""The evaluation harness: where documents are put, what intervals say, and the command from rows to report."""

from __future__ import annotations

import json
import logging
import re
import sys
from dataclasses import dataclass, field, replace

import numpy as np
import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, GPTJConfig

from kvfusion_rag import KVFusionGenerator
from kvfusion_rag.cli import COMMANDS, evaluate, main
from kvfusion_rag.data.rows import Passage, QARow, parse_row, read_rows, rows_digest, write_rows
from kvfusion_rag.errors import ContextLimitError, InvalidInputError, MissingDependencyError
from kvfusion_rag.evaluation import plots, report
from kvfusion_rag.evaluation.bootstrap import Bootstrap
from kvfusion_rag.evaluation.orders import (
    NO_GOLD,
    ORIGINAL,
    SHUFFLED,
    Condition,
    arrange,
    long_context_order,
    plan_conditions,
    usable_rows,
)
from kvfusion_rag.evaluation.runner import Prediction, predict
from kvfusion_rag.evaluation.scores import with_scores
from kvfusion_rag.evaluation.summary import METRICS, score, summarize
from kvfusion_rag.evaluation.systems import (
    SYSTEMS,
    GeneratorSystem,
    Models,
    default_systems,
    make_systems,
    require_inputs,
)
from kvfusion_rag.fusion.torch_model import TorchModel
from kvfusion_rag.model.backbone import Backbone
from kvfusion_rag.text.settings import ModelSettings


def row(gold: list[bool], name: str = "r", answers: tuple[str, ...] = ("lima",)) -> QARow:
    words = tiny.WORDS.split()
    passages = (
        Passage(f"{name} {n} {' '.join(words[n : n + 6])} {'lima' if is_gold else ''}", gold=is_gold)
        for n, is_gold in enumerate(gold)
    )
    return QARow(name, f"who built {name}?", answers, tuple(passages))


def rows(count: int = 6, passages: int = 5) -> list[QARow]:
    """Rows with the gold passage first, as in lost-in-the-middle's files."""
    return [row([True, *[False] * (passages - 1)], f"q{n}") for n in range(count)]


@dataclass
class Reader:
    """A system that answers right when the gold passage is among the first ``reach`` documents."""

    name: str
    reach: int = 99
    limit: int = 99
    batches: list[int] = field(default_factory=list)

    def answer_batch(self, questions, documents):
        self.batches.append(len(questions))
        if any(len(given) > self.limit for given in documents):
            raise ContextLimitError("too many documents")
        found = [any("lima" in d.text for d in given[: self.reach]) for given in documents]
        return [Prediction("Lima" if hit else "", "Lima" if hit else "", (1,) if hit else (), ()) for hit in found]

    def identity(self):
        return {"model_id": f"fake/{self.name}"}


# Orders

gold_flags = st.lists(st.booleans(), min_size=1, max_size=24)


@given(gold_flags.filter(any), st.data())
def test_the_sweep_puts_the_gold_passage_at_its_slot_and_keeps_the_others_in_order(gold, data):
    made = row(gold)
    documents = data.draw(st.integers(sum(gold), len(gold)))
    slot = data.draw(st.integers(1, documents))
    order = arrange(made, Condition("slot", slot), documents, 0)
    wanted = [index for index, is_gold in enumerate(gold) if is_gold]
    first = min(slot - 1, documents - len(wanted))
    assert order[first : first + len(wanted)] == wanted
    others = [index for index in order if not gold[index]]
    assert others == [index for index, is_gold in enumerate(gold) if not is_gold][: documents - len(wanted)]
    if len(wanted) == 1:
        assert order.index(wanted[0]) == slot - 1


@given(gold_flags, st.data(), st.integers())
def test_all_conditions_of_one_row_hold_the_same_documents(gold, data, seed):
    made = row(gold)
    documents = data.draw(st.integers(max(1, sum(gold)), len(gold)))
    original = arrange(made, ORIGINAL, documents, seed)
    shuffled = arrange(made, SHUFFLED, documents, seed)
    assert len(original) == documents and original == sorted(set(original))
    assert sorted(shuffled) == original
    assert sorted(arrange(made, Condition("slot", 1), documents, seed)) == original
    assert arrange(made, NO_GOLD, documents, seed) == [index for index in original if not gold[index]]
    assert arrange(made, Condition("top", documents), documents, seed) == list(range(documents))
    assert shuffled == arrange(made, SHUFFLED, documents, seed)


def test_shuffling_depends_on_seed_and_row_and_moves_the_gold_passage():
    made = rows(200, 10)
    places = [arrange(one, SHUFFLED, 10, 0).index(0) for one in made]
    assert set(places) == set(range(10))
    assert places != [arrange(one, SHUFFLED, 10, 1).index(0) for one in made]


@given(st.lists(st.integers(), unique=True, max_size=40))
def test_long_context_order_has_the_best_at_the_ends_and_the_worst_in_the_middle(items):
    ordered = long_context_order(items)
    assert sorted(ordered) == sorted(items)
    ranks = [items.index(item) for item in ordered]
    assert all(max(ranks[left], ranks[-1 - left]) <= 2 * left + 1 for left in range(len(ranks) // 2))
    if len(items) > 1:
        assert {ordered[0], ordered[-1]} == set(items[:2])


@pytest.mark.parametrize("count", [1, 2, 5, 10])
def test_long_context_order_is_the_libraries_order(count):
    postprocessor = pytest.importorskip("llama_index.core.postprocessor")
    schema = pytest.importorskip("llama_index.core.schema")
    nodes = [schema.NodeWithScore(node=schema.TextNode(id_=str(n)), score=float(-n)) for n in range(count)]
    theirs = postprocessor.LongContextReorder().postprocess_nodes(nodes)
    assert [int(node.node.node_id) for node in theirs] == long_context_order(range(count))


# Plans


def names(plan) -> list[str]:
    return [condition.name for condition in plan.conditions]


def test_a_plan_holds_what_the_rows_allow():
    plan = plan_conditions(rows(2, 10))
    assert names(plan) == [*("slot:1", "slot:5", "slot:10", "original", "shuffled", "top:5", "top:10", "no-gold")]
    assert (plan.documents, plan.notes) == (10, ())
    assert names(plan_conditions(rows(2, 40), ["slots", "slot:5", "top"], 20)) == [
        *("slot:1", "slot:5", "slot:10", "slot:15", "slot:20", "top:5", "top:10", "top:20", "top:40")
    ]


def test_a_default_plan_says_what_it_leaves_out():
    plan = plan_conditions([row([False, False], "without")])
    assert names(plan) == ["original", "shuffled", "no-gold"]
    assert len(plan.notes) == 2
    assert "slots left out: row 'without' has no passage that is marked as gold" in plan.notes[0]


def test_several_gold_passages_are_said_to_stand_together():
    made = [*rows(2, 6), row([False, True, False, False, True, False], "hops")]
    (note,) = plan_conditions(made, ["slots"]).notes
    assert note.startswith("1 of 3 rows have several gold passages: at a slot they stand together from it on")
    assert arrange(made[2], Condition("slot", 2), 6, 0) == [0, 1, 4, 2, 3, 5]
    assert arrange(made[2], Condition("slot", 6), 6, 0) == [0, 2, 3, 5, 1, 4]
    assert plan_conditions(made, ["original"]).notes == ()


@pytest.mark.parametrize(
    ("made", "wanted", "documents", "message"),
    [
        ([], None, None, "no rows"),
        ([row([])], None, None, "row 'r' has no passages"),
        (rows(2, 3), None, 4, "4 documents a question are wanted, but row 'q0' has 3 passages"),
        ([row([True, True, False])], None, 1, "row 'r' has 2 gold passages, but a question gets 1 documents"),
        (rows(), ["sideways"], None, "'sideways' is no condition; they are slots, original"),
        (rows(), ["slot:x"], None, "'slot:x' is no condition"),
        (rows(), ["slot:6"], None, "slot:6 is outside 1 to 5"),
        (rows(), ["slot:0"], None, "slot:0 is outside 1 to 5"),
        (rows(), ["top:6"], None, "top:6 is outside 1 to 5"),
        (rows(2, 3), ["top"], None, "top starts at 5 documents, but a row has only 3"),
        ([*rows(), row([False] * 5, "bare")], ["slot:1"], None, "row 'bare' has no passage that is marked as gold"),
        (rows(2, 1), ["no-gold"], None, "row 'q0' has only gold passages"),
    ],
)
def test_what_rows_cannot_give_is_one_clear_error(made, wanted, documents, message):
    with pytest.raises(InvalidInputError, match=re.escape(message)):
        plan_conditions(made, wanted, documents)


def test_rows_that_lack_something_can_be_left_out():
    mixed = [row([True, False], "short"), *rows(3, 6), row([False] * 6, "bare")]
    kept, (note,) = usable_rows(mixed)
    assert kept == mixed[1:4]
    assert note.startswith("2 of 5 rows left out, the first because top starts at 5 documents")
    assert usable_rows(mixed, ["slots"], 2) == (mixed[:4], ("1 of 5 rows left out, the first because " + BARE,))
    assert usable_rows(mixed, ["original"]) == (mixed, ())
    with pytest.raises(InvalidInputError, match="5 of 5 rows left out, the first because 7 documents"):
        usable_rows(mixed, None, 7)


BARE = "row 'bare' has no passage that is marked as gold, so none can be put at a slot."


def test_rows_of_different_length_are_said_to_be_cut():
    plan = plan_conditions([*rows(2, 6), *rows(1, 3)], ["original"])
    assert plan.notes == ("rows have 3 to 6 passages, and every question gets 3 documents.",)
    assert plan_conditions([*rows(2, 6), *rows(1, 3)], ["original"], 3).notes == ()


# Intervals

values = st.lists(st.floats(0, 100, allow_nan=False), min_size=1, max_size=60)


@given(values, st.integers(0, 2**32))
def test_intervals_hold_their_mean_and_repeat_for_a_seed(found, seed):
    interval = Bootstrap(seed).interval(found)
    assert min(found) - 1e-9 <= interval.low <= interval.mean <= interval.high <= max(found) + 1e-9
    assert interval == Bootstrap(seed).interval(found)


@given(values)
def test_a_system_does_not_differ_from_itself(found):
    difference = Bootstrap().difference(found, found)
    assert (difference.mean, difference.low, difference.high) == (0, 0, 0)


def test_intervals_are_as_wide_as_theory_says():
    share = Bootstrap(3, resamples=4000).interval([100.0] * 80 + [0.0] * 120)
    half = 1.96 * 100 * (0.4 * 0.6 / 200) ** 0.5
    assert share.mean == pytest.approx(40)
    assert (share.low, share.high) == (pytest.approx(40 - half, abs=1), pytest.approx(40 + half, abs=1))


def test_pairing_narrows_a_difference():
    rng = np.random.default_rng(0)
    hard = rng.uniform(0, 100, 100)
    bootstrap = Bootstrap()
    paired = bootstrap.difference(hard + 5, hard)
    assert (paired.low, paired.high) == (pytest.approx(5), pytest.approx(5))
    assert bootstrap.interval(hard).high - bootstrap.interval(hard).low > 5


def test_draws_depend_on_the_seed_and_not_on_what_was_asked_before():
    found = np.random.default_rng(0).uniform(0, 100, 30)
    bootstrap = Bootstrap(1)
    first = bootstrap.interval(found)
    bootstrap.interval([1.0] * 7)
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


def test_figures_of_a_reader_of_the_first_two_documents():
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


OTHERS = ("original", "shuffled", "no-gold")


def test_an_order_that_the_shuffle_left_alone_says_nothing_of_token_match():
    for passages, least, most in ((1, 0, 0), (2, 5, 35), (3, 25, 39)):
        match = summary_of([Reader("a")], rows(40, passages), OTHERS[:2]).token_match[0]
        assert least <= match.rows <= most and (match.figure is None) == (passages == 1)


def test_identical_systems_do_not_differ():
    summary = summary_of([Reader("a", 2), Reader("b", 2)], rows(20))
    assert {(d.figure.mean, d.figure.low, d.figure.high) for d in summary.differences} == {(0, 0, 0)}


def test_rows_that_do_not_fit_are_counted_and_left_out_of_figures_and_differences():
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


def test_an_order_that_was_asked_already_is_not_asked_again():
    reader = Reader("r")
    predict(rows(4), [reader], plan_conditions(rows(4), ["slot:1", "original", "top:5", "slot:2"]), batch_size=4)
    assert reader.batches == [4, 4]


def test_systems_need_names_of_their_own():
    with pytest.raises(InvalidInputError, match="share a name"):
        predict(rows(), [Reader("r"), Reader("r")], plan_conditions(rows()))


# Systems over a real generator


@pytest.fixture(scope="module")
def generator():
    return tiny.generator("llama", store="memory", passage_length=60, max_new_tokens=6)


def test_fusion_has_the_same_answer_at_every_slot_and_in_every_order(generator):
    systems = [GeneratorSystem("fusion", generator, "fusion"), GeneratorSystem("concat", generator, "concat")]
    made = rows(5)
    # Answers of random weights are no words, so the model's own are made the accepted ones of half of the rows.
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
    assert concat.figure.mean < 100  # the check can fail: a joined prompt does depend on order
    assert summary.slot_spread[0].points == 0.0
    ids = [p.token_ids for p in predictions["fusion", SHUFFLED] if p]
    assert all(ids) and len(set(ids)) == len(made)


def test_a_joined_prompt_that_passes_the_window_does_not_fit(generator):
    long = [QARow("q", "who?", ("x",), tuple(Passage(tiny.WORDS + str(n), gold=n == 0) for n in range(5)))]
    split = tiny.generator("llama", max_document_tokens=200, long_documents="split", max_new_tokens=2)
    systems = [GeneratorSystem("fusion", split, "fusion"), GeneratorSystem("concat", split, "concat")]
    summary = summary_of(systems, long)
    assert summary.cell("fusion", ORIGINAL).not_fitting == 0
    assert summary.cell("concat", ORIGINAL).not_fitting == 1


UNTUNED = {"adapter": None, "decoder": None}


@dataclass
class Shelf:
    """Loads the same generator for whatever is asked, and remembers what was."""

    generator: KVFusionGenerator
    loaded: list = field(default_factory=list)

    def __call__(self, options):
        self.loaded.append(dict(options))
        return self.generator


def test_models_are_loaded_once_and_only_when_needed(generator):
    systems = make_systems(["concat", "fusion", "concat-reorder"], models := Models(shelf := Shelf(generator), LORA))
    assert shelf.loaded == [UNTUNED | {"adapter": "lora"}]
    assert [(s.name, s.mode) for s in systems] == [
        ("concat", "concat"),
        ("fusion", "fusion"),
        ("concat-reorder", "concat"),
    ]
    make_systems(default_systems(LORA), models)
    assert shelf.loaded == [UNTUNED | {"adapter": "lora"}, UNTUNED]
    make_systems(default_systems({}), Models(bare := Shelf(generator), {}))
    assert bare.loaded == [UNTUNED]
    assert models.generator("base", positions="global") is models.generator("base", positions="global")


LORA = {"adapter": "lora"}


def test_a_decoder_trained_on_joined_prompts_reads_what_its_base_has_prefilled(generator, tmp_path):
    (tmp_path / "training.json").write_text("{}")
    inputs = {"sft": str(tmp_path), "concat_model": "wide"}
    make_systems(["sft"], Models(shelf := Shelf(generator), inputs))
    assert shelf.loaded == [UNTUNED | {"model": "wide", "decoder": str(tmp_path)}]


def test_each_system_judges_what_its_name_says(generator, tmp_path):
    """Weights, mode and settings of every system, with all inputs at once."""
    (tmp_path / "adapter_config.json").write_text("{}")
    inputs = {"adapter": "lora", "decoder": "full", "sft": str(tmp_path), "concat_model": "wide"}
    assert default_systems(inputs, focus=True) == list(SYSTEMS)
    joined = {"model": "wide"} | UNTUNED
    tuned, full, sft = (
        UNTUNED | {"adapter": "lora"},
        UNTUNED | {"decoder": "full"},
        joined | {"adapter": str(tmp_path)},
    )
    expected = {
        "fusion": (tuned, "fusion", "uniform"),
        "fusion-full": (full, "fusion", "uniform"),
        "fusion-base": (UNTUNED, "fusion", "uniform"),
        "concat": (joined, "concat", "uniform"),
        "concat-reorder": (joined, "concat", "uniform"),
        "sft": (sft, "concat", "uniform"),
        "sft-reorder": (sft, "concat", "uniform"),
        "pcw": (UNTUNED, "fusion", "uniform"),
        "global": (tuned, "fusion", "global"),
        "ape": (UNTUNED, "ape", "uniform"),
        "focus": (tuned, "fusion", "uniform"),
        "focus-base": (UNTUNED, "fusion", "uniform"),
        "concat-focus": (joined, "concat", "uniform"),
    }
    assert list(expected) == list(SYSTEMS)
    for name, (weights, mode, positions) in expected.items():
        (system,) = make_systems([name], Models(shelf := Shelf(generator), inputs, focus=3, focus_weight=0.0))
        settings = system.generator.settings
        assert (shelf.loaded, system.name, system.mode) == ([weights], name, mode)
        assert settings.positions == positions
        assert settings.passage_length == (None if name == "pcw" else 60)
        assert settings.tuned_concat == name.startswith("sft")
        assert system.focus == (3 if "focus" in name else None)
        assert (system.reorder is long_context_order) == name.endswith("-reorder")
    (system,) = make_systems(["sft"], Models(shelf := Shelf(generator), {"sft": "org/model", "concat_model": "wide"}))
    assert shelf.loaded == [{"model": "org/model"} | UNTUNED]  # a whole model needs no other


def test_default_systems_are_those_whose_inputs_are_there():
    always = ["concat", "concat-reorder", "pcw", "global", "ape"]
    assert default_systems({}) == ["fusion", *always]
    assert default_systems({"adapter": "a"}) == ["fusion", "fusion-base", *always]
    assert default_systems({"decoder": "d"}) == ["fusion-full", "fusion-base", *always]
    assert default_systems({"sft": "s"}) == ["fusion", *always[:2], "sft", "sft-reorder", *always[2:]]
    assert default_systems({}, focus=True) == ["fusion", *always, "focus", "concat-focus"]
    assert default_systems({"adapter": "a"}, focus=True)[-3:] == ["focus", "focus-base", "concat-focus"]
    require_inputs(["fusion-full", "global"], {"decoder": "d"})
    for name, inputs, message in (
        ("fusion-full", {}, "'fusion-full' needs --decoder, which is not given."),
        ("sft-reorder", {"adapter": "a"}, "'sft-reorder' needs --sft, which is not given."),
        ("fusion", {"decoder": "d"}, "needs --adapter, which is not given; the decoder is judged as 'fusion-full'."),
    ):
        with pytest.raises(InvalidInputError, match=re.escape(message)):
            require_inputs([name], inputs)


def test_a_caller_can_add_systems():
    unloaded = Models(lambda options: pytest.fail("loaded"), {})
    made = make_systems(["mine"], unloaded, {"mine": lambda models: Reader("x")})
    assert made == [Reader("x")]
    for wrong, message in (
        (["pcw?"], "'pcw?' is no system; they are fusion"),
        ([], "no system"),
        (["fusion"] * 2, "twice"),
    ):
        with pytest.raises(InvalidInputError, match=re.escape(message)):
            make_systems(wrong, unloaded)


def test_the_identity_says_what_a_system_changes(generator):
    names = ["fusion", "concat", "global", "ape"]
    fusion, concat, moved, ape = make_systems(names, Models(lambda options: generator, {}, 3))
    changed = {"context_window": 512, "max_new_tokens": 3, "positions": "uniform"}
    assert fusion.identity() == generator.identity() | changed
    assert concat.identity()["mode"] == "concat"
    assert moved.identity()["positions"] == "global"
    found = ape.identity()
    assert (found["mode"], found["temperature"], found["scale"]) == ("ape", 0.9, 0.9)


def test_reordering_and_focus_reach_the_generator():
    class Spy:
        def answer_batch(self, questions, documents, *, mode, focus, max_new_tokens):
            return documents, mode, focus, max_new_tokens

    system = GeneratorSystem("s", Spy(), "concat", long_context_order, 7)
    assert system.answer_batch(["?"], [[1, 2, 3, 4]]) == ([[2, 4, 3, 1]], "concat", None, 7)
    assert replace(system, focus=2).answer_batch(["?"], [[1]])[2] == 2


def test_systems_with_focus_keep_the_given_number_else_the_models_own_else_one(generator):
    own = generator.with_settings(focus=2)
    names = ["focus", "focus-base", "concat-focus", "fusion", "concat"]
    for model, wanted, number in ((generator, None, 1), (own, None, 2), (own, 4, 4)):
        systems = make_systems(names, Models(lambda options, found=model: found, LORA, focus=wanted))
        assert [system.focus for system in systems] == [number] * 3 + [None] * 2
        assert [system.identity().get("focus") for system in systems] == [number] * 3 + [None] * 2


def test_systems_with_focus_weigh_scores_alike(generator):
    for wanted, own, expected in ((None, None, 0.0), (None, 3.0, 3.0), (2.0, 3.0, 2.0)):
        model = generator.with_settings(focus_weight=own)
        found = {"adapter": model, None: generator}
        models = Models(
            lambda options, found=found: found[options["adapter"]], {"adapter": "adapter"}, focus_weight=wanted
        )
        systems = make_systems(["focus", "focus-base", "concat-focus"], models)
        assert [system.generator.settings.focus_weight or 0.0 for system in systems] == [expected] * 3


def test_passages_are_scored_by_similarity_to_their_question():
    class Embedder:
        def embed_documents(self, texts):
            return np.array([[float("gold" in text), float("far" in text)] for text in texts])

        def embed_questions(self, texts):
            return np.array([[1.0, -1.0]] * len(texts))

    asked = [QARow(str(n), "?", ("a",), (Passage("gold one", "t", True), Passage(f"far {n}"))) for n in range(2)]
    for row in with_scores(asked, Embedder()):
        assert [passage.score for passage in row.passages] == [1.0, -1.0]
        assert [passage.document("1").score for passage in row.passages] == [1.0, -1.0]


def test_rows_keep_their_scores(tmp_path):
    row = QARow("1", "?", ("a",), (Passage("a", None, True, 0.25), Passage("b")))
    write_rows(tmp_path / "rows.jsonl", [row])
    assert list(read_rows(tmp_path / "rows.jsonl")) == [row]
    assert rows_digest([row]) != rows_digest([replace(row, passages=(Passage("a", None, True), Passage("b")))])
    for wrong in ("true", "NaN", '"0.5"'):
        line = f'{{"question": "?", "answers": [], "passages": [{{"text": "a", "score": {wrong}}}]}}'
        with pytest.raises(InvalidInputError, match=r"score is .*, but it must be a finite number or absent"):
            parse_row(line, "line 1")


def test_plain_fusion_stays_plain_with_a_model_that_has_a_focus():
    own = tiny.generator(focus=1, passage_length=60)
    made = rows(1, 5)[0]
    documents = [[passage.document(str(n)) for n, passage in enumerate(made.passages)]]
    systems = make_systems(["fusion", "fusion-base", "pcw", "global", "concat", "focus"], Models(lambda _: own, {}))
    used = {s.name: sum(x.used for x in s.answer_batch([made.question], documents)[0].sources) for s in systems}
    assert used.pop("focus") == 1
    assert set(used.values()) == {5}


# The command


@pytest.fixture
def command(monkeypatch, tmp_path, generator, model_folder):
    """``kvfusion evaluate`` on six rows with the random model."""
    monkeypatch.setitem(COMMANDS, "evaluate", evaluate)
    monkeypatch.setattr(evaluate, "load_generator", lambda args, store: generator)
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / "rows.jsonl.gz", rows())
    return lambda *argv: main(["evaluate", "--model", str(model_folder), *map(str, argv)])


def test_the_whole_path(capsys, command, tmp_path):
    pytest.importorskip("matplotlib")
    files = ["--output", "a.json", "--markdown", "a.md", "--predictions", "p.jsonl", "--plot", "a.png"]
    assert command("rows.jsonl.gz", "--limit", 4, "--batch-size", 3, "--seed", 5, *files) == 0
    out, err = capsys.readouterr()
    assert [line for line in err.splitlines() if "was not trained" not in line] == []  # a generator says that once
    assert out == (tmp_path / "a.md").read_text()
    assert "**tiny-llama on rows.jsonl.gz: 4 questions, 5 documents each.**" in out
    figures = json.loads((tmp_path / "a.json").read_text())
    assert [system["name"] for system in figures["systems"]] == default_systems({})
    assert figures["systems"][0]["model_id"] == "tiny-llama"
    assert (figures["rows"], figures["documents"], figures["settings"]["seed"]) == (4, 5, 5)
    assert {"date", "command", "commit", "versions", "hardware"} == figures["run"].keys()
    assert len(figures["cells"]) == 6 * len(figures["conditions"]) == 6 * 6
    assert figures["token_match"][0]["figure"] == {"mean": 100.0, "low": 100.0, "high": 100.0}
    assert figures["slot_spread"][0] == {"system": "fusion", "points": 0.0}
    lines = [json.loads(line) for line in (tmp_path / "p.jsonl").read_text().splitlines()]
    assert len(lines) == 4 * len(figures["cells"])
    at_5 = [line["documents"] for line in lines if line["condition"] == "slot:5"]
    assert at_5 == [[2, 3, 4, 5, 1]] * 24
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_files_are_written_also_when_nobody_reads_the_tables(command, tmp_path, monkeypatch):
    def closed(*args, **options):
        raise BrokenPipeError

    monkeypatch.setattr(evaluate, "say", closed)
    assert command("rows.jsonl.gz", "--systems", "fusion", "--output", "a.json", "--markdown", "a.md") != 0
    assert json.loads((tmp_path / "a.json").read_text())["rows"] == 6 and (tmp_path / "a.md").read_text()


def test_a_file_that_was_replaced_meanwhile_is_not_called_the_one_that_was_judged(command, tmp_path, monkeypatch):
    judged = report.file_digest(tmp_path / "rows.jsonl.gz")
    load = evaluate.load_generator

    def replacing(args, store):
        (tmp_path / "rows.jsonl.gz").unlink(missing_ok=True)
        return load(args, store)

    monkeypatch.setattr(evaluate, "load_generator", replacing)
    assert command("rows.jsonl.gz", "--systems", "fusion", "--output", "a.json") == 0
    assert json.loads((tmp_path / "a.json").read_text())["settings"]["file_sha256"] == judged


def test_predictions_are_written_whatever_a_row_holds(command, tmp_path):
    odd = QARow("odd\ud800", "who built \ud83d it?", ("東京\udfff",), row([True, False]).passages)
    lines = report.prediction_lines([odd], {("s", ORIGINAL): [Prediction("\ud800", "x", (1,), (1, 2))]})
    assert json.loads("".join(lines).encode())["answers"] == ["東京\udfff"]


def test_every_table_is_a_table(capsys, command):
    assert command("rows.jsonl.gz") == 0
    sections = capsys.readouterr().out.split("### ")[1:]
    assert len(sections) == 5
    for section in sections:
        lines = [line for line in section.splitlines() if line.startswith("|")]
        assert len({len(line) for line in lines}) == 1 and len({line.count("|") for line in lines}) == 1
        assert len(lines) >= 4


def test_json_is_all_that_is_printed_and_repeats(capsys, command):
    argv = ("rows.jsonl.gz", "--json", "--systems", "fusion,concat", "--conditions", "shuffled,original")
    reports = []
    for _ in range(2):
        assert command(*argv) == 0
        reports.append(json.loads(capsys.readouterr().out))
    for one in reports:
        del one["run"]
    assert reports[0] == reports[1]
    assert reports[0]["conditions"] == ["shuffled", "original"]


def test_what_does_not_fit_is_marked(capsys, command, monkeypatch):
    monkeypatch.setattr(evaluate, "make_systems", lambda *args: [Reader("wide"), Reader("small", limit=4)])
    assert command("rows.jsonl.gz", "--plot", "a.svg") == 0
    out = capsys.readouterr().out
    assert "| small  | does not fit" in out
    assert "- does not fit: documents, question and answer together pass the model's window" in out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["none.jsonl"], "there is no file 'none.jsonl'"),
        (["broken.jsonl"], "broken.jsonl, line 1: passages is None"),
        (["empty.jsonl"], "no rows to evaluate"),
        (["plain.jsonl.gz"], "'plain.jsonl.gz' cannot be read"),
        (["rows.jsonl.gz", "--documents", "6"], "6 documents a question are wanted"),
        (["rows.jsonl.gz", "--conditions", "slot:9"], "slot:9 is outside 1 to 5"),
        (["rows.jsonl.gz", "--seed", "-1"], "'-1' is not a whole number from 0"),
        (["torn.jsonl.gz"], "'torn.jsonl.gz' is damaged"),
        (["squad.json"], "[0] comes with one context, but"),
        (["squad.json"], "kvfusion build-data makes such rows out of squad.json"),
        (["rows.txt"], "'rows.txt' ends in '.txt', but"),
        (["rows.jsonl.gz", "--conditions", ","], "no name is given"),
        (["rows.jsonl.gz", "--systems", "fusion,magic"], "'magic' is no system; they are fusion, fusion-full"),
        (["rows.jsonl.gz", "--systems", "fusion,sft"], "the system 'sft' needs --sft, which is not given"),
        (["rows.jsonl.gz", "--systems", "fusion", "--decoder", "d"], "the decoder is judged as 'fusion-full'"),
        (["rows.jsonl.gz", "--output", "rows.jsonl.gz", "--force"], "rows.jsonl.gz is named twice"),
        (["rows.jsonl.gz", "--output", "x", "--plot", "x"], "x is named twice"),
        (["rows.jsonl.gz", "--output", "empty.jsonl"], "empty.jsonl' exists; name another file"),
        (["rows.jsonl.gz", "--output", "no/a.json"], "is no folder that can be written to"),
        (["rows.jsonl.gz", "--plot", "a.bmp"], "the plot 'a.bmp' must end in one of .png"),
        (["rows.jsonl.gz", "--plot", "a.png", "--conditions", "original"], "no slot is among the conditions"),
    ],
)
def test_mistakes_are_one_line_before_a_model_is_loaded(capsys, command, monkeypatch, tmp_path, argv, message):
    monkeypatch.setattr(evaluate, "load_generator", lambda args, store: pytest.fail("loaded a model"))
    (tmp_path / "broken.jsonl").write_text('{"question": "who?"}\n')
    (tmp_path / "empty.jsonl").write_text("\n")
    packed = (tmp_path / "rows.jsonl.gz").read_bytes()
    (tmp_path / "torn.jsonl.gz").write_bytes(packed[:60] + b"torn" + packed[64:])
    (tmp_path / "plain.jsonl.gz").write_text("not gzip")
    (tmp_path / "rows.txt").write_text("\n")
    asked = {"question": "who?", "answers": [{"text": "Ann", "answer_start": 0}]}
    squad = {"data": [{"title": "t", "paragraphs": [{"context": "Ann did.", "qas": [asked]}]}]}
    (tmp_path / "squad.json").write_text(json.dumps(squad))
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert command(*argv) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and message in err
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.fixture
def old(monkeypatch):
    """A generator over GPT-J, whose attention cannot be exchanged."""
    config = GPTJConfig(n_embd=48, n_layer=2, n_head=4, n_positions=512, rotary_dim=8, vocab_size=512)
    model, tokenizer = AutoModelForCausalLM.from_config(config), tiny.tokenizer("byte-bpe")
    made = KVFusionGenerator(
        TorchModel(Backbone(model, tokenizer, ModelSettings(max_new_tokens=2), model_id="old")), store=None
    )
    monkeypatch.setattr(evaluate, "load_generator", lambda args, store: made)


def test_ape_is_left_out_with_a_note_where_the_model_refuses_it_and_nobody_named_it(capsys, command, old, caplog):
    with caplog.at_level(logging.WARNING):
        assert command("rows.jsonl.gz", "--conditions", "original", "--json") == 0
    figures = json.loads(capsys.readouterr().out)
    assert [system["name"] for system in figures["systems"]] == [n for n in default_systems({}) if n != "ape"]
    assert re.search(r"^ape left out: 'old' \(gptj\) cannot answer in mode 'ape'", figures["notes"][-1])
    assert figures["notes"][-1] in caplog.text


@pytest.mark.parametrize("argv", [["--systems", "fusion,ape"], ["--ape-search", "others.jsonl"]])
def test_ape_by_name_is_an_error_before_another_system_answers(capsys, command, old, monkeypatch, tmp_path, argv):
    write_rows(tmp_path / "others.jsonl", [row([True, *[False] * 4], "other")])
    answered = []
    answer_batch = KVFusionGenerator.answer_batch
    monkeypatch.setattr(
        KVFusionGenerator, "answer_batch", lambda *a, mode, **k: answered.append(answer_batch(*a, mode=mode, **k))
    )
    assert command("rows.jsonl.gz", *argv) == 2
    out, err = capsys.readouterr()
    assert out == "" and "error: 'old' (gptj) cannot answer in mode 'ape'" in err and not answered


def test_an_adapter_is_judged_beside_its_base(capsys, command, monkeypatch, generator):
    adapters = []
    monkeypatch.setattr(evaluate, "load_generator", lambda args, store: adapters.append(args.adapter) or generator)
    assert command("rows.jsonl.gz", "--adapter", "lora", "--conditions", "original", "--json") == 0
    found = [system["name"] for system in json.loads(capsys.readouterr().out)["systems"]]
    assert found == default_systems({"adapter": "lora"}) and "fusion-base" in found
    assert adapters == ["lora", None]


@pytest.mark.parametrize("given", ["shipped", "none"])
def test_the_adapter_in_a_models_folder_is_judged_unless_told_otherwise(
    capsys, command, monkeypatch, generator, tmp_path, given
):
    adapters = []
    monkeypatch.setattr(evaluate, "load_generator", lambda args, store: adapters.append(args.adapter) or generator)
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter/adapter_config.json").write_text("{}")
    options = [] if given == "shipped" else ["--adapter", "none"]
    assert command("rows.jsonl.gz", "--model", tmp_path, *options, "--conditions", "original", "--json") == 0
    assert adapters == ([str(tmp_path / "adapter"), None] if given == "shipped" else [None])


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two base models of other weights, a tuned decoder of the first, and an adapter for each."""
    place = tmp_path_factory.mktemp("models")
    for seed, name in enumerate(("base", "decoder", "wide")):
        tiny.save(place / name, seed=seed)
        (place / name / "kvfusion.json").write_text('{"passage_length": 90}')
    for seed, (name, base) in enumerate((("adapter", 0), ("sft", 2))):
        torch.manual_seed(seed)
        lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
        get_peft_model(tiny.model("llama", seed=base), lora).save_pretrained(place / name)
        (place / name / "kvfusion.json").write_text('{"passage_length": 90}')
    return place


def test_all_systems_in_one_run(folders, monkeypatch, tmp_path):
    """The command's answers are those of a generator made by hand with the weights, mode and settings of each."""
    monkeypatch.setitem(COMMANDS, "evaluate", evaluate)
    made = rows(3)
    write_rows(tmp_path / "rows.jsonl", made)
    given = [f"--{name}={folders / name}" for name in ("adapter", "decoder", "sft")]
    argv = [
        "evaluate",
        tmp_path / "rows.jsonl",
        "--model",
        folders / "base",
        "--concat-model",
        folders / "wide",
        *given,
    ]
    argv += [
        "--focus",
        "2",
        "--conditions",
        "original",
        "--max-new-tokens",
        "6",
        "--predictions",
        tmp_path / "p.jsonl",
    ]
    assert main([str(arg) for arg in argv]) == 0
    found = {}
    for line in map(json.loads, (tmp_path / "p.jsonl").read_text().splitlines()):
        found.setdefault(line["system"], []).append(tuple(line["token_ids"]))
    assert list(found) == list(SYSTEMS)
    expected = {
        "fusion": ("base", {"adapter": folders / "adapter"}),
        "fusion-full": ("base", {"decoder": folders / "decoder"}),
        "fusion-base": ("base", {}),
        "concat": ("wide", {"mode": "concat"}),
        "sft": ("wide", {"mode": "concat", "adapter": folders / "sft", "tuned_concat": True}),
        "pcw": ("base", {"passage_length": None}),
        "global": ("base", {"adapter": folders / "adapter", "positions": "global"}),
        "ape": ("base", {"mode": "ape"}),
        "focus": ("base", {"adapter": folders / "adapter", "focus": 2}),
        "focus-base": ("base", {"focus": 2}),
        "concat-focus": ("wide", {"mode": "concat", "focus": 2}),
    }
    for name, (base, options) in expected.items():
        changes = {key: options.pop(key) for key in ("passage_length", "tuned_concat") if key in options}
        focus = options.pop("focus", None)
        gen = KVFusionGenerator.from_pretrained(folders / base, **{"mode": "fusion"} | options).with_settings(
            **changes
        )
        documents = [[p.document(str(n)) for n, p in enumerate(one.passages)] for one in made]
        answers = gen.answer_batch([one.question for one in made], documents, focus=focus, max_new_tokens=6)
        assert found[name] == [answer.token_ids for answer in answers], name
    assert len({str(found[name]) for name in expected}) == len(expected)  # no two of them are the same


def test_force_overwrites(capsys, command, tmp_path):
    (tmp_path / "a.json").write_text("old")
    assert command("rows.jsonl.gz", "--conditions", "original", "--output", "a.json", "--force") == 0
    assert json.loads((tmp_path / "a.json").read_text())["conditions"] == ["original"]


def test_a_plot_without_matplotlib_names_the_extra(monkeypatch, tmp_path):
    monkeypatch.setattr(plots, "find_spec", lambda name: None)
    with pytest.raises(MissingDependencyError, match=re.escape('pip install "kvfusion-rag[evaluation]"')):
        plots.require_plotting(tmp_path / "a.png")


def test_lost_in_the_middle_rows_are_answered_as_they_stand(capsys, command, tmp_path):
    made = rows(3)
    lines = [
        {"question": one.question, "answers": list(one.answers), "nq_annotated_gold": {}}
        | {"ctxs": [{"id": n, "title": "", "text": p.text, "isgold": p.gold} for n, p in enumerate(one.passages)]}
        for one in made
    ]
    (tmp_path / "middle.jsonl").write_text("\n".join(map(json.dumps, lines)))
    write_rows(
        tmp_path / "own.jsonl", [QARow(str(n), r.question, r.answers, r.passages) for n, r in enumerate(made, 1)]
    )
    found = []
    for name in ("middle.jsonl", "own.jsonl"):
        options = ["--systems", "fusion,concat", "--force", "--predictions", "p.jsonl", "--json"]
        assert command(name, *options) == 0
        cells = json.loads(capsys.readouterr().out)["cells"]
        found.append((cells, (tmp_path / "p.jsonl").read_text()))
    assert found[0] == found[1] and '"condition": "slot:5"' in found[0][1]


def test_unusable_rows_are_skipped_on_demand_and_counted(capsys, command, tmp_path):
    write_rows(tmp_path / "mixed.jsonl", [*rows(3), row([False] * 5, "bare")])
    assert command("mixed.jsonl", "--conditions", "slots") == 2
    assert "row 'bare' has no passage" in capsys.readouterr().err
    assert command("mixed.jsonl", "--conditions", "slots", "--skip-rows", "--limit", 3, "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["rows"], report["notes"]) == (3, ["1 of 4 rows left out, the first because " + BARE])


def test_notes_reach_the_terminal_and_the_report(capsys, command, tmp_path, caplog):
    write_rows(tmp_path / "two.jsonl", rows(2, 2))
    with caplog.at_level(logging.WARNING):
        assert command("two.jsonl", "--systems", "fusion") == 0
    assert "top left out: top starts at 5 documents" in caplog.text
    assert "- top left out: top starts at 5 documents" in capsys.readouterr().out


def test_a_report_holds_no_folders_of_the_machine(monkeypatch):
    monkeypatch.setattr(
        sys, "argv", ["/opt/kvfusion", "evaluate", "/me/rows.jsonl", "--model=/srv/m", "--plot", "a/b.png"]
    )
    assert report.run_facts()["command"] == "kvfusion evaluate rows.jsonl --model=m --plot a/b.png"
