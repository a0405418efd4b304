"""What this machine is good at, measured in a moment. Knows no models."""

from __future__ import annotations

import platform
import time
from functools import cache
from pathlib import Path

import torch

SIZE = 256  # of the square matrices; a product of them takes half a millisecond in float32 on one core
SLOW = 4.0  # times float32's time from which on a dtype counts as one that the processor has no instructions for


def slowness(dtype: torch.dtype) -> float:
    """How many times longer a matrix product takes on the CPU in ``dtype`` than in float32."""
    if dtype == torch.float32:  # two measurements of one thing differ widely on a busy machine
        return 1.0
    return _product_seconds(dtype) / _product_seconds(torch.float32)


def fast_dtype(device: torch.device) -> torch.dtype:
    """bfloat16, or float32 on a CPU that has no instructions for bfloat16."""
    is_slow = device.type == "cpu" and slowness(torch.bfloat16) > SLOW
    return torch.float32 if is_slow else torch.bfloat16


@cache
def device_name(device: torch.device) -> str:
    """What kind of device it is: speed, and the last bits of results, may differ between kinds."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return _processor() if device.type == "cpu" else device.type


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:  # no Linux
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def _product_seconds(dtype: torch.dtype) -> float:
    """The best of three, so that another process in between does not count."""
    matrix = torch.ones(SIZE, SIZE, dtype=dtype)
    found = []
    for _ in range(3):
        began = time.perf_counter()
        torch.mm(matrix, matrix)
        found.append(time.perf_counter() - began)
    return min(found)
