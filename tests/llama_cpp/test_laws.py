"""The laws of fusion on llama.cpp, with torch over the same GGUF file as the reference."""

from __future__ import annotations

import random

import pytest
import torch
from gguf import GGMLQuantizationType
from tiny_llama_cpp import DOCUMENTS, QUESTION, error, load, logits_of, save, save_adapter

from kvfusion_rag import (
    DiskStore,
    Document,
    DocumentStore,
    InvalidInputError,
    KVFusionGenerator,
    UnsupportedModelError,
)

pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
from kvfusion_rag.llama_cpp import model as llama_cpp_model

TOLERANCE = 5e-3  # of logits, relative to the largest: keys and values are rounded to 16 bits
modes = pytest.mark.parametrize("mode", ["fusion", "concat"])


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return save(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    return save_adapter(tmp_path_factory.mktemp("adapter"))


@pytest.fixture(scope="module")
def generator(file) -> KVFusionGenerator:
    return load(file)


@pytest.fixture(scope="module")
def reference(file) -> KVFusionGenerator:
    return load(file, "torch")


@modes
@pytest.mark.parametrize("count", [0, 1, 4])
def test_logits_are_those_of_torch(generator, reference, mode, count):
    found, expected = (logits_of(gen, QUESTION, DOCUMENTS[:count], mode=mode) for gen in (generator, reference))
    assert error(found, expected) < TOLERANCE


@modes
def test_logits_with_an_adapter_are_those_of_torch(file, adapter, mode):
    with_adapter = [load(file, engine, adapter=adapter) for engine in ("llama.cpp", "torch")]
    found, expected = (logits_of(gen, QUESTION, DOCUMENTS, mode=mode) for gen in with_adapter)
    assert error(found, expected) < TOLERANCE
    if mode == "fusion":
        without = logits_of(load(file), QUESTION, DOCUMENTS)
        assert error(found, without) > 10 * TOLERANCE


def test_documents_are_read_without_the_adapter(file, adapter, tmp_path):
    load(file, store=tmp_path).prefill(DOCUMENTS)
    answer = load(file, store=tmp_path, adapter=adapter).answer(QUESTION, DOCUMENTS, focus=None)
    assert {source.origin for source in answer.sources} == {"disk"}


@pytest.mark.parametrize("focus", [None, 2])
def test_order_does_not_change_a_bit(generator, focus):
    report = generator.check_invariance(QUESTION, DOCUMENTS, permutations=4, focus=focus)
    assert report.max_logit_difference == 0 and len(report.answers) == 1


@pytest.mark.parametrize("cache_type", ["f16", "q8_0"])
def test_stored_documents_are_computed_ones(file, tmp_path, cache_type):
    first = load(file, store=tmp_path, cache_type=cache_type)
    expected = logits_of(first, QUESTION, DOCUMENTS)
    first.store.flush()
    second = load(file, store=tmp_path, cache_type=cache_type)
    assert torch.equal(logits_of(second, QUESTION, DOCUMENTS), expected)
    assert {source.origin for source in second.answer(QUESTION, DOCUMENTS).sources} <= {"disk", "memory"}


def test_torch_and_llama_cpp_never_share_a_document(file, tmp_path):
    load(file, "torch", store=tmp_path).prefill(DOCUMENTS)
    answer = load(file, store=tmp_path).answer(QUESTION, DOCUMENTS)
    assert {source.origin for source in answer.sources} == {"computed"}


@modes
def test_batch_answers_as_singles(generator, mode):
    rng = random.Random(0)
    questions = [" ".join(rng.choices(["river", "mill", "lamp", "pier", "boat"], k=3)) for _ in range(6)]
    documents = [rng.sample(DOCUMENTS, rng.randint(1, 4)) for _ in questions]
    shared = [*documents[:3], documents[0], documents[0], documents[1][:1]]
    batch = generator.answer_batch(questions, shared, mode=mode, max_new_tokens=6)
    singles = [
        generator.answer(question, given, mode=mode, max_new_tokens=6)
        for question, given in zip(questions, shared, strict=True)
    ]
    assert [answer.token_ids for answer in batch] == [answer.token_ids for answer in singles]


def test_focus_scores_are_those_of_torch(generator, reference):
    found, expected = (gen.answer(QUESTION, DOCUMENTS, focus=1).sources for gen in (generator, reference))
    assert [source.focus_score for source in found] == pytest.approx(
        [source.focus_score for source in expected], rel=1e-3
    )
    assert [source.used for source in found] == [source.used for source in expected]


def test_effects_are_those_of_torch(generator, reference):
    found, expected = (
        gen.answer(QUESTION, DOCUMENTS, max_new_tokens=4, attribution="effects") for gen in (generator, reference)
    )
    assert found.token_ids == expected.token_ids
    effects = [source.effect for source in expected.sources]
    assert [source.effect for source in found.sources] == pytest.approx(effects, rel=0.05, abs=0.02)


def test_long_answer_outgrows_its_context(generator, monkeypatch):
    expected = generator.answer_batch([QUESTION] * 3, [DOCUMENTS] * 3, max_new_tokens=200)
    monkeypatch.setattr(llama_cpp_model, "SPARE_CELLS", 2000)
    roomy = generator.answer_batch([QUESTION] * 3, [DOCUMENTS] * 3, max_new_tokens=200)
    assert [answer.token_ids for answer in expected] == [answer.token_ids for answer in roomy]


def test_stream_is_the_answer(generator):
    expected = generator.answer(QUESTION, DOCUMENTS, max_new_tokens=12)
    stream = generator.stream(QUESTION, DOCUMENTS, max_new_tokens=12)
    assert "".join(stream).strip() == expected.text


def test_quantised_cache_is_smaller_and_close(file):
    small, usual = load(file, cache_type="q8_0"), load(file)
    assert small._engine.model.kv_shape.nbytes(10) < 0.6 * usual._engine.model.kv_shape.nbytes(10)
    found, expected = (logits_of(gen, QUESTION, DOCUMENTS) for gen in (small, usual))
    assert 0 < error(found, expected) < 0.05


def test_quantised_weights_are_near_their_dequantised_values(tmp_path):
    path = save(tmp_path, kind=GGMLQuantizationType.Q8_0)
    found, expected = (logits_of(load(path, engine), QUESTION, DOCUMENTS) for engine in ("llama.cpp", "torch"))
    assert error(found, expected) < 0.05


def test_attention_is_refused(generator):
    with pytest.raises(UnsupportedModelError, match="engine='torch'"):
        generator.answer(QUESTION, DOCUMENTS, attribution="attention")
    with pytest.raises(UnsupportedModelError, match="engine='torch'"):
        generator.answer(QUESTION, DOCUMENTS, mode="ape")


def test_positions_with_gaps_are_refused(file):
    with pytest.raises(UnsupportedModelError, match="passage_length"):
        load(file, passage_length=100).answer(QUESTION, DOCUMENTS)
    with pytest.raises(UnsupportedModelError, match="positions"):
        load(file, positions="global").answer(QUESTION, DOCUMENTS)


def test_generator_answers_from_several_threads(generator):
    from concurrent.futures import ThreadPoolExecutor

    expected = generator.answer(QUESTION, DOCUMENTS, max_new_tokens=8).token_ids
    with ThreadPoolExecutor(4) as pool:
        streams = [
            pool.submit(lambda: list(generator.stream(QUESTION, DOCUMENTS, max_new_tokens=8))) for _ in range(4)
        ]
        answers = [pool.submit(generator.answer, QUESTION, DOCUMENTS, max_new_tokens=8) for _ in range(4)]
        assert {answer.result().token_ids for answer in answers} == {expected}
        assert len({"".join(stream.result()) for stream in streams}) == 1


@pytest.mark.parametrize(
    ("option", "value"), [("dtype", "bfloat16"), ("device", "cuda"), ("cache_type", "q4_0"), ("gpu_layers", 3)]
)
def test_options_that_do_not_apply_are_refused(file, option, value):
    with pytest.raises(InvalidInputError, match=option):
        load(file, **{option: value})
    if option in ("cache_type", "gpu_layers"):
        with pytest.raises(InvalidInputError, match="only engine"):
            load(file, "torch", **{option: value})


def test_documents_of_one_token_and_empty_ones(generator):
    answer = generator.answer(QUESTION, [Document("a"), Document(" ")], max_new_tokens=2)
    assert [source.origin for source in answer.sources][1] == "blank"


def test_quantised_cache_is_not_quantised_again(file, tmp_path):
    with pytest.raises(InvalidInputError, match="codec"):
        load(file, store=DocumentStore(disk=DiskStore(tmp_path, codec="v8")), cache_type="q8_0")


def test_signals_of_support_are_those_of_torch(generator, reference):
    found, expected = (gen.support_signals([QUESTION], [DOCUMENTS])[0][1] for gen in (generator, reference))
    assert found["gain"] == pytest.approx(expected["gain"], abs=0.02)
    assert found["coverage"] == pytest.approx(expected["coverage"], abs=0.02)
