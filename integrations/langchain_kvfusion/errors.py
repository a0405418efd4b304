"""Errors that only this package raises, besides those of kvfusion_rag."""

from __future__ import annotations

from kvfusion_rag import KVFusionError


class AnswerTimeoutError(KVFusionError, TimeoutError):
    """An answer was not complete within the model's ``timeout``. Its computation has been stopped."""
