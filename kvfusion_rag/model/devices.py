"""Device and precision by name, as a user gives them. Knows no models."""

from __future__ import annotations

import torch

from ..errors import InvalidInputError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def choose_device(device: str | None) -> torch.device:
    """``device`` as torch knows it, or the accelerator of this machine, or the CPU."""
    if device is None:
        found = torch.accelerator.current_accelerator(check_available=True)
        return found if found is not None else torch.device("cpu")
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise InvalidInputError(
            f"device is {device!r}, but it must be a torch device such as 'cpu', 'cuda' or 'cuda:1'."
        ) from error
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    present = {"cpu"} if accelerator is None else {"cpu", accelerator.type}
    if found.type not in present:
        raise InvalidInputError(f"device is {device!r}, but this machine and this torch have only {sorted(present)}.")
    return found


def choose_dtype(dtype: str | None, device: torch.device) -> torch.dtype | str:
    """``dtype`` as torch knows it; by default float32 on the CPU, where it is exact and runs everywhere."""
    if dtype is None:
        return torch.float32 if device.type == "cpu" else "auto"
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise InvalidInputError(f"dtype is {dtype!r}, but it must be one of {sorted(DTYPES)}.")
    return DTYPES[dtype]
