"""Systems: their weights, modes and settings, and the scores of passages."""

import re
from dataclasses import dataclass, field, replace

import numpy as np
import pytest
import tiny
from readers import Reader, rows

from kvfusion_rag import KVFusionGenerator
from kvfusion_rag.data.rows import Passage, QARow, read_rows, row_from, rows_digest, write_rows
from kvfusion_rag.errors import InvalidInputError
from kvfusion_rag.evaluation.orders import long_context_order
from kvfusion_rag.evaluation.scores import with_scores
from kvfusion_rag.evaluation.systems import (
    SYSTEMS,
    GeneratorSystem,
    Models,
    default_systems,
    make_systems,
    require_inputs,
)

UNTUNED = {"adapter": None, "decoder": None}
LORA = {"adapter": "lora"}


@dataclass
class Shelf:
    """Returns the same generator for all options, and records them."""

    generator: KVFusionGenerator
    loaded: list = field(default_factory=list)

    def __call__(self, options):
        self.loaded.append(dict(options))
        return self.generator


def test_models_are_loaded_once_and_on_first_use(generator):
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


def test_decoder_trained_on_joined_prompts_is_loaded_over_its_base(generator, tmp_path):
    (tmp_path / "training.json").write_text("{}")
    inputs = {"sft": str(tmp_path), "concat_model": "wide"}
    make_systems(["sft"], Models(shelf := Shelf(generator), inputs))
    assert shelf.loaded == [UNTUNED | {"model": "wide", "decoder": str(tmp_path)}]


def test_each_system_has_its_weights_mode_and_settings(generator, tmp_path):
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
    assert shelf.loaded == [{"model": "org/model"} | UNTUNED]  # a whole model needs no adapter


def test_default_systems_are_those_with_inputs():
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
        ("fusion", {"decoder": "d"}, "needs --adapter, which is not given; with a decoder only, use 'fusion-full'."),
    ):
        with pytest.raises(InvalidInputError, match=re.escape(message)):
            require_inputs([name], inputs)


def test_callers_can_add_systems():
    unloaded = Models(lambda options: pytest.fail("loaded"), {})
    made = make_systems(["mine"], unloaded, {"mine": lambda models: Reader("x")})
    assert made == [Reader("x")]
    for wrong, message in (
        (["pcw?"], "system is 'pcw?', but it must be one of fusion"),
        ([], "no system is named"),
        (["fusion"] * 2, "twice"),
    ):
        with pytest.raises(InvalidInputError, match=re.escape(message)):
            make_systems(wrong, unloaded)


def test_identity_contains_the_changes_of_a_system(generator):
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


def test_systems_with_focus_keep_the_given_number_or_the_models_or_one(generator):
    own = generator.with_settings(focus=2)
    names = ["focus", "focus-base", "concat-focus", "fusion", "concat"]
    for model, wanted, number in ((generator, None, 1), (own, None, 2), (own, 4, 4)):
        systems = make_systems(names, Models(lambda options, found=model: found, LORA, focus=wanted))
        assert [system.focus for system in systems] == [number] * 3 + [None] * 2
        assert [system.identity().get("focus") for system in systems] == [number] * 3 + [None] * 2


def test_systems_with_focus_share_the_weight_of_scores(generator):
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
    for wrong in (True, float("nan"), "0.5"):
        data = {"question": "?", "answers": [], "passages": [{"text": "a", "score": wrong}]}
        with pytest.raises(InvalidInputError, match=r"score is .*, but it must be a finite number or missing"):
            row_from(data, "line 1")


def test_plain_systems_ignore_the_models_focus():
    own = tiny.generator(focus=1, passage_length=60)
    made = rows(1, 5)[0]
    documents = [[passage.document(str(n)) for n, passage in enumerate(made.passages)]]
    names = ["fusion", "fusion-base", "pcw", "global", "concat", "focus"]
    systems = make_systems(names, Models(lambda _: own, {}, max_new_tokens=2))
    used = {s.name: sum(x.used for x in s.answer_batch([made.question], documents)[0].sources) for s in systems}
    assert used.pop("focus") == 1
    assert set(used.values()) == {5}
