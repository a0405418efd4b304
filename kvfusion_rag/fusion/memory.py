"""Recognises a lack of memory, and reports it as our own error."""

from __future__ import annotations

import traceback
from collections.abc import Generator
from contextlib import contextmanager

import torch

from ..errors import MemoryLimitError

_SHORTAGE = ("can't allocate memory", "out of memory", "alloc_failed")  # CPU; CUDA, MPS; cuBLAS


@contextmanager
def memory_errors(device: torch.device, *, questions: int, tokens: int) -> Generator[None, None, None]:
    """Raise MemoryLimitError if memory runs out inside the context.

    Args:
        questions: batch size.
        tokens: document tokens of the longest row.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        traceback.clear_frames(error.__traceback__)  # the error would keep the failed pass's tensors alive
        raise MemoryLimitError(
            f"{device} does not have enough memory for {questions} question(s) over {tokens} document tokens; pass "
            "fewer or shorter documents, or load the model in a smaller dtype."
        ) from error


def is_out_of_memory(error: Exception) -> bool:
    """Return whether ``error`` reports a lack of memory. Some libraries only say so in the message."""
    message = str(error).lower()
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(sign in message for sign in _SHORTAGE)
