"""The exceptions that kvfusion-rag raises on purpose.

Every message names the wrong value, the allowed one and the likely cause in one sentence, because the
command line prints it as its only line. Imports only the standard library.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class KVFusionError(Exception):
    """Base of every error that this package raises on purpose."""


class InvalidInputError(KVFusionError, ValueError):
    """An argument, option, document or question is outside what is allowed."""


class ModelLoadError(KVFusionError):
    """A model, tokenizer, adapter or ``kvfusion.json`` cannot be read."""


class UnsupportedModelError(KVFusionError):
    """The architecture cannot be fused exactly; the message names the cause."""


class ContextLimitError(InvalidInputError):
    """A document, a question or all of them together pass a limit of the model."""


class ControlTokenError(KVFusionError):
    """Untrusted text was about to become a control token; nothing was sent to the model."""


class StoreError(KVFusionError):
    """A document KV store cannot be opened; once it is open, its faults are counted misses and never errors."""


class TrainingError(KVFusionError):
    """A training run cannot go on: its loss or gradient is no number any more. What it has saved stays good."""


class MemoryLimitError(KVFusionError):
    """The device has not enough memory, even after the store gave its own back and batches were made smaller."""


class OverloadError(KVFusionError):
    """More work is waiting already than may wait; ask again later."""


class RetrievalError(KVFusionError):
    """A file, folder or index cannot be read, split, embedded or searched."""


class MissingDependencyError(KVFusionError, ImportError):
    """A package is not installed, or its version does not fit the others; the message names what to install."""


@contextmanager
def model_load_errors(what: str) -> Iterator[None]:
    """Turn any error of a third-party loader into ModelLoadError, since loaders of untrusted files raise anything."""
    try:
        yield
    except KVFusionError:
        raise
    except Exception as error:
        cause = " ".join(str(error).split())[:300] or "no reason was given"
        raise ModelLoadError(f"cannot load {what}: {type(error).__name__}: {cause}") from error
