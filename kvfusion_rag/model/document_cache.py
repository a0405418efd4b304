"""Caches that know the position of every slot, and the one that collects document KVs in a prefill pass.

The last layer's keys and values are known before that layer attends and runs its feed-forward block. Ending the pass
there saves most of one layer and gives the same bits. This module does not know about models.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, suppress
from typing import Any, cast

import torch
from transformers import AutoModelForCausalLM, DynamicCache, PretrainedConfig, cache_utils
from transformers.cache_utils import DynamicLayer

from ..errors import UnsupportedModelError
from .kv import DocumentKV, KVShape

# Placeholders of layers that cache nothing. Before transformers 5.23, such layers are left out instead.
PLACEHOLDERS: tuple[type, ...] = (cache_utils.DummyLayer,) if hasattr(cache_utils, "DummyLayer") else ()


class PositionedCache(DynamicCache):
    """A cache whose layers keep all tokens, whatever their windows, with the position of every slot.

    Args:
        positions: (B, K) positions of the slots that the layers have already.
        layers: one for each layer of the model. Without them, they are made as the model fills them.
    """

    def __init__(self, positions: torch.Tensor, layers: Sequence[DynamicLayer] = ()) -> None:
        super().__init__()
        self.layers.extend(layers)
        self.positions = positions

    def append_positions(self, positions: torch.Tensor) -> torch.Tensor:
        """Append the positions (B, Q) of the tokens of a pass, and return those (B, K + Q) of all slots."""
        self.positions = torch.cat([self.positions, positions], dim=1)
        return self.positions

    def keep_positions(self, rows: Sequence[int]) -> None:
        """Keep only the positions of these rows, in this order."""
        self.positions = self.positions[rows]


class DocumentCache(PositionedCache):
    """A cache that one forward pass of the decoder over B rows fills within :meth:`collecting`.

    Args:
        num_layers: layers with keys and values.
        prefix: KV at positions 0..p-1 in front of every row, or None.
    """

    def __init__(self, num_layers: int, prefix: DocumentKV | None, rows: int, device: torch.device) -> None:
        self._past = 0 if prefix is None else prefix.num_tokens
        layers = [DynamicLayer() for _ in range(num_layers)]  # without them, transformers seeks packed sequences
        super().__init__(torch.arange(self._past, device=device).expand(rows, -1), layers)
        if prefix is not None:
            shape = (rows, -1, -1, -1)
            for layer, keys, values in zip(layers, prefix.keys, prefix.values, strict=True):
                # Unlike the cache's, it does not end the pass.
                layer.update(keys.expand(shape), values.expand(shape))  # pyright: ignore[reportUnknownMemberType]

    def collecting(self) -> AbstractContextManager[None]:
        """Return the context for the forward pass, which ends once the last layer's keys and values are stored."""
        return suppress(_Complete)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Store one layer's keys and values, and end the pass after the last layer."""
        updated = super().update(key_states, value_states, layer_idx, *args, **kwargs)  # pyright: ignore[reportUnknownMemberType]
        if layer_idx == len(self.layers) - 1:
            raise _Complete
        return updated

    def collected(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return keys (L, B, H_kv, T, d) and values (L, B, H_kv, T, d_v), without the prefix.

        Raises:
            UnsupportedModelError: layers have different numbers of heads, or widths.
        """
        layers = list(layer_states(self))  # keys and values (B, H_kv, p + T, d)
        shapes = sorted({(layer[0].shape[1], layer[0].shape[3], layer[1].shape[3]) for layer in layers})
        if len(shapes) > 1:
            raise UnsupportedModelError(
                f"heads and widths of keys and values differ between the model's layers: {shapes}, but all layers of "
                "a document's KV have one shape."
            )
        keys = torch.stack([layer[0][:, :, self._past :] for layer in layers])
        values = torch.stack([layer[1][:, :, self._past :] for layer in layers])
        return keys, values


def layer_states(cache: DynamicCache) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield the keys and values of each layer."""
    return (layer[:2] for layer in cast(Any, cache))


class _Complete(Exception):
    """All keys and values are stored. Only an exception can end a transformers model's pass within a layer."""


def num_kv_layers(config: PretrainedConfig) -> int:
    """Return the number of layers with keys and values of their own. In some models, the last layers share them."""
    return sum(not isinstance(layer, PLACEHOLDERS) for layer in DynamicCache(config=config).layers)


def expected_kv_shape(config: PretrainedConfig, dtype: torch.dtype) -> KVShape:
    """Return the shape of a model's document KVs, from its configuration alone: without weights or memory for them."""
    with torch.device("meta"):
        model = cast(Any, AutoModelForCausalLM).from_config(config, dtype=dtype)
        cache = PositionedCache(torch.empty(1, 0))
        token, mask = torch.zeros(1, 1, dtype=torch.long), torch.zeros(1, 1, 1, 1, dtype=dtype)  # a complete mask
        model(input_ids=token, attention_mask=mask, past_key_values=cache, use_cache=True)
    keys, values = next(layer_states(cache))
    return KVShape(len(cache.layers), keys.shape[1], keys.shape[3], values.shape[3], dtype)
