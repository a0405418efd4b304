"""kvfusion-rag: answers that do not change when the retriever shuffles its documents (arXiv 2501.07523).

Public names only. Each is imported on first use, so that ``import kvfusion_rag`` costs no torch import.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOME = {
    "Answer": "schema",
    "AnswerStream": "streaming",
    "Attribution": "attribution",
    "Check": "schema",
    "Citation": "schema",
    "ContextLimitError": "errors",
    "ControlTokenError": "errors",
    "DiskStore": "store",
    "Document": "schema",
    "DocumentIndex": "retrieval",
    "DocumentStore": "store",
    "DocumentsPlace": "schema",
    "GateReport": "schema",
    "Influence": "attribution",
    "InvalidInputError": "errors",
    "InvarianceReport": "schema",
    "KVFusionError": "errors",
    "KVFusionGenerator": "generator",
    "MemoryLimitError": "errors",
    "MemoryStore": "store",
    "Message": "schema",
    "MissingDependencyError": "errors",
    "ModelLoadError": "errors",
    "OverloadError": "errors",
    "PromptPart": "schema",
    "RemoteStore": "store",
    "RetrievalError": "errors",
    "ShownPrompt": "schema",
    "Source": "schema",
    "StoreError": "errors",
    "StoreEvent": "store",
    "StoreMetrics": "store",
    "Timings": "schema",
    "TrainingError": "errors",
    "UnsupportedModelError": "errors",
    "Usage": "schema",
}

__all__ = list(_HOME)  # pyright: ignore[reportUnsupportedDunderAll]

if TYPE_CHECKING:
    from .attribution import Attribution, Influence
    from .errors import (
        ContextLimitError,
        ControlTokenError,
        InvalidInputError,
        KVFusionError,
        MemoryLimitError,
        MissingDependencyError,
        ModelLoadError,
        OverloadError,
        RetrievalError,
        StoreError,
        TrainingError,
        UnsupportedModelError,
    )
    from .generator import KVFusionGenerator
    from .retrieval import DocumentIndex
    from .schema import (
        Answer,
        Check,
        Citation,
        Document,
        DocumentsPlace,
        GateReport,
        InvarianceReport,
        Message,
        PromptPart,
        ShownPrompt,
        Source,
        Timings,
        Usage,
    )
    from .store import DiskStore, DocumentStore, MemoryStore, RemoteStore, StoreEvent, StoreMetrics
    from .streaming import AnswerStream


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOME[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
