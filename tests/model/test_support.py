"""The support gate: a model that cannot be fused exactly is rejected at load, with the cause."""

import pytest
import torch
from tiny import ARCHITECTURES, SIZES, backbone, config, tokenizer
from transformers import BloomConfig, Qwen3MoeConfig
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

from kvfusion_rag import UnsupportedModelError
from kvfusion_rag.fusion.gate import run_gate
from kvfusion_rag.fusion.prefill import prefill
from kvfusion_rag.model.backbone import Backbone
from kvfusion_rag.model.support import configuration_checks
from kvfusion_rag.text.settings import ModelSettings


def gate(bone):
    return run_gate(bone, None, range(10, 390), tokens_per_pass=128)


def random_backbone(made, name: str) -> Backbone:
    network = AutoModelForCausalLM.from_config(made)
    for parameter in network.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.15)
    return Backbone(network, tokenizer("byte-bpe"), ModelSettings(), model_id=name)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_supported_configurations(architecture):
    assert all(check.passed for check in configuration_checks(config(architecture)))


@pytest.mark.parametrize("kind", ["linear", "llama3", "yarn"])
def test_rope_that_does_not_depend_on_length_passes_the_gate(kind):
    rope = {"rope_type": kind, "rope_theta": 1e4, "factor": 2.0}
    if kind != "linear":
        rope["original_max_position_embeddings"] = 256
    if kind == "llama3":
        rope |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    assert gate(backbone("llama", rope_parameters=rope)).passed


def test_attention_biased_by_slot_fails_the_numeric_gate(monkeypatch):
    """Bloom's ALiBi bias counts slots, and its forward ignores positions. Its configuration is not checked here."""
    monkeypatch.setattr("kvfusion_rag.model.backbone.require_supported", lambda *_: None)
    monkeypatch.setattr("kvfusion_rag.fusion.gate.configuration_checks", lambda _: ())
    bone = random_backbone(BloomConfig(hidden_size=48, n_layer=2, n_head=4, vocab_size=512), "tiny-bloom")
    with pytest.raises(UnsupportedModelError, match=r"tiny-bloom.*support gate"):
        gate(bone)


def test_inexact_prefill_fails_the_numeric_gate(monkeypatch):
    bone = backbone("llama")
    exact = bone.prefill
    monkeypatch.setattr(bone, "prefill", lambda *rows: tuple(t * 1.01 for t in exact(*rows)))
    with pytest.raises(UnsupportedModelError, match="one fused document"):
        gate(bone)


@pytest.mark.parametrize("attention", ["flash_attention_2", "flex_attention"])
def test_attention_that_counts_slots_is_rejected_for_a_model_with_windows(attention):
    network = AutoModelForCausalLM.from_config(config("mistral", sliding_window=64))
    network.config._attn_implementation = attention
    with pytest.raises(UnsupportedModelError, match=f"windows.*{attention}.*'sdpa'"):
        Backbone(network, tokenizer("byte-bpe"), ModelSettings(), model_id="some-model")


def test_mixture_of_experts_prefills_each_document_in_its_own_pass():
    """The shapes of its products depend on all tokens of a pass, so other documents would change a document's bits."""
    experts = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "decoder_sparse_step": 1}
    bone = random_backbone(Qwen3MoeConfig(**SIZES, **experts, head_dim=12), "tiny-experts")
    assert gate(bone).passed
    documents = [tuple(range(i, i + 20)) for i in range(10, 40)]
    together = dict(prefill(bone, documents, None, tokens_per_pass=128))
    for index, document in enumerate(documents):
        ((_, alone),) = prefill(bone, [document], None, tokens_per_pass=128)
        assert torch.equal(alone.keys, together[index].keys)
