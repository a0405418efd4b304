"""A digest of tensors that distinguishes two sets of weights."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
import xxhash
from torch.utils._python_dispatch import is_traceable_wrapper_subclass


def digest_tensors(tensors: Iterable[tuple[str, torch.Tensor]], facts: str = "") -> str:
    """Return the hexadecimal xxh3-128 of ``facts`` and of all tensors (name, shape, dtype, bytes), sorted by name."""
    digest = xxhash.xxh3_128(facts.encode())
    for name, tensor in (part for named in sorted(tensors, key=lambda one: one[0]) for part in _plain_parts(*named)):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype};".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _plain_parts(name: str, tensor: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the named plain tensors that a quantized weight consists of, or the tensor itself if it is plain."""
    if not is_traceable_wrapper_subclass(tensor):
        yield name, tensor
        return
    parts, facts = tensor.__tensor_flatten__()
    for part in parts:
        yield from _plain_parts(f"{name}.{part} {facts}", getattr(tensor, part))
