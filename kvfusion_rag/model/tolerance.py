"""Relative error of tensors, and how much of it rounding alone may cause in logits, by dtype."""

from typing import Any, cast

import torch

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}


def tolerance_of(dtype: torch.dtype) -> float:
    """Return the allowed relative error in ``dtype``. An unknown dtype gets that of float16."""
    return TOLERANCE.get(dtype, TOLERANCE[torch.float16])


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the norm of the difference as a share of the norm of ``expected``."""
    return float(_norm(found - expected) / _norm(expected))


def _norm(tensor: torch.Tensor) -> torch.Tensor:
    return cast(Any, tensor).norm()  # which torch declares without types
