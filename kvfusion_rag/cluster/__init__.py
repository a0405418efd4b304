"""Many documents and questions on the workers of a Ray cluster. Needs the extra ``ray``.

Batches of plain data go in, and results come out in the same order. Ray Data schedules the batches and restarts
workers that die. Without a cluster the same code runs in this process. This room decides only what a batch is, how a
worker loads its model and store, and how failures are counted.
"""

from __future__ import annotations

from .answering import answer_questions
from .embedding import ClusterEmbedder
from .evaluating import DescribedSystem, Evaluated, SystemsSpec, evaluate_systems
from .indexing import IndexedDocuments, index_documents
from .options import ClusterOptions, Replicas
from .questions import read_questions
from .spec import GeneratorSpec

__all__ = [
    "ClusterEmbedder",
    "ClusterOptions",
    "DescribedSystem",
    "Evaluated",
    "GeneratorSpec",
    "IndexedDocuments",
    "Replicas",
    "SystemsSpec",
    "answer_questions",
    "evaluate_systems",
    "index_documents",
    "read_questions",
]
