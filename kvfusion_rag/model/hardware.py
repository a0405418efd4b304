"""Devices and dtypes: choose them by name, and measure which dtypes this processor is fast in."""

from __future__ import annotations

import platform
import time
from functools import cache
from pathlib import Path

import torch

from ..errors import InvalidInputError
from ..text.json_text import is_a

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# On a busy machine any matrix product takes up to 16 milliseconds, because threads wait for each other. The matrices
# are large enough that a product without instructions for its dtype takes far longer.
MATRIX_SIZE = 512
REPEATS = 4
SLOW = 4.0  # times the float32 time; a slower dtype counts as one without instructions


def choose_device(device: str | None) -> torch.device:
    """Return the torch device of this name, or this machine's accelerator or CPU if the name is None."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if device is None:
        return accelerator or torch.device("cpu")
    try:
        chosen = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise InvalidInputError(
            f"device is {device!r}, but it must be a torch device such as 'cpu', 'cuda' or 'cuda:1'."
        ) from error
    available = {"cpu"} if accelerator is None else {"cpu", accelerator.type}
    if chosen.type not in available:
        raise InvalidInputError(
            f"device is {device!r}, but this machine and its torch build only have {sorted(available)}."
        )
    if chosen.type != "cpu" and (chosen.index or 0) >= (number := torch.accelerator.device_count()):
        raise InvalidInputError(f"device is {device!r}, but the number behind the colon must be below {number}.")
    return chosen


def choose_dtype(dtype: str | None, device: torch.device) -> torch.dtype | str:
    """Return the torch dtype of this name. None means float32 on a CPU, and elsewhere the checkpoint's own dtype."""
    if dtype is None:
        return torch.float32 if device.type == "cpu" else "auto"
    if not is_a(dtype, str) or dtype not in DTYPES:
        raise InvalidInputError(f"dtype is {dtype!r}, but it must be one of {sorted(DTYPES)}.")
    return DTYPES[dtype]


def slowness(dtype: torch.dtype) -> float:
    """Return how many times longer a matrix product takes on the CPU in ``dtype`` than in float32."""
    if dtype == torch.float32:  # two measurements of the same product differ widely on a busy machine
        return 1.0
    # Alternating, and the best of several, so that another process in between does not count.
    seconds = [(_product_seconds(dtype), _product_seconds(torch.float32)) for _ in range(REPEATS)]
    return min(in_dtype for in_dtype, _ in seconds) / min(in_float32 for _, in_float32 in seconds)


def fast_dtype(device: torch.device) -> torch.dtype:
    """Return bfloat16, or float32 on a CPU without instructions for bfloat16."""
    is_slow = device.type == "cpu" and slowness(torch.bfloat16) > SLOW
    return torch.float32 if is_slow else torch.bfloat16


@cache
def device_name(device: torch.device) -> str:
    """Return the product name of a device. Speed and the last bits of results may differ between products."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return _processor_name() if device.type == "cpu" else device.type


def _processor_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:  # not Linux
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def _product_seconds(dtype: torch.dtype) -> float:
    matrix = torch.ones(MATRIX_SIZE, MATRIX_SIZE, dtype=dtype)
    start = time.perf_counter()
    torch.mm(matrix, matrix)
    return time.perf_counter() - start
