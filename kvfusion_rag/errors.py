"""The exceptions that kvfusion-rag raises on purpose.

The command line prints a message as its only line, so every message names the wrong value, the allowed value and the
likely cause in one sentence. Imports only the standard library.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from typing import Self


class KVFusionError(Exception):
    """Base class of all errors that this package raises on purpose."""


class InvalidInputError(KVFusionError, ValueError):
    """An argument, option, document or question is invalid."""


class ModelLoadError(KVFusionError):
    """A model, tokenizer, adapter or ``kvfusion.json`` cannot be read."""


class UnsupportedModelError(KVFusionError):
    """The architecture cannot be fused exactly. The message names the cause."""


class ContextLimitError(InvalidInputError):
    """A document, a question or all of them together exceed a limit of the model."""


class NotCalibratedError(InvalidInputError):
    """Support was requested of a model for which it was not calibrated."""

    @classmethod
    def of(cls, min_support: object, model: str) -> Self:
        """Return the error for a ``model`` without a calibration."""
        return cls(
            f"min_support is {min_support!r}, but {model} has no calibration of support; measure one with kvfusion "
            "calibrate, or leave out min_support."
        )


class ControlTokenError(KVFusionError):
    """Untrusted text was about to become a control token. Nothing was sent to the model."""


class StoreError(KVFusionError):
    """A document KV store cannot be opened. Faults of an open store count as misses and raise nothing."""


class DurabilityError(StoreError):
    """A store could not keep all documents that it was asked to keep.

    Attributes:
        documents: ids of the documents that it lacks. Empty if it only lacks the text in front of them.
    """

    def __init__(self, documents: Sequence[str], cause: str) -> None:
        self.documents = tuple(documents)
        names = ", ".join(map(repr, self.documents[:5])) + ", ..." * (len(self.documents) > 5)
        count = f"{len(self.documents)} document{'s' * (len(self.documents) != 1)}"
        lacking = f"{count} ({names})" if documents else "the text in front of the documents"
        super().__init__(f"the store does not have {lacking}: {cause}; correct this and store them again.")


class TrainingError(KVFusionError):
    """A training run cannot continue, because its loss or gradient is NaN or infinite. Its checkpoints stay valid."""


class MemoryLimitError(KVFusionError):
    """The device has too little memory, even after the store released its own and batches were made smaller."""


class OverloadError(KVFusionError):
    """The queue is full; try again later."""


class ForkedProcessError(KVFusionError):
    """A process was forked from one that computes with several threads, which it does not have."""


class EngineError(KVFusionError):
    """Another process that answers has ended, or could not answer a request."""


class ClusterError(KVFusionError):
    """A Ray cluster cannot be reached or started, or its workers cannot work."""


class RetrievalError(KVFusionError):
    """A file, folder or index cannot be read, split, embedded or searched."""


class MissingDependencyError(KVFusionError, ImportError):
    """A package is not installed, or is not compatible with the others. The message names what to install."""

    @classmethod
    def of_extra(cls, subject: str, package: str, extra: str) -> Self:
        """Return the error for ``subject``, which needs a ``package`` of an extra that is not installed."""
        return cls(
            f"{subject} needs {package}, which is not installed; in the folder of kvfusion-rag's source code, run: "
            f'pip install -c constraints.txt ".[{extra}]"'
        )


@contextmanager
def model_load_errors(subject: str) -> Generator[None, None, None]:
    """Turn any error of a third-party loader into ModelLoadError, because untrusted files can raise anything."""
    try:
        yield
    except KVFusionError:
        raise
    except Exception as error:
        cause = " ".join(str(error).split())[:300] or "no reason was given"
        raise ModelLoadError(f"cannot load {subject}: {type(error).__name__}: {cause}") from error
