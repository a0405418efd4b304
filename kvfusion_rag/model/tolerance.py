"""Relative error of logits that rounding alone may cause, by dtype."""

import torch

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}


def tolerance_of(dtype: torch.dtype) -> float:
    """Return the allowed relative error in ``dtype``. An unknown dtype gets that of float16."""
    return TOLERANCE.get(dtype, TOLERANCE[torch.float16])
