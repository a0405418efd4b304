"""Decides from the configuration alone, before any weight is read, which architectures can be fused exactly.

Fusion needs full attention in every layer, over keys whose rotation depends only on their own position. The numeric
gate (``fusion/gate.py``) measures what the configuration does not show.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from transformers import DynamicCache, PretrainedConfig
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from ..errors import UnsupportedModelError
from ..schema import Check
from .kv import KVShape

LENGTH_DEPENDENT_ROPE = {
    "dynamic": "stretches its rotation with the length of the input",
    "longrope": "switches its rotation at a length limit",
}


def configuration_checks(config: PretrainedConfig) -> tuple[Check, ...]:
    """Return the checks of a configuration, up to the first that fails."""
    checks: list[Check] = []
    for check in (_decoder_check, _attention_check, _rope_check):
        checks.append(check(config))
        if not checks[-1].passed:  # later checks read fields that this configuration may lack
            break
    return tuple(checks)


def routes_tokens(config: PretrainedConfig) -> bool:
    """Whether the model has experts, so that the shapes of its matrix products depend on all tokens of a pass."""
    names = ("num_experts", "num_local_experts", "n_routed_experts")
    return any((getattr(config, name, None) or 0) > 1 for name in names)


def expected_kv_shape(config: PretrainedConfig, dtype: torch.dtype) -> KVShape:
    """Return the shape of a model's document KVs, from its text configuration alone."""
    heads = config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    return KVShape(config.num_hidden_layers, getattr(config, "num_key_value_heads", None) or heads, width, dtype)


def require_supported(config: PretrainedConfig, model_id: str) -> None:
    """Raise UnsupportedModelError with the cause if a check fails."""
    check = configuration_checks(config)[-1]
    if not check.passed:
        raise UnsupportedModelError(f"{model_id!r} ({config.model_type}) cannot be fused exactly: {check.detail}.")


def _decoder_check(config: PretrainedConfig) -> Check:
    name = "text decoder"
    if config.is_encoder_decoder:
        return Check(name, False, "it is an encoder-decoder model, but fusion needs a decoder-only one")
    if config.get_text_config() is not config:
        return Check(name, False, "it is multimodal, and its positions have several axes; load its text model instead")
    if config.model_type == "bert" and not config.is_decoder:
        return Check(name, False, "it is an encoder (is_decoder is false), which attends to later tokens")
    return Check(name, True, f"{config.model_type}, decoder only")


def _attention_check(config: PretrainedConfig) -> Check:
    name = "full attention in every layer"
    kinds = set(getattr(config, "layer_types", None) or ())
    layers = DynamicCache(config=config).layers
    sliding = any(isinstance(layer, DynamicSlidingWindowLayer) for layer in layers)
    if sliding or kinds & {"sliding_attention", "chunked_attention"}:
        window = getattr(config, "sliding_window", None)
        return Check(
            name,
            False,
            f"it has sliding-window attention (sliding_window={window}), which would drop documents; if everything "
            "fused stays within the window, pass model_kwargs={'sliding_window': None}",
        )
    if kinds - {"full_attention"} or any(type(layer) is not DynamicLayer for layer in layers):
        return Check(name, False, f"it has layers without keys and values ({sorted(kinds)}), which cannot be fused")
    return Check(name, True, f"{config.num_hidden_layers} layers")


def _rope_check(config: PretrainedConfig) -> Check:
    name = "positions independent of length"
    for rope in _rope_settings(config):
        kind = rope.get("rope_type", rope.get("type", "default"))
        if kind in LENGTH_DEPENDENT_ROPE:
            return Check(name, False, f"its {kind!r} RoPE {LENGTH_DEPENDENT_ROPE[kind]}")
        if "mrope_section" in rope or kind == "mrope":
            return Check(name, False, "its RoPE has several axes (multimodal RoPE)")
    kinds = sorted({str(r.get("rope_type", "default")) for r in _rope_settings(config)})
    return Check(name, True, f"RoPE {', '.join(kinds)}" if kinds else "learned or no rotary positions")


def _rope_settings(config: PretrainedConfig) -> list[Mapping[str, Any]]:
    """Return the RoPE parameters: one mapping, or one per kind of layer."""
    rope = getattr(config, "rope_parameters", None)
    if not rope:
        return []
    nested = [value for value in rope.values() if isinstance(value, Mapping)]
    return nested or [rope]
