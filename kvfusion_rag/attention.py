"""Attention that reads a fused context from an argument of its own, for training with gradient checkpointing.

A checkpointed layer of transformers drops its cache, since recomputing the layer would append to it a second time.
Keys and values of the context that are handed over as a keyword argument are only read, so a layer can be computed
twice. The function is registered under a name of ours, by the library's public interfaces, and used by a model only
after ``set_attn_implementation``. Knows neither weights nor text.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from .errors import UnsupportedModelError

NAME = "kvfusion_context"

Context = Sequence[tuple[torch.Tensor, torch.Tensor]]  # keys and values (R, H_kv, K, d) of each layer


def read_context_twice(model: PreTrainedModel, model_id: str) -> None:
    """Turn gradient checkpointing on, with layers that take the fused context as the argument ``context``.

    Args:
        model_id: how the model is named in errors.

    Raises:
        UnsupportedModelError: the architecture has no checkpoints, or its attention function cannot be named.
    """
    if model.config._attn_implementation != "sdpa":
        raise UnsupportedModelError(
            f"{model_id!r} computes attention as {model.config._attn_implementation!r}, but gradient checkpointing "
            "over a fused cache needs 'sdpa'; train without gradient_checkpointing."
        )
    AttentionInterface.register(NAME, context_attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)  # without a mask function, padding would be ignored in silence
    model.set_attn_implementation(NAME)
    if model.config._attn_implementation != NAME:
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
