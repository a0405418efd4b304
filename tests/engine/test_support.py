"""Support: equal in every order, batch, stream and store; found follows the threshold; nothing is measured unasked."""

import asyncio
import json
import math
import random
from dataclasses import replace

import pytest
import tiny
import torch

from kvfusion_rag import (
    Document,
    InvalidInputError,
    KVFusionGenerator,
    ModelLoadError,
    NotCalibratedError,
    SupportCalibration,
    Tool,
)
from kvfusion_rag.fusion import torch_model
from kvfusion_rag.fusion.likelihood import token_log_probabilities
from kvfusion_rag.fusion.prefill import prefill
from kvfusion_rag.fusion.torch_model import TorchModel
from kvfusion_rag.text.settings import ModelSettings
from kvfusion_rag.text.support import OF_ONE as OF_ONE_DOCUMENT
from kvfusion_rag.text.support import SIGNALS, coverage, rare_coverage
from tests.test_generator import DOCUMENTS

OF_ONE = SupportCalibration({"gain": 0.4, "coverage": 2.0}, -1.0, 0.5)
CALIBRATION = SupportCalibration({"explained": 1.0, "rare_coverage": 1.5, "lead": 0.3}, -0.5, 0.5, without=OF_ONE)
QUESTION = "what runs past the mill?"
modes = pytest.mark.parametrize("mode", ["fusion", "concat", "ape"])
focuses = pytest.mark.parametrize("focus", [None, 1, 2])


def nested(levels):
    """Return a calibration as JSON with ``levels`` others inside each other."""
    data = None
    for _ in range(levels + 1):
        data = {"weights": {"gain": 1}, "bias": 0, "threshold": 0.5, "without": data}
    return data


def made(**changes):
    return tiny.generator("llama", support=CALIBRATION, prefix="the river ", max_new_tokens=4, **changes)


@pytest.fixture
def passes(monkeypatch):
    """Return the number of documents of each pass that measured support, which also reads the question alone."""
    counts = []

    def counted(backbone, prefix, documents, ids, *, given):
        if None in documents:
            counts.append(len(documents))
        return token_log_probabilities(backbone, prefix, documents, ids, given=given)

    monkeypatch.setattr(torch_model, "token_log_probabilities", counted)
    return counts


# What it depends on


@modes
@focuses
def test_support_is_equal_in_every_order_batch_and_stream(mode, focus):
    gen = made(mode=mode)
    options = {"min_support": 0.5, "focus": focus}
    expected = gen.answer(QUESTION, DOCUMENTS, **options)
    assert 0 < expected.support < 1 and expected.found == (expected.support >= 0.5)
    for seed in range(3):
        shuffled = random.Random(seed).sample(DOCUMENTS, len(DOCUMENTS))
        assert gen.answer(QUESTION, shuffled, **options).support == expected.support
        others = [["rain falls", "two grey doves sleep"], shuffled, [DOCUMENTS[1]]]
        batch = gen.answer_batch(["who sleeps?", QUESTION, QUESTION], others, **options)
        assert batch[1].support == expected.support
        assert batch[2].support == gen.answer(QUESTION, others[2], **options).support
    stream = gen.stream(QUESTION, DOCUMENTS, **options)
    assert "".join(stream) == expected.text
    assert (stream.answer.support, stream.answer.found) == (expected.support, expected.found)
    assert asyncio.run(gen.aanswer(QUESTION, DOCUMENTS, **options)).support == expected.support


@focuses
def test_support_does_not_depend_on_the_store(tmp_path, focus):
    bone = tiny.backbone("qwen3", settings=ModelSettings(mode="fusion", support=CALIBRATION))
    found = set()
    for store in (None, "memory", tmp_path, tmp_path):
        gen = KVFusionGenerator(TorchModel(bone), store=store)
        for _ in range(2):
            found.add(gen.answer(QUESTION, DOCUMENTS, max_new_tokens=3, focus=focus, min_support=0).support)
    assert len(found) == 1


def test_support_does_not_change_the_answer():
    gen = made()
    gen.prefill(DOCUMENTS)
    plain, measured = (gen.answer(QUESTION, DOCUMENTS, min_support=value) for value in (None, 0.5))
    assert replace(measured, support=None, found=None, timings=plain.timings) == plain
    assert (plain.support, plain.found, plain.notice) == (None, None, None)


@modes
@focuses
def test_signals_are_equal_in_every_order_batch_and_store(mode, focus, tmp_path):
    scored = [replace(DOCUMENTS[0], score=0.3), *(Document(text, score=len(text) / 20) for text in DOCUMENTS[1:])]
    scored += [replace(scored[0], id="again", score=0.7), Document(" ", score=3)]  # equal to another one, and blank
    options = {"mode": mode, "focus": focus}
    gen, stored = made(focus_weight=2.0), made(focus_weight=2.0, store=tmp_path)
    [(_, expected)] = gen.support_signals([QUESTION], [scored], **options)
    assert set(expected) == set(SIGNALS)
    for seed in range(4):
        shuffled = random.Random(seed).sample(scored, len(scored))
        batch = [[DOCUMENTS[0], "rain falls"], shuffled, scored]
        found = stored.support_signals(["who sleeps?", QUESTION, QUESTION], batch, **options)
        assert [signals for _, signals in found[1:]] == [expected] * 2


def test_the_best_document_is_one_that_was_read():
    gen = made(focus_weight=1e6)
    scored = [Document("two grey doves sleep", score=9), Document("the river runs past the mill", score=1)]
    [(_, alone)] = gen.support_signals([QUESTION], [scored[:1]])
    focused, both = (gen.support_signals([QUESTION], [scored], focus=focus)[0][1] for focus in (1, None))
    for name in OF_ONE_DOCUMENT:
        assert focused[name] == pytest.approx(alone[name], rel=1e-4) == pytest.approx(both[name], rel=1e-4)
    assert focused["lead"] < 0 and focused["focus_lead"] == pytest.approx(2e6, rel=1e-3)
    [(_, unscored)] = gen.support_signals([QUESTION], [[replace(one, score=None) for one in scored]], focus=1)
    assert unscored["lead"] == pytest.approx(-focused["lead"], rel=1e-3)
    assert unscored["rare_coverage"] > focused["rare_coverage"]


def test_signals_of_one_document_compare_nothing():
    gen = made(focus_weight=2.0)
    one = DOCUMENTS[0]
    for documents in ([one], [one, replace(one, id="2")], [replace(one, score=1), ""]):
        [(_, signals)] = gen.support_signals([QUESTION], [documents])
        assert set(signals) == set(OF_ONE_DOCUMENT)


def test_the_lead_of_focus_needs_scores_that_count():
    scored = [replace(DOCUMENTS[0], score=1), Document("b", score=1), " "]
    missing = [scored[0], "b"]
    for weight, documents, has_lead in ((2.0, scored, True), (0.0, scored, False), (2.0, missing, False)):
        [(_, signals)] = made(focus_weight=weight).support_signals([QUESTION], [documents])
        assert ("focus_lead" in signals, "lead" in signals) == (has_lead, True)
        if has_lead:
            assert signals["focus_lead"] == signals["lead"], "equal scores say nothing"


@focuses
def test_signals_are_those_of_the_best_document(focus):
    gen = made()
    model, plain = gen._engine.model, gen._engine.encoder.plain
    [(answer, signals)] = gen.support_signals([QUESTION], [DOCUMENTS], focus=focus)
    lead, ids = (plain.encode(text, continues=True) for text in ("Question:", f"Question: {QUESTION}"))
    prefix_ids = gen._engine.encoder.prefix_ids
    [(_, prefix)] = prefill(model.backbone, [tuple(prefix_ids)], None, tokens_per_pass=128)
    kvs = dict(prefill(model.backbone, list(gen._engine.read(DOCUMENTS).keys.values()), prefix, tokens_per_pass=128))
    documents = [*kvs.values(), None]
    *given, none = token_log_probabilities(model.backbone, prefix, documents, ids, given=len(lead)).sum(dim=1).tolist()
    best, *others = sorted(given, reverse=True)
    assert signals["gain"] == pytest.approx(best - none, rel=1e-4)
    assert signals["explained"] == pytest.approx((best - none) / -none, rel=1e-4)
    assert signals["lead"] == pytest.approx(best - max(others), rel=1e-4)
    assert answer.support is None and 0 <= signals["coverage"] <= 1


def test_a_document_that_is_the_prefix_itself_gains_nothing():
    """The text without a document is read like the text behind an empty one."""
    bone = tiny.backbone("llama")
    [(_, kv)] = prefill(bone, [(5, 6, 7)], None, tokens_per_pass=128)
    as_prefix = token_log_probabilities(bone, kv, [None], (8, 9, 10, 11), given=2)
    as_document = token_log_probabilities(bone, None, [kv], (8, 9, 10, 11), given=2)
    assert torch.equal(as_prefix, as_document) and as_prefix.shape == (1, 2)
    alone = token_log_probabilities(bone, None, [None], (8, 9, 10, 11), given=2)
    logits = bone.model(input_ids=torch.tensor([[8, 9, 10]])).logits[0, 1:].log_softmax(-1)
    expected = [logits[0, 10].item(), logits[1, 11].item()]
    assert alone[0].tolist() == pytest.approx(expected, rel=1e-4)


# Cost


def test_one_pass_if_asked_and_none_otherwise(passes):
    gen = made()
    gen.answer(QUESTION, DOCUMENTS)
    gen.answer_batch([QUESTION] * 2, [DOCUMENTS] * 2, focus=1)
    assert passes == []
    gen.answer(QUESTION, DOCUMENTS, min_support="auto", focus=1)
    assert passes == [2]  # the chosen document, and none
    gen.answer(QUESTION, DOCUMENTS, min_support=0)
    assert passes == [2, 4]


def test_focus_does_not_score_documents_again(monkeypatch):
    gen, scored = made(), []
    score = TorchModel.token_likelihoods

    def scoring(self, prefix, documents, ids, *, given):
        scored.append(len(documents))
        return score(self, prefix, documents, ids, given=given)

    monkeypatch.setattr(TorchModel, "token_likelihoods", scoring)
    gen.answer(QUESTION, DOCUMENTS, focus=1, min_support=0)
    assert scored == [len(DOCUMENTS), 2]  # all documents, then the chosen one and none


# Found


@pytest.mark.parametrize("documents", [DOCUMENTS, DOCUMENTS[1:]])
def test_found_follows_the_threshold(documents):
    gen = made()
    support = gen.answer(QUESTION, documents, min_support=0).support
    above, below = support + 1e-9, support - 1e-9
    assert [gen.answer(QUESTION, documents, min_support=p).found for p in (0, below, support)] == [True] * 3
    assert [gen.answer(QUESTION, documents, min_support=p).found for p in (above, 1)] == [False] * 2
    auto = gen.with_settings(support=replace(CALIBRATION, threshold=above)).answer(
        QUESTION, documents, min_support="auto"
    )
    assert (auto.found, auto.support) == (False, support)


def test_auto_is_the_threshold_of_the_calibration_that_has_all_signals():
    gen = made()
    alone, several = (
        gen.answer(QUESTION, documents, min_support=0).support for documents in (DOCUMENTS[:1], DOCUMENTS)
    )
    for found_alone, found in ((True, False), (False, True)):
        without = replace(OF_ONE, threshold=alone if found_alone else alone + 1e-9)
        changed = replace(CALIBRATION, threshold=several if found else several + 1e-9, without=without)
        auto = gen.with_settings(support=changed, min_support="auto")
        assert auto.answer(QUESTION, DOCUMENTS[:1]).found is found_alone
        assert auto.answer(QUESTION, DOCUMENTS).found is found


def test_a_calibration_of_two_signals_as_they_were_at_first_still_counts(tmp_path):
    """Older files have no ``without`` and weigh gain and coverage."""
    folder = tiny.save(tmp_path / "model", settings=ModelSettings())
    file = folder / "kvfusion.json"
    data = {"weights": {"gain": 0.4, "coverage": 2.0}, "bias": -1.0, "threshold": 0.5}
    file.write_text(json.dumps(json.loads(file.read_text()) | {"support": data}))
    gen = KVFusionGenerator.from_pretrained(folder)
    [(_, signals)] = gen.support_signals([QUESTION], [DOCUMENTS], max_new_tokens=2)
    score = 0.4 * signals["gain"] + 2 * signals["coverage"] - 1
    support = gen.answer(QUESTION, DOCUMENTS, max_new_tokens=2, min_support="auto").support
    assert support == pytest.approx(1 / (1 + math.exp(-score)))


def test_an_answer_that_is_not_found_keeps_its_text_and_has_a_notice():
    gen = made()
    found, missing = (gen.answer(QUESTION, DOCUMENTS, min_support=p) for p in (0, 1))
    assert missing.text == found.text and found.notice is None
    assert missing.notice == f"The documents probably do not contain the answer (support {missing.support:.0%})."
    data = json.loads(json.dumps(missing.to_dict()))
    assert (data["support"], data["found"], data["notice"]) == (missing.support, False, missing.notice)


def test_the_threshold_of_the_settings_applies_to_calls_without_their_own():
    gen = made(min_support=1.0)
    assert gen.answer(QUESTION, DOCUMENTS).found is False
    assert gen.answer(QUESTION, DOCUMENTS, min_support=0).found is True
    assert gen.answer(QUESTION).found is None  # without documents there is nothing to find


def test_empty_answers_are_not_found(passes):
    empty = made().answer(QUESTION, DOCUMENTS, min_support=0.1, stop=list("abcdefghijklmnopqrstuvwxyz 0123456789"))
    assert empty.text.strip() == "" and (empty.support, empty.found) == (0.0, False)
    assert passes == []


def test_blank_documents_have_no_support():
    answer = made().answer(QUESTION, ["  ", Document("")], min_support=0.5)
    assert (answer.support, answer.found) == (None, None)


def test_calls_of_tools_have_no_support():
    tool = Tool("clock", "tells the time", {"type": "object", "properties": {}, "additionalProperties": False})
    options = {"tools": [tool], "tool_choice": "required", "min_support": 0.5, "max_new_tokens": 60}
    answer = made().answer(QUESTION, DOCUMENTS, **options)
    assert answer.tool_calls and (answer.support, answer.found) == (None, None)


# Errors


def test_a_model_without_calibration_is_a_clear_error():
    gen = tiny.generator("llama")
    with pytest.raises(NotCalibratedError, match="'auto', but tiny-llama has no calibration of support; measure one"):
        gen.answer(QUESTION, DOCUMENTS, min_support="auto")
    with pytest.raises(NotCalibratedError, match=r"min_support is 0\.5, but the model has no calibration"):
        gen.with_settings(min_support=0.5)


@pytest.mark.parametrize("value", [-0.1, 1.1, float("nan"), True, "high", [0.5]])
def test_wrong_thresholds_are_rejected(value):
    with pytest.raises(InvalidInputError, match="must be a number from 0 to 1, 'auto' or None"):
        made().answer(QUESTION, DOCUMENTS, min_support=value)
    with pytest.raises(InvalidInputError, match="must be a number from 0 to 1, 'auto' or None"):
        made().with_settings(min_support=value)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        ([], r"support is \[\], but it must be an object with weights, bias, threshold"),
        ({"weights": {}, "bias": 0}, "must be an object with"),
        ({"weights": {"gain": 1}, "bias": 0, "threshold": 0.5, "more": 1}, "must be an object with"),
        (
            {"weights": {}, "bias": 0, "threshold": 0.5},
            r"weights of support are \{\}, but they must have one or more of",
        ),
        (
            {"weights": {"joy": 1}, "bias": 0, "threshold": 0.5},
            "one or more of gain, explained, coverage, rare_coverage",
        ),
        ({"weights": {"lead": 1}, "bias": 0, "threshold": 0.5}, "have lead, which some questions lack, so 'without'"),
        (
            {"weights": {"lead": 1}, "bias": 0, "threshold": 0.5, "without": 3},
            "support is 3, but it must be an object",
        ),
        (nested(17), "'without' of support is nested more than 16 levels deep"),
        (nested(300), "'without' of support is nested more than 16 levels deep"),
        ({"weights": {"gain": 1, "coverage": "x"}, "bias": 0, "threshold": 0.5}, "coverage of support is 'x'"),
        ({"weights": {"gain": 1, "coverage": 1}, "bias": None, "threshold": 0.5}, "bias of support is None"),
        ({"weights": {"gain": 1, "coverage": 1}, "bias": 0, "threshold": 2}, "threshold of support is 2"),
    ],
)
def test_settings_files_with_a_wrong_calibration_are_rejected(tmp_path, data, reason):
    folder = tiny.save(tmp_path / "model", settings=ModelSettings())
    file = folder / "kvfusion.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"support": data}))
    with pytest.raises(ModelLoadError, match=reason):
        KVFusionGenerator.from_pretrained(folder)


def test_a_calibration_survives_its_settings_file(tmp_path):
    folder = tiny.save(tmp_path / "model", settings=ModelSettings(support=CALIBRATION))
    gen = KVFusionGenerator.from_pretrained(folder, min_support="auto")
    assert gen.settings.support == CALIBRATION and gen.settings.min_support == "auto"
    assert gen.answer(QUESTION, DOCUMENTS, max_new_tokens=2).found is not None


# Coverage


def tokens_of(text, values):
    """Return one token per word, with the space in front of it."""
    starts = [0, *(n for n, letter in enumerate(text) if letter == " ")]
    return [(a, b, value) for a, b, value in zip(starts, [*starts[1:], len(text)], values, strict=True)]


def test_coverage_is_the_share_of_surprisal_in_the_document():
    text = "who built lighthouses"
    tokens = tokens_of(text, [1.0, 2.0, 5.0])
    assert coverage(text, tokens, "He BUILT it.") == 2 / 8
    assert coverage(text, tokens, "A Lighthouse was built, by whom?") == 7 / 8  # endings do not count, short words do
    assert coverage(text, tokens, "") == 0
    assert coverage("?!", [(0, 2, 3.0)], "anything") == 0


def test_a_token_may_spell_a_part_of_a_word_or_several_words():
    tokens = [(0, 2, 1.0), (2, 5, 2.0), (5, 9, 4.0)]  # "mi", "lls ", "a-b "
    assert coverage("mills a-b", tokens, "mills") == 3 / 11
    assert coverage("mills a-b", tokens, "a") == 4 / 11


def test_coverage_of_a_long_question():
    text = "mill " * 20_000
    tokens = [(5 * n, 5 * n + 5, 1.0) for n in range(20_000)]
    assert coverage(text, tokens, "the mill") == 1


def test_coverage_ignores_case_and_accents():
    assert coverage("Café", [(0, 4, 2.0)], "CAFE") == 1


# Rare words


def test_rare_words_weigh_more():
    documents = ["the mill burnt", "the mill", "the river"]
    weights = {
        "who": math.log(3 / 0.5),
        "burnt": math.log(3 / 0.5),
        "the": math.log(3 / 2.5),
        "mill": math.log(3 / 1.5),
    }
    found = rare_coverage("Who burnt THE mill?", documents[0], documents[1:])
    assert found == pytest.approx(1 - weights["who"] / sum(weights.values()))
    assert rare_coverage("Who burnt THE mill?", documents[0], documents[:0:-1]) == found
    assert rare_coverage("Who burnt THE mill?", documents[0], []) == pytest.approx(3 / 4), "all words are equally rare"
    assert rare_coverage("?!", "the mill", ["rain"]) == 0
