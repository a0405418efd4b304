"""Training: from questions to rows with negatives, and from rows to a tuned decoder.

``formats`` reads questions and passages, ``golds`` finds gold passages and ``mining`` negatives, ``exclusion`` what
evaluation files hold, ``windows`` cuts passages and finds evidence, ``data`` builds the rows as ``recipe`` says,
``groups`` those that share their passages, and ``writing`` puts them into a file; BM25 needs the extra
``kvfusion-rag[train]``, dense negatives ``kvfusion-rag[rag]``. ``examples`` encodes rows, ``loss`` is the paper's,
``trainer`` is the loop and ``run`` one call for all of it. Names are imported on first use, so that building data
costs no torch import.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

_HOME = {
    "PRESETS": "config",
    "DataBuilder": "data",
    "DataOptions": "recipe",
    "DataReport": "recipe",
    "Example": "formats",
    "Progress": "progress",
    "Trainer": "trainer",
    "TrainingConfig": "config",
    "check_output": "writing",
    "preset": "config",
    "read_corpus": "formats",
    "read_dataset": "formats",
    "read_examples": "formats",
    "read_ready_rows": "formats",
    "train": "run",
    "write_training_rows": "writing",
}

__all__ = list(_HOME)  # pyright: ignore[reportUnsupportedDunderAll]

if TYPE_CHECKING:
    from .config import PRESETS, TrainingConfig, preset
    from .data import DataBuilder
    from .formats import Example, read_corpus, read_dataset, read_examples, read_ready_rows
    from .progress import Progress
    from .recipe import DataOptions, DataReport
    from .run import train
    from .trainer import Trainer
    from .writing import check_output, write_training_rows


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOME[name]}", __name__), name)
