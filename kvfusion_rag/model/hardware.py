"""What this machine is good at, measured in a moment. Knows no models."""

from __future__ import annotations

import platform
import time
from functools import cache
from pathlib import Path

import torch

# Of the square matrices. Threads that wait for each other on a busy machine take some 16 milliseconds for any product,
# so one without instructions for it has to take far longer; in float32 it takes two or three on two cores.
SIZE = 512
TRIES = 4
SLOW = 4.0  # times float32's time from which on a dtype counts as one that the processor has no instructions for


def slowness(dtype: torch.dtype) -> float:
    """How many times longer a matrix product takes on the CPU in ``dtype`` than in float32."""
    if dtype == torch.float32:  # two measurements of one thing differ widely on a busy machine
        return 1.0
    # In turn, and the best of several, so that another process in between does not count.
    found = [(_product_seconds(dtype), _product_seconds(torch.float32)) for _ in range(TRIES)]
    return min(in_dtype for in_dtype, _ in found) / min(usual for _, usual in found)


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
    matrix = torch.ones(SIZE, SIZE, dtype=dtype)
    began = time.perf_counter()
    torch.mm(matrix, matrix)
    return time.perf_counter() - began
