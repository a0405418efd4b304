"""Attention functions of ours beside transformers' own.

*Grouped*: query heads that share keys and values become further queries of one head, so a fused cache is read as it
lies; transformers' "sdpa" copies it once for each query head wherever there is a mask and more than one query.

*Context*, for training with gradient checkpointing: a checkpointed layer of transformers drops its cache, since
recomputing the layer would append to it a second time. Keys and values of the context that are handed over as a
keyword argument are only read, so a layer can be computed twice.

*Explicit* has all weights in hand: for what changes them (``ape.py``) or adds them up (``watch.py``).

They are registered under names of ours, by the library's public interfaces, and used by a model only after
``set_attn_implementation``. Knows neither weights nor text.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from ..errors import UnsupportedModelError

GROUPED = "kvfusion_grouped"
CONTEXT = "kvfusion_context"
EXPLICIT = "kvfusion_explicit"
FOLDED_ON_CPU = 64  # most queries of a head whose mask is worth copying for each head of its group (measured)

Context = Sequence[tuple[torch.Tensor, torch.Tensor]]  # keys and values (R, H_kv, K, d) of each layer


def share_heads(model: PreTrainedModel) -> str:
    """Have a model with grouped-query "sdpa" attention use ours; the name of what it uses now."""
    config = model.config
    heads, shared = config.num_attention_heads, getattr(config, "num_key_value_heads", None)
    if config._attn_implementation == "sdpa" and shared is not None and shared < heads:
        AttentionInterface.register(GROUPED, grouped_attention)
        AttentionMaskInterface.register(GROUPED, sdpa_mask)  # without a mask function, padding would be ignored
        model.set_attn_implementation(GROUPED)
    return str(config._attn_implementation)


def grouped_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Scaled dot-product attention over keys and values (B, H_kv, S, d) that are not repeated for each query head.

    Args:
        query: (B, H, Q, d), already rotated.
        attention_mask: (B, 1, Q, S), or ``None``: then one query sees everything, and several are causal.

    Whatever asks for more (dropout, biases, masks by head, causality without a mask) goes the library's own way.
    """
    batch, heads, length, width = query.shape
    plain = not any(kwargs.get(name) for name in ("dropout", "output_attentions")) and all(
        kwargs.get(name) is None for name in ("position_bias", "softcap", "cache")
    )
    one_mask = length == 1 if attention_mask is None else attention_mask.shape[1] == 1
    if not plain or not one_mask:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    if length > FOLDED_ON_CPU and query.device.type == "cpu":
        out = scaled_dot_product_attention(query, key, value, attention_mask, scale=scaling, enable_gqa=True)
        return out.transpose(1, 2).contiguous(), None
    groups = heads // key.shape[1]
    queries = query.reshape(batch, key.shape[1], groups * length, width)
    if length == 1 and query.device.type == "cpu" and query.dtype == torch.float32:
        return one_query_attention(queries, key, value, attention_mask, scaling=scaling), None
    if attention_mask is not None and length > 1:
        attention_mask = attention_mask.repeat(1, 1, groups, 1)  # (B, 1, H / H_kv * Q, S)
    out = scaled_dot_product_attention(queries, key, value, attention_mask, scale=scaling)
    return out.reshape(batch, heads, length, -1).transpose(1, 2).contiguous(), None


def one_query_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, *, scaling: float | None
) -> torch.Tensor:
    """Attention of one token by matrix products, up to twice as fast on a CPU in float32 as torch's fused kernel.

    The fused kernel cuts keys into blocks that serve many queries. Here there are only those of one group.

    Args:
        query: (B, H_kv, G, d), the G query heads that share a key head.
        key, value: (B, H_kv, S, d).
        mask: (B, 1, 1, S), bool or additive, or ``None``.

    Returns:
        (B, 1, H, d).
    """
    batch, shared, groups, width = query.shape
    scaled = query * (width**-0.5 if scaling is None else scaling)
    # Keys go first: with few queries as columns, the product reads keys at the speed of memory.
    scores = (key @ scaled.transpose(2, 3)).transpose(2, 3).contiguous()  # (B, H_kv, G, S)
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask
    return (scores.softmax(dim=-1) @ value).reshape(batch, 1, shared * groups, -1)


def explicit() -> str:
    """Make explicit attention known to transformers, as often as it is called; returns its name."""
    AttentionInterface.register(EXPLICIT, explicit_attention)
    AttentionMaskInterface.register(EXPLICIT, explicit_mask)
    return EXPLICIT


def explicit_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor,
    *,
    scaling: float,
    adapt: Callable[[torch.Tensor], torch.Tensor] | None = None,
    note: Callable[[torch.Tensor], None] | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Output (B, Q, H, d) of queries (B, H, Q, d) over keys and values (B, H_kv, S, d).

    That the model passes on all that its attention needs is measured by the gate (``gate.require_ape``).

    Args:
        attention_mask: (B, 1, Q, S) bool.
        adapt: changes the float32 logits (B, H, Q, S) before the softmax; those that may not be seen are at -inf.
        note: is shown the weights (B, H, Q, S).
    """
    batch, heads, length, width = query.shape
    grouped = query.reshape(batch, key.shape[1], -1, width)  # (B, H_kv, H / H_kv * Q, d): heads share keys
    logits = (grouped @ key.transpose(2, 3)).reshape(batch, heads, length, -1).float() * scaling
    logits = logits.masked_fill(~attention_mask, float("-inf"))
    weights = (logits if adapt is None else adapt(logits)).softmax(dim=-1)
    if note is not None:
        note(weights)
    out = weights.to(value.dtype).reshape(batch, key.shape[1], -1, key.shape[2]) @ value  # (B, H_kv, H / H_kv * Q, d)
    return out.reshape(batch, heads, length, -1).transpose(1, 2).contiguous(), None


def explicit_mask(*args: Any, **kwargs: Any) -> torch.Tensor | None:
    """transformers' boolean mask, always made, since explicit attention has no causal flag to rely on."""
    return sdpa_mask(*args, **{**kwargs, "allow_is_causal_skip": False})


def read_context_twice(model: PreTrainedModel, model_id: str) -> None:
    """Turn gradient checkpointing on, with layers that take the fused context as the argument ``context``.

    Args:
        model_id: how the model is named in errors.

    Raises:
        UnsupportedModelError: the architecture has no checkpoints, or its attention function cannot be named.
    """
    if model.config._attn_implementation not in ("sdpa", GROUPED):
        raise UnsupportedModelError(
            f"{model_id!r} computes attention as {model.config._attn_implementation!r}, but gradient checkpointing "
            "over a fused cache needs 'sdpa'; train without gradient_checkpointing."
        )
    AttentionInterface.register(CONTEXT, context_attention)
    AttentionMaskInterface.register(CONTEXT, sdpa_mask)  # without a mask function, padding would be ignored in silence
    model.set_attn_implementation(CONTEXT)
    if model.config._attn_implementation != CONTEXT:
        raise UnsupportedModelError(
            f"{model_id!r} does not let its attention function be named, so gradient checkpointing would lose the "
            "fused cache; train without gradient_checkpointing."
        )
    # Older versions of transformers 5 know the method by its former name alone.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    try:
        enable({"use_reentrant": False})
    except ValueError as error:
        raise UnsupportedModelError(
            f"{model_id!r} ({model.config.model_type}) has no gradient checkpointing in transformers; train without "
            "gradient_checkpointing."
        ) from error
    model.disable_input_require_grads()  # needed by reentrant checkpoints alone


def context_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    context: Context | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Scaled dot-product attention over the module's layer of ``context``, if there is one, and ``key``.

    Args:
        query, key, value: (R, H, Q, d) and twice (R, H_kv, Q, d), already rotated.
        attention_mask: (R, 1, Q, K + Q) bool with a context.
    """
    if context is not None:
        keys, values = context[module.layer_idx]  # type: ignore[index]  # every attention module has its number
        key, value = torch.cat([keys, key], dim=2), torch.cat([values, value], dim=2)  # (R, H_kv, K + Q, d)
    return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
