"""Weights in 8 bit through torchao: the laws hold as for any other model, and keys know which weights they are of."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny import model, save
from torchao.quantization import Float8WeightOnlyConfig, Int8DynamicActivationInt8WeightConfig, Int8WeightOnlyConfig
from transformers import TorchAoConfig

from kvfusion_rag import KVFusionGenerator, MemoryStore, UnsupportedModelError
from kvfusion_rag.text.settings import RECORD_NAME

DOCUMENTS = ["two grey doves sleep", "Amara Osei built a lighthouse of 31 metres", "rain falls on the roof"]
FORMATS = {"int8": Int8WeightOnlyConfig(), "float8": Float8WeightOnlyConfig()}


def load(folder, how, **options):
    quantized = {"quantization_config": TorchAoConfig(how)} if how is not None else {}
    return KVFusionGenerator.from_pretrained(folder, mode="fusion", model_kwargs=quantized, **options)


def tokens(made: KVFusionGenerator, documents=DOCUMENTS):
    return made.answer("who built it?", documents, max_new_tokens=8).token_ids


@pytest.fixture(scope="module", params=["llama", "qwen3", "bert"])
def folder(request, tmp_path_factory):
    return save(tmp_path_factory.mktemp(request.param), request.param)


@pytest.mark.parametrize("how", FORMATS.values(), ids=FORMATS)
def test_any_order_is_the_same_and_stored_is_computed(folder, how):
    store = MemoryStore()
    made = load(folder, how, store=store)
    assert made.gate.passed
    expected = tokens(made)
    assert tokens(made, DOCUMENTS[::-1]) == expected == tokens(load(folder, how, store=None))
    assert {s.origin for s in made.answer("who?", DOCUMENTS).sources} == {"memory"}


def test_formats_share_no_documents_in_a_store(folder):
    store = MemoryStore()
    generators = [load(folder, how, store=store) for how in (None, *FORMATS.values())]
    for made in generators:
        assert {s.origin for s in made.answer("who?", DOCUMENTS).sources} == {"computed"}


def test_a_changed_weight_of_a_quantized_model_is_noticed(folder):
    made = load(folder, FORMATS["int8"], store=MemoryStore())
    tokens(made)
    weights = made._engine.model.backbone.model.state_dict(keep_vars=True)
    weight = next(w for w in weights.values() if type(w).__name__ == "Int8Tensor")
    with torch.no_grad():
        weight.qdata.add_(1)
    made.bump_epoch()
    assert {s.origin for s in made.answer("who?", DOCUMENTS).sources} == {"computed"}


def test_an_adapter_of_the_unquantized_base_answers_over_quantized_weights(model_folder, tmp_path):
    torch.manual_seed(0)
    settings = LoraConfig(r=4, lora_alpha=64, target_modules="all-linear", init_lora_weights=False)
    get_peft_model(model("llama"), settings).save_pretrained(tmp_path / "adapter")
    (tmp_path / "adapter" / RECORD_NAME).write_text(
        '{"base_model": "base", "base_weights": "of the unquantized ones", "dtype": "float32"}'
    )
    store = MemoryStore()
    plain = load(model_folder, FORMATS["int8"], store=store)
    tuned = load(model_folder, FORMATS["int8"], store=store, adapter=tmp_path / "adapter")
    assert tokens(plain) != tokens(tuned) == tokens(tuned, DOCUMENTS[::-1])
    assert {s.origin for s in tuned.answer("who?", DOCUMENTS).sources} == {"memory"}  # Dp is the same


def test_activations_in_8_bit_are_no_exact_prefill_and_are_refused(folder):
    with pytest.raises(UnsupportedModelError, match="failed the support gate"):
        load(folder, Int8DynamicActivationInt8WeightConfig())
