"""Keyword arguments of the Python API: a wrong name is an error with the nearest one, and each advice works."""

from __future__ import annotations

import inspect

import pytest
import tiny
from indexes import WordEmbedder
from transformers import TorchAoConfig

from kvfusion_rag import (
    DiskStore,
    DocumentIndex,
    DocumentStore,
    InvalidInputError,
    KVFusionGenerator,
    MemoryStore,
    RemoteStore,
    UnknownOptionError,
)
from kvfusion_rag.fusion.load_options import LoadKwargs
from kvfusion_rag.option_names import EXPLAINED
from kvfusion_rag.store import open_store

DOCUMENTS = ["the river runs past an old mill", "two grey doves sleep"]
QUESTION = "who?"


@pytest.fixture(scope="module")
def gen():
    return tiny.generator("llama", store="memory")


MISSPELT = [
    (lambda g, p: KVFusionGenerator.from_pretrained(tiny.save(p / "m"), dtyp="float32"), "dtype"),
    (lambda g, p: KVFusionGenerator.from_pretrained(tiny.save(p / "m"), name_space="x"), "namespace"),
    (lambda g, p: g.with_settings(pasage_length=3), "passage_length"),
    (lambda g, p: g.answer(QUESTION, DOCUMENTS, temprature=1), "temperature"),
    (lambda g, p: g.answer(QUESTION, DOCUMENTS, prompts=["x"]), "prompt"),
    (lambda g, p: g.answer(QUESTION, document=DOCUMENTS), "documents"),
    (lambda g, p: g.answer_batch([QUESTION], [DOCUMENTS], prompt="x"), "prompts"),
    (lambda g, p: g.stream(QUESTION, DOCUMENTS, max_new_token=3), "max_new_tokens"),
    (lambda g, p: g.aanswer(QUESTION, DOCUMENTS, mod="concat"), "mode"),
    (lambda g, p: g.aanswer_batch([QUESTION], [DOCUMENTS], sed=1), "seed"),
    (lambda g, p: g.attribute(QUESTION, DOCUMENTS, answers="x"), "answer"),
    (lambda g, p: g.show_prompt(QUESTION, DOCUMENTS, focused=1), "focus"),
    (lambda g, p: g.check_invariance(QUESTION, DOCUMENTS, permutation=2), "permutations"),
    (lambda g, p: g.prefill(DOCUMENTS, prompts="x"), "prompt"),
    (lambda g, p: g.prefetch(DOCUMENTS, questions="x"), "question"),
    (lambda g, p: DocumentStore(memry=MemoryStore()), "memory"),
    (lambda g, p: MemoryStore(max_byte=3), "max_bytes"),
    (lambda g, p: DiskStore(p / "s", max_size_bytes=3), "max_bytes"),
    (lambda g, p: RemoteStore("memory://s", readonly=True), "read_only"),
    (lambda g, p: open_store(p / "s", max_byte=3), "max_bytes"),
    (lambda g, p: open_store(p / "s", codecs="raw"), "codec"),
    (lambda g, p: DocumentIndex(count_tokens=len, chunk_token=9, embedder=WordEmbedder()), "chunk_tokens"),
]


@pytest.mark.parametrize(("call", "nearest"), MISSPELT, ids=[f"{n}-{right}" for n, (_, right) in enumerate(MISSPELT)])
def test_misspelt_name_is_an_error_with_the_nearest_one(gen, tmp_path, call, nearest):
    with pytest.raises(UnknownOptionError, match=f"is not an option of .*; the nearest option is '{nearest}'"):
        call(gen, tmp_path)


def test_name_that_resembles_none_is_an_error_with_all_names(gen):
    with pytest.raises(TypeError, match=r"'x' is not an option of .*prefill; the options are chat_template_kwargs, "):
        gen.prefill(DOCUMENTS, x=1)


def test_options_of_a_file_system_are_passed_on(tmp_path):
    assert RemoteStore((tmp_path / "s").as_uri(), auto_mkdir=True).url.startswith("file:")


def test_load_options_are_those_of_from_pretrained():
    named = inspect.signature(KVFusionGenerator.from_pretrained).parameters
    assert KVFusionGenerator.load_options() == {*named, *LoadKwargs.__annotations__} - {"model", "options"}


def test_own_names_are_never_explained_away(gen):
    """An explained name that is an option somewhere is accepted there."""
    answer = gen.answer(QUESTION, DOCUMENTS, temperature=1.0, top_k=3, top_p=0.9, seed=1, stop=["x"], focus=1)
    assert answer.text is not None
    assert {"device", "dtype", "adapter", "decoder", "store"} <= KVFusionGenerator.load_options()


@pytest.mark.parametrize("name", sorted(set(EXPLAINED) - KVFusionGenerator.load_options()))
def test_names_of_other_libraries_are_explained_at_load(name):
    with pytest.raises(UnknownOptionError) as raised:
        KVFusionGenerator.from_pretrained("no/model", **{name: 1})
    assert str(raised.value) == f"{name!r} is not an option of KVFusionGenerator.from_pretrained; {EXPLAINED[name]}."


@pytest.mark.parametrize(
    ("names", "options"),
    [
        (["torch_dtype"], {"dtype": "bfloat16"}),
        (["device_map"], {"device": "cpu"}),
        (["device_map"], {"model_kwargs": {"device_map": "cpu"}}),
        (["attn_implementation"], {"model_kwargs": {"attn_implementation": "sdpa"}}),
        (["token", "use_auth_token"], {"model_kwargs": {"token": "hf_x"}}),
        (["cache_dir"], {"model_kwargs": {"cache_dir": "cache"}}),
    ],
    ids=str,
)
def test_advice_for_loading_works(tmp_path, monkeypatch, names, options):
    monkeypatch.chdir(tmp_path)
    [(option, value)] = options.items()
    for name in names:
        assert option in EXPLAINED[name]
        assert not isinstance(value, dict) or next(iter(value)) in EXPLAINED[name]
    assert KVFusionGenerator.from_pretrained(tiny.save(tmp_path / "model"), **options).answer(QUESTION, DOCUMENTS)


def test_advice_for_quantized_weights_works(tmp_path):
    torchao = pytest.importorskip("torchao.quantization")
    config = TorchAoConfig(torchao.Int8WeightOnlyConfig())
    for name in ("load_in_8bit", "load_in_4bit", "quantization_config"):
        assert "model_kwargs={'quantization_config': TorchAoConfig(...)}" in EXPLAINED[name]
    options = {"model_kwargs": {"quantization_config": config}}
    gen = KVFusionGenerator.from_pretrained(tiny.save(tmp_path / "model"), **options)
    assert gen.answer(QUESTION, DOCUMENTS, max_new_tokens=2)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("max_length", {"max_new_tokens": 3}),
        ("max_tokens", {"max_new_tokens": 3}),
        ("do_sample", {"temperature": 0.5}),
        ("stop_strings", {"stop": ["x"]}),
    ],
)
def test_advice_for_answers_works(gen, name, options):
    [option] = options
    assert option in EXPLAINED[name]
    with pytest.raises(UnknownOptionError, match=option):
        gen.answer(QUESTION, DOCUMENTS, **{name: 1})
    assert gen.answer(QUESTION, DOCUMENTS, **options)


@pytest.mark.parametrize("name", ["num_beams", "repetition_penalty", "pad_token_id", "trust_remote_code"])
def test_unsupported_names_can_be_left_out(gen, name):
    assert EXPLAINED[name].startswith("leave it out, because ")


def test_advice_for_streams_works(gen):
    with pytest.raises(UnknownOptionError, match="call stream, which yields the answer in pieces"):
        gen.answer(QUESTION, DOCUMENTS, streamer=object())
    assert "".join(gen.stream(QUESTION, DOCUMENTS, max_new_tokens=3)) is not None


def test_loading_options_of_a_call_are_explained(gen):
    with pytest.raises(UnknownOptionError, match="it is chosen when the model is loaded, with KVFusionGenerator"):
        gen.answer(QUESTION, DOCUMENTS, device="cpu")
    with pytest.raises(InvalidInputError, match="it is an option of each call"):
        KVFusionGenerator.from_pretrained("no/model", temperature=0.5)
