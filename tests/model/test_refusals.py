"""Models that cannot be fused exactly: each is refused by its true reason, and the advice works."""

import re

import multimodal
import pytest
from huggingface_hub.errors import StrictDataclassError
from tiny import SIZES, config, tokenizer
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    BertConfig,
    FalconConfig,
    Gemma3TextConfig,
    GPTNeoXConfig,
    LlamaConfig,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
    SmolLM3Config,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
)

from kvfusion_rag import UnsupportedModelError
from kvfusion_rag.fusion.gate import run_gate
from kvfusion_rag.model.backbone import Backbone
from kvfusion_rag.model.support import configuration_checks, require_supported
from kvfusion_rag.model.support.refusals import INSTEAD
from kvfusion_rag.text.settings import ModelSettings

RUNNING_STATE = "one running state of all text"
NO_HEAD = "no head that writes text"
REASONS = {
    # hybrids and state-space models
    "mamba": RUNNING_STATE,
    "mamba2": RUNNING_STATE,
    "falcon_mamba": RUNNING_STATE,
    "falcon_h1": RUNNING_STATE,
    "granitemoehybrid": RUNNING_STATE,
    "jamba": RUNNING_STATE,
    "bamba": RUNNING_STATE,
    "zamba2": RUNNING_STATE,
    "nemotron_h": RUNNING_STATE,
    "recurrent_gemma": RUNNING_STATE,
    "minimax": RUNNING_STATE,
    "qwen3_next": RUNNING_STATE,
    "qwen3_5": RUNNING_STATE,
    "qwen3_5_moe": RUNNING_STATE,
    "kimi_linear": RUNNING_STATE,
    "rwkv": RUNNING_STATE,
    "xlstm": RUNNING_STATE,
    # positions counted in the cache
    "bloom": "ALiBi",
    "mpt": "ALiBi",
    "roformer": r"is_decoder is false",
    "cpmant": "takes no positions",
    # caches with other contents
    "deepseek_v32": "sparse indexer",
    "deepseek_v4": "sparse indexer",
    "glm_moe_dsa": "sparse indexer",
    "mllama": "cross-attention",
    "openai-gpt": "no cache of keys and values",
    "xlm": "no cache of keys and values",
    "xlnet": "no cache of keys and values",
    "reformer": "no cache of keys and values",
    "blt": "several stacks of layers",
    # encoders
    "t5": "encoder-decoder",
    "bart": "encoder-decoder",
    "t5gemma": "encoder-decoder",
    "whisper": "encoder-decoder",
    "bert": "is_decoder is false",
    "roberta": "is_decoder is false",
    "modernbert": "no language model of the type 'modernbert'",
    "clip": "no language model of the type 'clip'",
    "vit": "no language model of the type 'vit'",
    # multimodal models
    "paligemma": "a document's keys depend on the question",
    "emu3": "emu3.*has not been shown",
    "qwen3_vl_moe": "qwen3_vl_moe.*has not been shown",
    "lfm2_vl": RUNNING_STATE,
}


def checks_pass(made: PretrainedConfig) -> bool:
    return all(check.passed for check in configuration_checks(made))


@pytest.mark.parametrize("model_type", REASONS)
def test_refusal_names_the_true_reason_and_what_to_use(model_type):
    made = CONFIG_MAPPING[model_type]()
    if model_type == "lfm2_vl":  # its default has no convolutions
        made.text_config.layer_types = ["conv", "full_attention"] * 8
    with pytest.raises(UnsupportedModelError) as caught:
        require_supported(made, "some-model")
    assert re.search(REASONS[model_type], str(caught.value))
    assert str(caught.value).count(". ") == 0 and str(caught.value).endswith(f"{INSTEAD}.")


@pytest.mark.parametrize("made", [LlamaConfig, Qwen3Config, SmolLM3Config])
def test_models_that_refusals_recommend_are_fused_exactly(made):
    network = AutoModelForCausalLM.from_config(made(**SIZES, head_dim=12, pad_token_id=0))
    bone = Backbone(network, tokenizer("byte-bpe"), ModelSettings(), model_id="recommended")
    assert run_gate(bone, None, range(10, 390), tokens_per_pass=128).passed


@pytest.mark.parametrize(
    ("made", "cause"),
    [
        (FalconConfig(alibi=True), "ALiBi"),
        (Gemma3TextConfig(use_bidirectional_attention=True), "bidirectional attention"),  # EmbeddingGemma
        (Qwen2Config(is_causal=False), "bidirectional attention"),  # GTE
        (Qwen3Config(architectures=["Qwen3ForSequenceClassification"]), "classifier or reranker"),
        (BertConfig(is_decoder=True, architectures=["BertForMaskedLM"]), "BertForMaskedLM"),
        (LlamaConfig(architectures=["LlamaModel"]), NO_HEAD),
        (Gemma3TextConfig(architectures=["Gemma3TextModel"]), NO_HEAD),
    ],
)
def test_flags_that_make_a_model_another_kind_are_seen(made, cause):
    with pytest.raises(UnsupportedModelError, match=cause):
        require_supported(made, "some-model")


@pytest.mark.parametrize(
    "made",
    [
        FalconConfig(),
        BertConfig(is_decoder=True, architectures=["BertLMHeadModel"]),
        GPTNeoXConfig(),  # has is_decoder, which it ignores
        config("gpt2", architectures=["GPT2LMHeadModel"]),
        multimodal.config("mistral3"),
        multimodal.config("qwen2_5_vl"),
    ],
)
def test_models_of_the_same_families_without_these_flags_pass(made):
    assert checks_pass(made)


def test_every_type_in_transformers_gets_checks_and_no_error():
    types = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.keys() | MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES.keys()
    assert_checked(sorted(types))


@pytest.mark.slow
def test_every_other_type_in_transformers_gets_checks_and_no_error():
    """Encoders, vision, speech, time series, ..."""
    types = CONFIG_MAPPING.keys() - MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.keys()
    refused = assert_checked(sorted(types - MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES.keys()))
    assert all(not checks[-1].passed for checks in refused)


def assert_checked(model_types: list[str]) -> list:
    """Return the checks of the default configurations of these types."""
    found = []
    for model_type in model_types:
        try:
            made = CONFIG_MAPPING[model_type]()
        except (StrictDataclassError, ValueError):  # a few need arguments
            continue
        checks = configuration_checks(made)
        assert checks and all(check.passed for check in checks[:-1]) and checks[-1].detail, model_type
        found.append(checks)
    return found
