"""Decides from the configuration alone, before any weight is read, which architectures can be fused exactly.

Fusion needs keys and values per token in every layer, and rotations of keys that depend only on their own position.
The numeric gate (``fusion/gate.py``) measures what the configuration does not show.
"""

from __future__ import annotations

from transformers import PretrainedConfig

from ...errors import UnsupportedModelError
from ...schema import Check
from ..attention.windows import Windows
from ..rope import PositionLimit, rope_settings
from ..text_part import text_part
from .refusals import counts_slots, no_keys_per_token, other_cache, other_task, sees_later_tokens, unmeasured_text_part


def configuration_checks(config: PretrainedConfig) -> tuple[Check, ...]:
    """Return the checks of a configuration, up to the first that fails. The text part of a multimodal model counts."""
    text = text_part(config)
    steps = [(_decoder_check, config), (_attention_check, text), (_cache_check, text), (_rope_check, text)]
    if text is not config:
        steps.insert(2, (_text_part_check, config))
    checks: list[Check] = []
    for check, checked in steps:
        checks.append(check(checked))
        if not checks[-1].passed:  # later checks read fields that this configuration may lack
            break
    return tuple(checks)


def routes_tokens(config: PretrainedConfig) -> bool:
    """Whether the model has experts, so that the shapes of its matrix products depend on all tokens of a pass."""
    names = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
    parts = (config, getattr(config, "ffn_config", None))  # DBRX has a part of its own for them
    return any((getattr(part, name, None) or 0) > 1 for part in parts for name in names)


def require_supported(config: PretrainedConfig, model_id: str) -> None:
    """Raise UnsupportedModelError with the cause if a check fails."""
    check = configuration_checks(config)[-1]
    if not check.passed:
        raise UnsupportedModelError(f"{model_id!r} ({config.model_type}) cannot be fused exactly: {check.detail}.")


def _decoder_check(config: PretrainedConfig) -> Check:
    text = text_part(config)
    reason = other_task(config) or sees_later_tokens(config) or sees_later_tokens(text)
    return _unless(reason, "text decoder", f"{text.model_type}, decoder only")


def _attention_check(config: PretrainedConfig) -> Check:
    name = "keys and values per token in every layer"
    if (reason := no_keys_per_token(config)) is not None:
        return Check(name, False, reason)
    windows = Windows.of(config)
    sizes = () if windows is None else sorted({size for size in windows.sizes.values() if size is not None})
    detail = "".join(f", some with a window of {size} positions" for size in sizes)
    return Check(name, True, f"{config.num_hidden_layers} layers{detail}")


def _text_part_check(config: PretrainedConfig) -> Check:
    return _unless(unmeasured_text_part(config), "text part", f"on text it equals the whole {config.model_type}")


def _cache_check(config: PretrainedConfig) -> Check:
    reason = other_cache(config) or counts_slots(config)
    return _unless(reason, "cache and positions given by the caller", "documents can be joined and share positions")


def _rope_check(config: PretrainedConfig) -> Check:
    name = "positions independent of length"
    settings = rope_settings(config)
    kinds = sorted({str(rope.get("rope_type", "default")) for rope in settings})
    if "mrope" in kinds or any("mrope_section" in rope for rope in settings):
        return Check(name, False, "its RoPE has several axes (multimodal RoPE)")
    limit = PositionLimit.of(config)
    detail = f"RoPE {', '.join(kinds)}" if kinds else "learned or no rotary positions"
    return Check(name, True, f"{detail}, up to {limit} positions" if limit.reason else detail)


def _unless(reason: str | None, name: str, detail: str) -> Check:
    """Return a check that fails for ``reason``, and passes with ``detail`` if there is none."""
    return Check(name, reason is None, reason or detail)
