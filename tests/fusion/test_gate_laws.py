"""The gate finds models that count cache slots, and length-dependent RoPE is exact up to its limit."""

import pytest
import tiny
import torch
from transformers import AutoModelForCausalLM, GPTNeoConfig, Llama4TextConfig, Phi3Config

from kvfusion_rag import ContextLimitError, KVFusionGenerator, MemoryStore, UnsupportedModelError
from kvfusion_rag.fusion import gate
from kvfusion_rag.fusion.gate import run_gate
from kvfusion_rag.fusion.prefill import prefill, prefill_prefix
from kvfusion_rag.fusion.torch_model import TorchModel
from kvfusion_rag.model.backbone import Backbone
from kvfusion_rag.text.settings import ModelSettings

ENDS = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 1, "intermediate_size_mlp": 96, "head_dim": 12}
LONGROPE = {
    "rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 6, "long_factor": [2.0] * 6,
    "original_max_position_embeddings": 128,
}  # fmt: skip


def backbone_of(made) -> Backbone:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = AutoModelForCausalLM.from_config(made)
        for parameter in network.parameters():
            if parameter.dim() > 1:
                torch.nn.init.normal_(parameter, std=0.15)
    settings = ModelSettings(mode="fusion")
    return Backbone(network.eval(), tiny.tokenizer("byte-bpe"), settings, model_id="tiny-model")


def llama4(**changes) -> Llama4TextConfig:
    kinds = ["chunked_attention", "chunked_attention", "full_attention"]
    return Llama4TextConfig(
        **tiny.SIZES,
        **ENDS,
        **EXPERTS,
        layer_types=kinds,
        attention_chunk_size=16,
        no_rope_layer_interval=3,
        **changes,
    )  # fmt: skip


@pytest.mark.parametrize(
    "made",
    [
        GPTNeoConfig(
            hidden_size=48, num_layers=2, num_heads=4, vocab_size=512, window_size=256, max_position_embeddings=2048,
            attention_types=[[["global", "local"], 1]], **ENDS,
        ),
        llama4(floor_scale=64),
        llama4(floor_scale=8192),
    ],
    ids=["gpt_neo", "llama4", "llama4 with the real scale"],
)  # fmt: skip
def test_a_model_that_counts_slots_is_rejected_without_its_configuration(made, monkeypatch):
    monkeypatch.setattr(gate, "configuration_checks", lambda config: ())
    with pytest.raises(UnsupportedModelError, match="empty slots before the question change nothing: relative error"):
        run_gate(backbone_of(made), None, range(10, 390), tokens_per_pass=128)


def test_chunks_are_exact_if_nothing_counts_slots():
    made = backbone_of(llama4(attn_temperature_tuning=False))
    assert run_gate(made, None, range(10, 390), tokens_per_pass=128).passed


def test_empty_slots_exceed_every_window_of_the_configuration():
    bone = tiny.backbone("mistral", sliding_window=700)
    (*_, check) = run_gate(bone, None, range(10, 390), tokens_per_pass=128).checks
    assert check.name.startswith("701 empty slots") and check.passed


def longrope() -> Backbone:
    made = Phi3Config(**tiny.SIZES, **ENDS, rope_parameters=LONGROPE, original_max_position_embeddings=128)
    return backbone_of(made)


def test_longrope_ends_the_context_window_where_its_rotations_switch():
    gen = KVFusionGenerator(TorchModel(longrope()), store=MemoryStore())
    assert gen.context_window == 128
    gen.answer("who?", ["the mill"], max_new_tokens=5)
    limit = (
        r"the answer up to 500, but tiny-model has 128 \(of 512; its 'longrope' RoPE switches its rotations there\)"
    )
    with pytest.raises(ContextLimitError, match=limit):
        gen.answer("who?", ["the mill"], max_new_tokens=500)


def test_pads_do_not_pass_the_limit():
    """A document of 100 tokens is padded to 128 behind a prefix of 8. Longer positions would switch all rotations."""
    made = longrope()
    prefix = prefill_prefix(made, tuple(range(300, 308)))
    ids = tuple(range(20, 120))
    ((_, padded),) = prefill(made, [ids], prefix, tokens_per_pass=128)
    exact, _ = made.prefill(torch.tensor([ids]), prefix)
    torch.testing.assert_close(padded.keys, exact[:, 0], rtol=1e-4, atol=1e-4)


def test_dynamic_rope_is_exact_within_the_context_window():
    rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    bone = tiny.backbone("llama", rope_parameters=rope)
    assert bone.context_window == 512 and run_gate(bone, None, range(10, 390), tokens_per_pass=128).passed
