"""Retrieval: an index over files that finds the documents nearest to a question. Needs the extra ``rag``.

Files and folders come in, and so does a question. The chunks of files that are nearest to the question go out, as
``Document`` objects. This room must not know the generator: a function that counts tokens is enough to limit chunks.
"""

from __future__ import annotations

from .embedding import Embedder, SentenceTransformerEmbedder
from .index import DocumentIndex, IndexReport
from .loaders import LoadedText, SkippedFile, read_document
from .watching import watch_folder

__all__ = [
    "DocumentIndex",
    "Embedder",
    "IndexReport",
    "LoadedText",
    "SentenceTransformerEmbedder",
    "SkippedFile",
    "read_document",
    "watch_folder",
]
