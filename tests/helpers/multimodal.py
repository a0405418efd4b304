"""Tiny random multimodal models of any type that transformers knows."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import tiny
import torch
import transformers
from transformers import CONFIG_MAPPING, PretrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES
from transformers.models.timm_wrapper.modeling_timm_wrapper import TimmWrapperModel

SMALL: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 512, "max_position_embeddings": 512, "num_layers": 2,
    "depth": 2, "num_heads": 4, "embed_dim": 32, "out_hidden_size": 32, "image_size": 32, "patch_size": 8,
    "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "encoder_ffn_dim": 64,
    "ffn_dim": 64, "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2,
    "moe_intermediate_size": 32, "projection_dim": 32, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "sliding_window": 24, "vision_feature_layer": -1, "deepstack_visual_indexes": [0], "fullatt_block_indexes": [0],
    "max_window_layers": 3, "output_dim": 32, "text_hidden_size": 32, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8,
    "v_head_dim": 16, "kv_lora_rank": 16, "q_lora_rank": 16,
}  # fmt: skip
# The values of one type, if the common ones contradict each other. Names of nested configurations are joined by dots.
ROPE_AXES = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}
SPECIAL: dict[str, dict[str, Any]] = {
    "gemma4": {
        "text_config.vocab_size_per_layer_input": 512,
        "text_config.hidden_size_per_layer_input": 8,
        "text_config.global_head_dim": 16,
        "vision_config": {
            name: SMALL[name]
            for name in (
                "hidden_size",
                "intermediate_size",
                "num_hidden_layers",
                "num_attention_heads",
                "num_key_value_heads",
                "head_dim",
            )
        },
    },
    "granite_speech": {"encoder_config.hidden_dim": 32, "encoder_config.dim_head": 8},
    "janus": {"vq_config.base_channels": 32, "vq_config.latent_channels": 32, "vq_config.num_embeddings": 64},
    "gemma3n": {
        "text_config.num_kv_shared_layers": 2,
        "text_config.vocab_size_per_layer_input": 512,
        "text_config.hidden_size_per_layer_input": 8,
        "text_config.laurel_rank": 4,
        "text_config.intermediate_size": 64,
        "text_config.activation_sparsity_pattern": [0.9, 0.0, 0.0, 0.0],
        "vision_config.hidden_size": 32,
        "text_config.layer_types": ["sliding_attention", "full_attention"] * 2,
        "audio_config.vocab_size": 128,
    },
    "llama4": {
        f"vision_config.{name}": 32 for name in ("vision_output_dim", "projector_input_dim", "projector_output_dim")
    },
    "qwen2_vl": {"text_config.rope_parameters": ROPE_AXES},
    "qwen2_5_vl": {"text_config.rope_parameters": ROPE_AXES},
    "qwen2_5_omni": {"thinker_config.text_config.rope_parameters": ROPE_AXES, "enable_audio_output": False},
}


def config(model_type: str, *, tied: bool = False, text: str | None = None) -> PretrainedConfig:
    """Return the default configuration of a type with small sizes, and with a text model of the type ``text``."""
    kind = CONFIG_MAPPING[model_type]
    values = _shrunk(kind(), SPECIAL.get(model_type, {}))
    if text is not None:
        values["text_config"] = {**_shrunk(CONFIG_MAPPING[text](), {}), "model_type": text}
    made = kind(**values)
    made.tie_word_embeddings = tied
    return made


def model(model_type: str, *, tied: bool = False, text: str | None = None) -> PreTrainedModel:
    """Return a random multimodal model."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        with mock.patch.object(TimmWrapperModel, "__init__", _empty):  # it needs timm
            kind = getattr(transformers, MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES[model_type])
            network = kind(config(model_type, tied=tied, text=text))
        for parameter in network.parameters():
            if parameter.dim() > 1:
                torch.nn.init.normal_(parameter, std=0.15)
    return network.eval()


def save(folder: Path, model_type: str, *, tied: bool = False, text: str | None = None) -> PreTrainedModel:
    """Save a random multimodal model with its tokenizer, and return it."""
    network = model(model_type, tied=tied, text=text)
    network.save_pretrained(folder)
    tiny.tokenizer("byte-bpe").save_pretrained(folder)
    return network


def _empty(module: TimmWrapperModel, vision: PretrainedConfig) -> None:
    torch.nn.Module.__init__(module)
    module.config = vision


def _shrunk(whole: PretrainedConfig, special: Mapping[str, Any], path: str = "") -> dict[str, Any]:
    values: dict[str, Any] = {} if path == "" else {"model_type": whole.model_type}
    for name, value in whole.to_dict().items():
        nested, full = vars(whole).get(name), f"{path}{name}"
        if full in special:
            values[name] = special[full]
        elif isinstance(nested, PretrainedConfig):
            values[name] = _shrunk(nested, special, f"{full}.")
        elif name in SMALL and value is not None:
            values[name] = SMALL[name]
        elif name == "rope_parameters" and isinstance(value, Mapping) and "mrope_section" in value:
            values[name] = {**value, "mrope_section": [2, 1, 1]}
    return values
