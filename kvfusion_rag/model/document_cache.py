"""The cache of one prefill pass: it collects the keys and values of documents, and ends the pass once it has them all.

Nothing else is read of a document, and the last layer's are known before that layer attends and runs its feed-forward
block. So a pass costs a layer less, but for its keys and values, and gives the same bits. Knows no model.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, suppress
from typing import Any, cast

import torch
from transformers import DynamicCache, PretrainedConfig
from transformers.cache_utils import CacheLayerMixin

from .kv import DocumentKV


class DocumentCache(DynamicCache):
    """Filled by one forward pass of the decoder over R rows within :meth:`collecting`."""

    def __init__(self, config: PretrainedConfig, prefix: DocumentKV | None, rows: int) -> None:
        super().__init__(config=config)  # passing one keeps packed-sequence detection off
        self._past = 0 if prefix is None else prefix.num_tokens
        if prefix is not None:
            shape = (rows, -1, -1, -1)
            layers = cast(list[CacheLayerMixin], self.layers)  # whose ``update`` ends no pass, as ours would
            for layer, keys, values in zip(layers, prefix.keys, prefix.values, strict=True):
                layer.update(keys.expand(shape), values.expand(shape))

    def collecting(self) -> AbstractContextManager[None]:
        """Where the forward pass belongs: it is broken off once the last layer's keys and values are in."""
        return suppress(_Complete)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As any cache's, until the last layer."""
        found = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        if layer_idx == len(self.layers) - 1:
            raise _Complete
        return found

    def collected(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values, each (L, R, H_kv, T, d), without the prefix."""
        filled = cast(list[tuple[torch.Tensor, ...]], list(self))  # keys, values (R, H_kv, p + T, d) of each layer
        keys = torch.stack([layer[0][:, :, self._past :] for layer in filled])
        values = torch.stack([layer[1][:, :, self._past :] for layer in filled])
        return keys, values


class _Complete(Exception):
    """All keys and values are in. A model of transformers cannot be asked for a part of a layer in any other way."""
