"""Every kind of adapter equals peft's own model, with documents read by the true base, or is refused with the reason.

peft computes the expected values in two explicit steps (``tests/helpers/peft_models.py``).
"""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.tuners.lora.config import ArrowConfig, BdLoraConfig, KasaConfig, MontecloraConfig, VeloraConfig
from peft.utils.peft_types import PeftType
from peft_models import document_kvs, error, fused, joined, load, move, one_pass, reader, trained, two_steps

from kvfusion_rag import KVFusionGenerator, ModelLoadError
from kvfusion_rag.model.adapters.kinds import ACCEPTED_TYPES
from kvfusion_rag.model.tolerance import tolerance_of

TOLERANCE = tolerance_of(torch.float32)
TARGETS = {"target_modules": ["q_proj", "v_proj", "down_proj"]}

LORA = {
    "plain": {},
    "rank-stabilized": {"use_rslora": True},
    "DoRA": {"use_dora": True},
    "rank patterns": {"rank_pattern": {"layers.1.self_attn.q_proj": 7}, "alpha_pattern": {"v_proj": 32}},
    "some layers": {"layers_to_transform": [1]},
    "regular expression": {"target_modules": r".*self_attn\.(q|k)_proj"},
    "excluded module": {"exclude_modules": ["layers.0.self_attn.q_proj"]},
    "all linear": {"target_modules": "all-linear"},
    "biases of its own": {"lora_bias": True},
    "parameters": {"target_modules": ["q_proj"], "target_parameters": ["mlp.down_proj.weight"]},
    "trained head": {"modules_to_save": ["lm_head"]},
    "trained embeddings": {"modules_to_save": ["embed_tokens"]},
    "trained head and embeddings": {"modules_to_save": ["lm_head", "embed_tokens"]},
    "tied head and embeddings": {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    "trained norms": {"modules_to_save": ["input_layernorm"]},
    "trained blocks": {"target_modules": ["q_proj"], "modules_to_save": ["mlp"]},
    "trained tokens": {"trainable_token_indices": [11, 12, 13]},
    "trained tokens of both": {"trainable_token_indices": {"embed_tokens": [11, 12], "lm_head": [3]}},
    "low-rank embeddings": {"target_modules": ["embed_tokens", "q_proj"]},
    "low-rank head": {"target_modules": ["lm_head", "q_proj"]},
    "Gaussian": {"init_lora_weights": "gaussian"},
    "EVA": {"init_lora_weights": "eva"},
    "orthogonal": {"init_lora_weights": "orthogonal"},
    "MiCA": {"init_lora_weights": "mica"},
    "PiSSA": {"init_lora_weights": "pissa"},
    "PiSSA, rank-stabilized": {"init_lora_weights": "pissa", "use_rslora": True, "rank_pattern": {"q_proj": 6}},
    "PiSSA with DoRA": {"init_lora_weights": "pissa", "use_dora": True},
    "OLoRA": {"init_lora_weights": "olora"},
    "QALoRA": {"use_qalora": True, "qalora_group_size": 12},
    "VeLoRA": {"velora_config": VeloraConfig()},
    "MonteCLoRA": {"monteclora_config": MontecloraConfig()},
}
TYPES = {
    "ADALORA": {**TARGETS, "total_step": 10},
    "C3A": {**TARGETS, "block_size": 12},
    "IA3": {"target_modules": ["k_proj", "v_proj", "down_proj"], "feedforward_modules": ["down_proj"]},
    "LN_TUNING": {},
    "MISS": {**TARGETS, "r": 12},
    "OFT": {**TARGETS, "oft_block_size": 4},
    "PSOFT": {**TARGETS, "r": 4},
    "ROAD": {**TARGETS, "group_size": 12},
    "SHIRA": {**TARGETS, "r": 4},
    "TRAINABLE_TOKENS": {"target_modules": ["embed_tokens"], "token_indices": [11, 12, 13]},
    "VBLORA": {**TARGETS, "vector_length": 2, "num_vectors": 16},
    "WAVEFT": {**TARGETS, "n_frequency": 64},
    "UNILORA": {**TARGETS, "r": 16},
}
REFUSED_TYPES = {
    "ADAPTION_PROMPT": {"adapter_len": 4, "adapter_layers": 2},
    "CARTRIDGE": {"num_virtual_tokens": 4},
    "CPT": {"cpt_token_ids": [1, 2], "cpt_mask": [1, 1], "cpt_tokens_type_mask": [1, 2], "task_type": "CAUSAL_LM"},
    "MULTITASK_PROMPT_TUNING": {"num_virtual_tokens": 4, "num_tasks": 2},
    "POLY": {**TARGETS, "r": 4, "n_tasks": 2, "n_skills": 2},
    "PREFIX_TUNING": {"num_virtual_tokens": 4},
    "PROMPT_TUNING": {"num_virtual_tokens": 4},
    "P_TUNING": {"num_virtual_tokens": 4},
    "SHADOW": {},
    "XLORA": {"adapters": {"one": "one"}},
}
REFUSED_OPTIONS = {
    "CorDA": ({"init_lora_weights": "corda"}, "from activations"),
    "LoRA-GA": ({"init_lora_weights": "lora_ga"}, "from gradients"),
    "LoftQ": ({"init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 4}}, "quantized base weights"),
    "PiSSA with niter": ({"init_lora_weights": "pissa_niter_4"}, "randomized decomposition"),
    "activated LoRA": ({"alora_invocation_tokens": [11]}, "switched on by tokens"),
    "Arrow": ({"arrow_config": ArrowConfig()}, "chooses between other adapters"),
    "block-diagonal": ({"use_bdlora": BdLoraConfig()}, "not tested"),
    "KaSA": ({"kasa_config": KasaConfig()}, "removes parts of the base weights"),
    "Megatron": ({"megatron_config": {"a": 1}}, "needs layers of Megatron"),
    "more layers": ({"layer_replication": [[0, 2], [1, 3]]}, "adds layers"),
    "classifier": ({"task_type": "SEQ_CLS"}, "for the task SEQ_CLS"),
}


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def base(request, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tied" if request.param else "untied")
    return tiny.save(folder, tie_word_embeddings=request.param, attention_bias=True)


@pytest.fixture(scope="module")
def one_base(tmp_path_factory) -> Path:
    return tiny.save(tmp_path_factory.mktemp("base"))


def require_equal_to_peft(base: Path, adapter: Path) -> None:
    true_base = load(base)
    adapted = PeftModel.from_pretrained(load(base), adapter).eval()
    bone, plain = reader(base, adapter), reader(base)
    expected = two_steps(true_base, adapted)
    assert error(expected, two_steps(true_base, true_base)) > 10 * TOLERANCE  # the adapter has an effect
    for _ in range(2):  # the adapter is on, off for documents, and on again
        assert error(fused(bone), expected) < TOLERANCE
        assert error(joined(bone), one_pass(adapted)) < TOLERANCE
    assert torch.equal(fused(bone, adapter=False), fused(plain))
    for kv, of_base in zip(document_kvs(bone), document_kvs(plain), strict=True):
        assert torch.equal(kv.keys, of_base.keys) and torch.equal(kv.values, of_base.values)
    assert bone.fingerprint() == plain.fingerprint()


@pytest.mark.parametrize("options", LORA.values(), ids=LORA)
def test_lora_equals_peft(base, tmp_path, options):
    trained(base, LoraConfig(**{"r": 4, "lora_alpha": 16, **TARGETS, **options})).save_pretrained(tmp_path)
    require_equal_to_peft(base, tmp_path)


@pytest.mark.parametrize("kind", sorted(ACCEPTED_TYPES - {"LORA"}))
def test_other_types_equal_peft(one_base, tmp_path, kind):
    config = PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(kind)](**TYPES.get(kind, TARGETS))
    trained(one_base, config).save_pretrained(tmp_path)
    require_equal_to_peft(one_base, tmp_path)


def test_every_type_of_peft_is_accepted_or_refused_in_these_tests():
    assert {kind.value for kind in PeftType} == ACCEPTED_TYPES | REFUSED_TYPES.keys()


@pytest.mark.parametrize("kind", REFUSED_TYPES)
def test_types_that_change_more_than_layers_are_refused_by_name(one_base, tmp_path, kind):
    PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(kind)](**REFUSED_TYPES[kind]).save_pretrained(tmp_path)
    with pytest.raises(ModelLoadError, match=f"is of type {kind}, which (puts|replaces|needs|runs|chooses)"):
        reader(one_base, tmp_path)


@pytest.mark.parametrize(("options", "reason"), REFUSED_OPTIONS.values(), ids=REFUSED_OPTIONS)
def test_lora_that_depends_on_a_changed_base_is_refused(one_base, tmp_path, options, reason):
    LoraConfig(**TARGETS, **options).save_pretrained(tmp_path)
    with pytest.raises(ModelLoadError, match=reason):
        reader(one_base, tmp_path)


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_trained_biases_of_the_base_are_refused(base, tmp_path, bias):
    trained(base, LoraConfig(**TARGETS, bias=bias)).save_pretrained(tmp_path)
    with pytest.raises(ModelLoadError, match=r"also changes 'model\.layers\.0\.\S+bias' of the base model"):
        reader(base, tmp_path)
    get_peft_model(load(base), LoraConfig(**TARGETS, bias=bias)).save_pretrained(tmp_path / "unchanged")
    reader(base, tmp_path / "unchanged")


@pytest.mark.parametrize("initial", ["pissa_niter_4", "pissa", "olora"])
def test_converted_adapters_of_a_changed_base_are_read_on_the_true_base(one_base, tmp_path, initial):
    """The advice in the refusal works: peft saves the difference to the initial weights."""
    torch.manual_seed(0)
    adapted = get_peft_model(load(one_base), LoraConfig(r=4, **TARGETS, init_lora_weights=initial))
    adapted.peft_config["default"].init_lora_weights = True
    adapted.save_pretrained(tmp_path / "initial")
    adapted.peft_config["default"].init_lora_weights = initial
    move(adapted).save_pretrained(tmp_path / "new", path_initial_model_for_weight_conversion=tmp_path / "initial")
    require_equal_to_peft(one_base, tmp_path / "new")
    assert error(fused(reader(one_base, tmp_path / "new")), two_steps(load(one_base), adapted)) < TOLERANCE


@pytest.mark.parametrize(
    "options", [{"modules_to_save": ["lm_head"]}, {"use_dora": True}, {"init_lora_weights": "pissa"}]
)
def test_joined_prompts_are_answered_as_peft_generates(one_base, tmp_path, options):
    trained(one_base, LoraConfig(**TARGETS, **options)).save_pretrained(tmp_path)
    made = KVFusionGenerator.from_pretrained(one_base, adapter=tmp_path, mode="concat", store=None)
    answer = made.answer("who?", ["the mill"], max_new_tokens=6)
    ids = tiny.tokenizer("byte-bpe")(made.show_prompt("who?", ["the mill"]).text, add_special_tokens=False)[
        "input_ids"
    ]
    assert answer.usage.prompt_tokens == len(ids)
    adapted = PeftModel.from_pretrained(load(one_base), tmp_path).eval()
    asked = torch.tensor([ids])
    mask = torch.ones_like(asked)
    found = adapted.generate(input_ids=asked, attention_mask=mask, max_new_tokens=6, do_sample=False, pad_token_id=0)
    assert list(answer.token_ids) == found[0, len(ids) :].tolist()


@pytest.mark.parametrize("initial", ["pissa", "olora"])
def test_an_untrained_adapter_of_a_changed_base_changes_nothing(one_base, tmp_path, initial):
    get_peft_model(load(one_base), LoraConfig(r=4, **TARGETS, init_lora_weights=initial)).save_pretrained(tmp_path)
    assert error(fused(reader(one_base, tmp_path)), fused(reader(one_base))) < TOLERANCE
