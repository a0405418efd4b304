"""Embeds many texts on the workers of a cluster, for an index of files."""

from __future__ import annotations

import base64
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..errors import RetrievalError
from ..retrieval import Embedder
from .options import ClusterOptions
from .pool import run_batches

TEXTS_PER_BATCH = 64
TEXTS_FOR_WORKERS = 1024  # fewer texts are embedded here before a worker would have started
TEXTS_PER_STEP = 8192  # large, because each step of an index starts workers


class ClusterEmbedder:
    """Embeds many texts on the workers of a cluster, and questions and few texts in this process.

    Args:
        load: loads the embedding model, here and in each worker. It is sent to the workers.
        cluster: where to work; None is this process.

    Raises:
        RetrievalError: the model cannot be loaded in this process.
    """

    def __init__(self, load: Callable[[], Embedder], cluster: ClusterOptions | None) -> None:
        self._load, self._cluster = load, cluster
        self._here = load()

    @property
    def name(self) -> str:
        return self._here.name

    @property
    def fingerprint(self) -> str:
        return self._here.fingerprint

    def embed_documents(self, texts: Sequence[str]) -> np.ndarray:
        """Return the vectors of N texts, shape (N, E).

        Raises:
            ClusterError: the cluster cannot be used, or a worker has no such model.
        """
        if len(texts) < TEXTS_FOR_WORKERS:
            return self._here.embed_documents(texts)
        task = EmbedTask(self._load, self.fingerprint)
        return np.stack([_vector(one) for one in run_batches(task, texts, TEXTS_PER_BATCH, self._cluster)])

    def embed_question(self, text: str) -> np.ndarray:
        return self._here.embed_question(text)

    def embed_questions(self, texts: Sequence[str]) -> np.ndarray:
        return self._here.embed_questions(texts)


@dataclass(frozen=True, slots=True)
class EmbedTask:
    """Embeds texts with the model that has this fingerprint."""

    load: Callable[[], Embedder]
    fingerprint: str

    @property
    def store(self) -> None:
        return None

    def start(self, cache: Path | None) -> Embed:
        embedder = self.load()
        if embedder.fingerprint != self.fingerprint:
            raise RetrievalError(
                f"the worker's embedding model {embedder.name!r} differs from the command's; install the same weights "
                "on all machines."
            )
        return Embed(embedder)


class Embed:
    """Embeds batches of texts, one after another. The result of each text is its vector in base64."""

    def __init__(self, embedder: Embedder) -> None:
        self._embedder = embedder

    def __call__(self, batch: list[str]) -> list[str]:
        return [base64.b64encode(vector.tobytes()).decode() for vector in self._embedder.embed_documents(batch)]

    def close(self) -> None:
        """Do nothing, because there is no store."""


def _vector(text: str) -> np.ndarray:
    return np.frombuffer(base64.b64decode(text), dtype=np.float32)
