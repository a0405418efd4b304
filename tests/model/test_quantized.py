"""8-bit weights from torchao: the laws hold as for any other model, and store keys depend on the weights' format."""

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


def load(folder, config, **options):
    quantized = {"quantization_config": TorchAoConfig(config)} if config is not None else {}
    return KVFusionGenerator.from_pretrained(folder, mode="fusion", model_kwargs=quantized, **options)


def tokens(made: KVFusionGenerator, documents=DOCUMENTS):
    return made.answer("who built it?", documents, max_new_tokens=8).token_ids


def origins(made: KVFusionGenerator) -> set[str]:
    return {source.origin for source in made.answer("who?", DOCUMENTS, max_new_tokens=1).sources}


@pytest.fixture(scope="module", params=["llama", "qwen3", "bert"])
def folder(request, tmp_path_factory):
    return save(tmp_path_factory.mktemp(request.param), request.param)


def test_any_order_gives_the_same_answer_with_or_without_a_store(folder):
    store = MemoryStore()
    assert origins(load(folder, None, store=store)) == {"computed"}
    for config in FORMATS.values():
        made = load(folder, config, store=store)
        assert made.gate.passed
        assert origins(made) == {"computed"}  # formats do not share documents
        expected = tokens(made)
        assert tokens(made, DOCUMENTS[::-1]) == expected == tokens(load(folder, config, store=None))
        assert origins(made) == {"memory"}


def test_changed_weight_of_a_quantized_model_is_noticed(model_folder):
    made = load(model_folder, FORMATS["int8"], store=MemoryStore())
    assert origins(made) == {"computed"}
    weights = made._engine.model.backbone.model.state_dict(keep_vars=True).values()
    weight = next(w for w in weights if type(w).__name__ == "Int8Tensor")
    with torch.no_grad():
        weight.qdata.add_(1)
    made.bump_epoch()
    assert origins(made) == {"computed"}


def test_adapter_of_the_unquantized_base_answers_over_quantized_weights(model_folder, tmp_path):
    torch.manual_seed(0)
    settings = LoraConfig(r=4, lora_alpha=64, target_modules="all-linear", init_lora_weights=False)
    get_peft_model(model("llama"), settings).save_pretrained(tmp_path)
    record = '{"base_model": "base", "base_weights": "digest of the unquantized weights", "dtype": "float32"}'
    (tmp_path / RECORD_NAME).write_text(record)
    store = MemoryStore()
    base = load(model_folder, FORMATS["int8"], store=store)
    tuned = load(model_folder, FORMATS["int8"], store=store, adapter=tmp_path)
    assert tokens(base) != tokens(tuned) == tokens(tuned, DOCUMENTS[::-1])
    assert origins(tuned) == {"memory"}  # both prefill without the adapter


def test_8_bit_activations_are_rejected(model_folder):
    with pytest.raises(UnsupportedModelError, match="failed the support gate"):
        load(model_folder, Int8DynamicActivationInt8WeightConfig())
