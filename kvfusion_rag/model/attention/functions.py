"""Attention functions that this package adds to those of transformers.

*Grouped*: query heads that share a key/value head become further queries of that head, so the fused cache is not
copied. transformers' "sdpa" copies it for each query head whenever there is a mask and more than one query.

*Context*, for training with gradient checkpointing: a checkpointed layer of transformers drops its cache, because
computing the layer again would append to it twice. Here the fused cache comes as a read-only keyword argument instead.

*Explicit*: computes all weights, for APE, which changes them, and for attribution, which sums them.

They are registered under their own names through transformers' public interfaces, and only a model that selected one
with ``set_attn_implementation`` uses it. This module does not know about weights or text.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward  # pyright: ignore[reportUnknownVariableType]
from transformers.masking_utils import sdpa_mask  # pyright: ignore[reportUnknownVariableType]

from ...errors import UnsupportedModelError
from ..pretrained import PreTrainedModel, attention_of, set_attention

GROUPED = "kvfusion_grouped"
CONTEXT = "kvfusion_context"
EXPLICIT = "kvfusion_explicit"
FOLDED_ON_CPU = (
    64  # largest number of queries per head for which copying the mask to every head of a group pays off (measured)
)

Context = Sequence[tuple[torch.Tensor, torch.Tensor]]  # keys and values (B, H_kv, K, d) of each layer


def _register(name: str, attention: Callable[..., Any], mask: Callable[..., Any] = sdpa_mask) -> str:
    """Register an attention function. transformers would ignore padding if no mask function were registered."""
    cast(Any, AttentionInterface).register(name, attention)
    cast(Any, AttentionMaskInterface).register(name, mask)
    return name


def share_heads(model: PreTrainedModel) -> str:
    """Use grouped attention in a grouped-query "sdpa" model, and return the name of the model's attention."""
    config = model.config
    heads, shared = config.num_attention_heads, getattr(config, "num_key_value_heads", None)
    if attention_of(config) == "sdpa" and shared is not None and shared < heads:
        set_attention(model, _register(GROUPED, grouped_attention))
    return str(attention_of(config))


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
    """Compute scaled dot-product attention over keys and values (B, H_kv, S, d) without repeating them per query head.

    Other cases (dropout, biases, masks per head, several queries without a mask) use transformers' own function.

    Args:
        query: (B, H, Q, d), already rotated.
        attention_mask: (B, 1, Q, S). None means that one query sees everything and several queries are causal.
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
    """Compute the attention of one token by matrix products.

    On a CPU in float32 this is up to twice as fast as torch's fused kernel, whose blocks of keys are
    sized for many queries.

    Args:
        query: (B, H_kv, G, d), the G query heads that share a key head.
        key: (B, H_kv, S, d).
        value: (B, H_kv, S, d).
        mask: (B, 1, 1, S), bool or additive, or None.

    Returns:
        (B, 1, H, d).
    """
    batch, shared, groups, width = query.shape
    scaled = query * (width**-0.5 if scaling is None else scaling)
    # Keys come first: with few queries as columns, the product reads keys at the speed of memory.
    scores = (key @ scaled.transpose(2, 3)).transpose(2, 3).contiguous()  # (B, H_kv, G, S)
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask
    return (scores.softmax(dim=-1) @ value).reshape(batch, 1, shared * groups, -1)


def register_explicit() -> str:
    """Register explicit attention with transformers and return its name. May be called repeatedly."""
    return _register(EXPLICIT, explicit_attention, explicit_mask)


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
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Return the output (B, Q, H, d_v) of queries (B, H, Q, d) over keys (B, H_kv, S, d) and values (B, H_kv, S, d_v).

    The support gate measures whether the model passes everything that its attention needs to this function.

    Args:
        attention_mask: (B, 1, Q, S) bool.
        adapt: changes the float32 logits (B, H, Q, S) before the softmax. Hidden slots are at -inf.
        note: receives the weights (B, H, Q, S).
        softcap: bound of the logits (Gemma 2).
        s_aux: (H,) logits of sinks, one per head, which take weight from the slots (gpt-oss).
    """
    batch, heads, length, width = query.shape
    grouped = query.reshape(batch, key.shape[1], -1, width)  # (B, H_kv, H / H_kv * Q, d)
    logits = (grouped @ key.transpose(2, 3)).reshape(batch, heads, length, -1).float() * scaling
    if softcap is not None:
        logits = (logits / softcap).tanh() * softcap
    logits = logits.masked_fill(~attention_mask, float("-inf"))
    logits = logits if adapt is None else adapt(logits)
    if s_aux is not None:
        logits = torch.cat([logits, s_aux.float().view(1, -1, 1, 1).expand(batch, -1, length, 1)], dim=-1)
    weights = logits.softmax(dim=-1)[..., : key.shape[2]]
    if note is not None:
        note(weights)
    out = weights.to(value.dtype).reshape(batch, key.shape[1], -1, key.shape[2]) @ value  # (B, H_kv, H / H_kv * Q, d)
    return out.reshape(batch, heads, length, -1).transpose(1, 2).contiguous(), None


def explicit_mask(*args: Any, **kwargs: Any) -> torch.Tensor | None:
    """Return transformers' boolean mask in all cases, because explicit attention has no causal flag."""
    return sdpa_mask(*args, **{**kwargs, "allow_is_causal_skip": False})


def checkpoint_with_context(model: PreTrainedModel, model_id: str) -> None:
    """Enable gradient checkpointing, with layers that take the fused cache as the argument ``context``.

    Args:
        model_id: name of the model in errors.

    Raises:
        UnsupportedModelError: the architecture has no gradient checkpointing, or its attention cannot be replaced.
    """
    if attention_of(model.config) not in ("sdpa", GROUPED):
        raise UnsupportedModelError(
            f"{model_id!r} computes attention as {attention_of(model.config)!r}, but gradient checkpointing "
            "over a fused cache needs 'sdpa'; train without gradient_checkpointing."
        )
    set_attention(model, _register(CONTEXT, context_attention))
    if attention_of(model.config) != CONTEXT:
        raise UnsupportedModelError(
            f"the attention function of {model_id!r} cannot be replaced, so gradient checkpointing would lose the "
            "fused cache; train without gradient_checkpointing."
        )
    # Older versions of transformers 5 have the method only under its former name.
    enable = getattr(model, "activation_checkpointing_enable", None) or cast(Any, model).gradient_checkpointing_enable
    try:
        enable({"use_reentrant": False})
    except ValueError as error:
        raise UnsupportedModelError(
            f"{model_id!r} ({model.config.model_type}) has no gradient checkpointing in transformers; train without "
            "gradient_checkpointing."
        ) from error
    model.disable_input_require_grads()  # only reentrant checkpoints need them


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
    """Compute scaled dot-product attention over the module's layer of ``context``, if there is one, and ``key``.

    Args:
        query: (B, H, Q, d), already rotated.
        key: (B, H_kv, Q, d), already rotated.
        value: (B, H_kv, Q, d).
        attention_mask: (B, 1, Q, K + Q) bool with a context.
    """
    if context is not None:
        keys, values = context[module.layer_idx]  # type: ignore[index]  # every attention module has its layer's number
        key, value = torch.cat([keys, key], dim=2), torch.cat([values, value], dim=2)  # (B, H_kv, K + Q, d)
    return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
