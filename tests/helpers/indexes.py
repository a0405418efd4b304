"""Helpers for tests that search documents: an index without a model, and the real embedding model."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np

from kvfusion_rag.retrieval import DocumentIndex, SentenceTransformerEmbedder

EXAMPLES = Path(__file__).parent.parent.parent / "examples"
LIGHTHOUSE = EXAMPLES / "lighthouse"


class WordEmbedder:
    """Embeds texts as counts of hashed words, and records the embedded texts."""

    def __init__(self, size: int = 64) -> None:
        self.name = f"words-{size}"
        self.fingerprint = self.name
        self.size = size
        self.texts: list[str] = []
        self.failure: Exception | None = None

    def embed_documents(self, texts: Sequence[str]) -> np.ndarray:
        if self.failure is not None:
            raise self.failure
        self.texts += texts
        return np.stack([self.embed_question(text) for text in texts])

    def embed_question(self, text: str) -> np.ndarray:
        vector = np.full(self.size, 1e-3, dtype=np.float32)
        for word in text.lower().split():
            vector[zlib.crc32(word.strip(".,?!#").encode(errors="replace")) % self.size] += 1
        return vector / np.linalg.norm(vector)

    def embed_questions(self, texts: Sequence[str]) -> np.ndarray:
        return np.stack([self.embed_question(text) for text in texts])


def count_words(text: str) -> int:
    return len(text.split())


def open_index(folder: Path | None = None, embedder: WordEmbedder | None = None, **options) -> DocumentIndex:
    options = {"count_tokens": count_words, "chunk_tokens": 12} | options
    return DocumentIndex(folder, embedder=embedder or WordEmbedder(), **options)


def reasons(skipped) -> dict[str, str]:
    """Return why each file was skipped, by file name."""
    return {Path(one.path).name: one.reason for one in skipped}


@cache
def load_minilm() -> SentenceTransformerEmbedder:
    return SentenceTransformerEmbedder(device="cpu")
