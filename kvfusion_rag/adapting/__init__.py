"""Adapting a model to fused documents without labels: its own questions, its own answers, and an adapter.

``passages`` reads and cuts the documents, ``questions`` has the model ask and answer, ``filtering`` drops pairs that
teach nothing, ``rows`` adds negatives, ``judging`` compares systems on held-out questions, ``card`` describes the
adapter, ``stages`` keeps what was done and ``run`` is one call for all of it. Names are imported on first use, so that
the options cost no torch import.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

_HOME = {"AdaptOptions": "options", "AdaptReport": "report", "adapt": "run"}

__all__ = list(_HOME)  # pyright: ignore[reportUnsupportedDunderAll]

if TYPE_CHECKING:
    from .options import AdaptOptions
    from .report import AdaptReport
    from .run import adapt


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOME[name]}", __name__), name)
