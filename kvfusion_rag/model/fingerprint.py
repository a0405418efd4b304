"""Digests that distinguish two models: of weights, and of facts such as their configuration."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
import xxhash
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers import PretrainedConfig

_WITHOUT_EFFECT = {"use_cache", "bos_token_id", "eos_token_id", "pad_token_id"}  # on a document's KV


def digest_tensors(tensors: Iterable[tuple[str, torch.Tensor]], facts: str = "") -> str:
    """Return the hexadecimal xxh3-128 of ``facts`` and of all tensors (name, shape, dtype, bytes), sorted by name."""
    digest = xxhash.xxh3_128(facts.encode())
    for name, tensor in (part for named in sorted(tensors, key=lambda one: one[0]) for part in _plain_parts(*named)):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype};".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def digest_facts(facts: Mapping[str, object]) -> str:
    """Return the hexadecimal SHA-256 of plain data."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()


def essential_config(config: PretrainedConfig) -> dict[str, Any]:
    """Return the fields of a configuration that may change a document's KV by more than rounding.

    Fields that every configuration has, such as the version of transformers, describe how a model is called. Fields
    without a value are left out, because newer versions add such fields.
    """
    common = PretrainedConfig().to_dict().keys() - {"model_type"}
    return {
        name: value
        for name, value in config.to_dict().items()
        if value is not None and not name.startswith("_") and name not in common | _WITHOUT_EFFECT
    }


def _plain_parts(name: str, tensor: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the named plain tensors that a quantized weight consists of, or the tensor itself if it is plain."""
    if not is_traceable_wrapper_subclass(tensor):
        yield name, tensor
        return
    parts, facts = tensor.__tensor_flatten__()
    for part in parts:
        yield from _plain_parts(f"{name}.{part} {facts}", getattr(tensor, part))
