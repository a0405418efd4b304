"""A question and random documents about its subject, for benchmarks that measure only time."""

from __future__ import annotations

import random

from kvfusion_rag import KVFusionGenerator

QUESTION = "Which of these documents says when the lighthouse at the harbour was built, and by whom?"
WORDS = "the mill by sea had a red lamp and two grey doves while boats went out to fish at dawn"


def random_document(generator: KVFusionGenerator, number: int, tokens: int) -> str:
    """Return a document of about ``tokens`` tokens, the same one for each ``number``."""
    rng = random.Random(number)
    document = f"Document {number}."
    while generator.count_tokens(document) < tokens:
        document += " " + " ".join(rng.choices(WORDS.split(), k=8))
    return document
