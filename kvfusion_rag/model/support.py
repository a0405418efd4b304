"""Decides from the configuration alone, before any weight is read, which architectures can be fused exactly.

Fusion needs keys and values per token in every layer, and rotations of keys that depend only on their own position.
The numeric gate (``fusion/gate.py``) measures what the configuration does not show.
"""

from __future__ import annotations

from transformers import DynamicCache, PretrainedConfig
from transformers.cache_utils import DummyLayer, DynamicLayer, DynamicSlidingWindowLayer

from ..errors import UnsupportedModelError
from ..schema import Check
from .attention.windows import CHUNKED, FULL, SLIDING, Windows
from .rope import PositionLimit, rope_settings


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
    name = "keys and values per token in every layer"
    kinds = set(getattr(config, "layer_types", None) or ())
    layers = [layer for layer in DynamicCache(config=config).layers if not isinstance(layer, DummyLayer)]
    if kinds - {FULL, SLIDING, CHUNKED} or any(
        type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer) for layer in layers
    ):
        return Check(name, False, f"it has layers without keys and values ({sorted(kinds)}), which cannot be fused")
    windows = Windows.of(config)
    sizes = () if windows is None else sorted({size for size in windows.sizes.values() if size is not None})
    detail = "".join(f", some with a window of {size} positions" for size in sizes)
    return Check(name, True, f"{config.num_hidden_layers} layers{detail}")


def _rope_check(config: PretrainedConfig) -> Check:
    name = "positions independent of length"
    settings = rope_settings(config)
    kinds = sorted({str(rope.get("rope_type", "default")) for rope in settings})
    if "mrope" in kinds or any("mrope_section" in rope for rope in settings):
        return Check(name, False, "its RoPE has several axes (multimodal RoPE)")
    limit = PositionLimit.of(config)
    detail = f"RoPE {', '.join(kinds)}" if kinds else "learned or no rotary positions"
    return Check(name, True, f"{detail}, up to {limit} positions" if limit.reason else detail)
