"""What this machine is good at, measured in a moment. Knows no models."""

from __future__ import annotations

import time

import torch

SIZE = 256  # of the square matrices; a product of them takes half a millisecond in float32 on one core
SLOW = 4.0  # times float32's time from which on a dtype counts as one that the processor has no instructions for


def slowness(dtype: torch.dtype) -> float:
    """How many times longer a matrix product takes on the CPU in ``dtype`` than in float32."""
    return _product_seconds(dtype) / _product_seconds(torch.float32)


def fast_dtype(device: torch.device) -> torch.dtype:
    """bfloat16, or float32 on a CPU that has no instructions for bfloat16."""
    is_slow = device.type == "cpu" and slowness(torch.bfloat16) > SLOW
    return torch.float32 if is_slow else torch.bfloat16


def _product_seconds(dtype: torch.dtype) -> float:
    """The best of three, so that another process in between does not count."""
    matrix = torch.ones(SIZE, SIZE, dtype=dtype)
    found = []
    for _ in range(3):
        began = time.perf_counter()
        torch.mm(matrix, matrix)
        found.append(time.perf_counter() - began)
    return min(found)
