"""The cache of one prefill pass, which collects document KVs and ends the pass as soon as it has all of them.

The last layer's keys and values are known before that layer attends and runs its feed-forward block. Ending the pass
there saves most of one layer and gives the same bits. This module does not know about models.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, suppress
from typing import Any, cast

import torch
from transformers import DynamicCache, PretrainedConfig
from transformers.cache_utils import CacheLayerMixin

from .kv import DocumentKV


class DocumentCache(DynamicCache):
    """A cache that one forward pass of the decoder over B rows fills within :meth:`collecting`."""

    def __init__(self, config: PretrainedConfig, prefix: DocumentKV | None, rows: int) -> None:
        super().__init__(config=config)  # without a cache, transformers would look for packed sequences
        self._past = 0 if prefix is None else prefix.num_tokens
        if prefix is not None:
            shape = (rows, -1, -1, -1)
            layers = cast(list[CacheLayerMixin], self.layers)  # ``update`` of a layer does not end the pass
            for layer, keys, values in zip(layers, prefix.keys, prefix.values, strict=True):
                layer.update(keys.expand(shape), values.expand(shape))

    def collecting(self) -> AbstractContextManager[None]:
        """Return the context for the forward pass, which ends once the last layer's keys and values are stored."""
        return suppress(_Complete)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Store one layer's keys and values, and end the pass after the last layer."""
        updated = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        if layer_idx == len(self.layers) - 1:
            raise _Complete
        return updated

    def collected(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return keys and values, each (L, B, H_kv, T, d), without the prefix."""
        layers = cast(list[tuple[torch.Tensor, ...]], list(self))  # keys and values (B, H_kv, p + T, d) per layer
        keys = torch.stack([layer[0][:, :, self._past :] for layer in layers])
        values = torch.stack([layer[1][:, :, self._past :] for layer in layers])
        return keys, values


class _Complete(Exception):
    """All keys and values are stored. Only an exception can end a transformers model's pass within a layer."""
