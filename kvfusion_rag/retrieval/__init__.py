"""Retrieval: files and folders become chunks, vectors and, for a question, the documents nearest to it.

``loaders`` reads files, ``splitting`` cuts texts into chunks, ``embedding`` turns them into vectors, and
``index`` keeps it all in Chroma. Nothing here knows the generator: chunk sizes come from a function that
counts tokens. Needs the extra ``kvfusion-rag[rag]``.
"""

from __future__ import annotations

from .embedding import Embedder, SentenceTransformerEmbedder
from .index import DocumentIndex, IndexReport
from .loaders import LoadedText, SkippedFile, read_document

__all__ = [
    "DocumentIndex",
    "Embedder",
    "IndexReport",
    "LoadedText",
    "SentenceTransformerEmbedder",
    "SkippedFile",
    "read_document",
]
