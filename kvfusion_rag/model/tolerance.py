"""Relative error of logits that rounding alone explains, per dtype."""

from __future__ import annotations

import torch

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}


def tolerance_of(dtype: torch.dtype) -> float:
    """Return the allowed relative error of logits; a dtype that is not listed gets that of float16."""
    return TOLERANCE.get(dtype, TOLERANCE[torch.float16])
