"""Errors that only LangChain's calls can have; all others are kvfusion_rag's."""

from __future__ import annotations

from kvfusion_rag import InvalidInputError, KVFusionError


class AnswerTimeoutError(KVFusionError, TimeoutError):
    """An answer was not complete within the ``timeout`` of its model; its work has been stopped."""


class UnsupportedFeatureError(InvalidInputError, NotImplementedError):
    """LangChain asks for something that no KVFusionGenerator does; the message says what to do instead."""
