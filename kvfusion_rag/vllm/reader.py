"""Reads the documents of a prompt from the store, at the positions that vLLM needs. Runs in vLLM's workers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from transformers import PretrainedConfig

from ..errors import StoreError
from ..model.kv import KVShape
from ..store import Codec, open_store
from .prompt import FusedPrompt
from .rotation import KeyRotation


@dataclass(frozen=True, slots=True)
class ReaderOptions:
    """What a worker has to know about the store. Credentials of a URL come from its environment.

    Attributes:
        store: folder or URL.
        local: folder of the disk tier in front of a URL, which must not be set for a folder.
        codec: codec of all files.
        layers, heads, key_width, value_width: shape of the model's KVs.
        dtype: their dtype, such as "bfloat16".
    """

    store: str
    local: str | None
    codec: Codec
    layers: int
    heads: int
    key_width: int
    value_width: int
    dtype: str

    def to_dict(self) -> dict[str, Any]:
        """Return the connector's ``kv_connector_extra_config``."""
        return asdict(self)

    @property
    def shape(self) -> KVShape:
        """The shape of the model's KVs."""
        return KVShape(self.layers, self.heads, self.key_width, self.value_width, getattr(torch, self.dtype))


class FusedReader:
    """Reads documents for the workers of one model. Safe from several threads.

    Args:
        options: ``ReaderOptions.to_dict()``.
        config: the model's text configuration.

    Raises:
        StoreError: the store cannot be opened.
        UnsupportedModelError: the keys of this model cannot be moved.
    """

    def __init__(self, options: Mapping[str, Any], config: PretrainedConfig) -> None:
        self._options = read = ReaderOptions(**options)
        self._rotation = KeyRotation.of(config)
        tier: dict[str, Any] = {} if read.local is None else {"local": read.local}
        self._store = open_store(read.store, read_only=True, codec=read.codec, **tier)

    def read(
        self, prompt: FusedPrompt, token_ids: Sequence[int], *, skip: int = 0
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return keys (L, H_kv, T, d) and values (L, H_kv, T, d_v) of the prompt's documents, with moved keys.

        Args:
            token_ids: ids of the prompt's documents, and of more tokens after them.
            skip: tokens at the beginning that are not needed. The T tokens are the others.

        Raises:
            StoreError: the store does not have a document, or has another one under its key.
        """
        parts: list[tuple[torch.Tensor, torch.Tensor]] = []
        at = 0
        for key, tokens in prompt.documents:
            end = at + tokens
            if end > skip:
                document = self._store.read(key, tuple(token_ids[at:end]), self._options.shape)
                if document is None:
                    raise StoreError(f"the store at {self._options.store!r} does not have the document {key}.")
                behind = max(0, skip - at)
                parts.append((document.keys[:, :, behind:], document.values[:, :, behind:]))
            at = end
        keys, values = (torch.cat(tensors, dim=2) for tensors in zip(*parts, strict=True))
        return self._rotation.moved(keys, prompt.shift), values


def own_heads(heads: int, ranks: int, rank: int) -> slice:
    """Return which of all key/value heads a tensor-parallel worker has. Few heads are copied to several workers."""
    if heads < ranks:
        first = rank * heads // ranks
        return slice(first, first + 1)
    return slice(rank * heads // ranks, (rank + 1) * heads // ranks)
