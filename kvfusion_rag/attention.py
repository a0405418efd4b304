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
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "kvfusion_context"

Context = Sequence[tuple[torch.Tensor, torch.Tensor]]  # keys and values (R, H_kv, K, d) of each layer


def register() -> str:
    """Make the function known to transformers, which can be repeated; returns its name."""
    AttentionInterface.register(NAME, context_attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)  # without a mask function, padding would be ignored in silence
    return NAME


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
