"""Random documents and small requests for tests of batching."""

import gc
import random

from tiny import WORDS

from kvfusion_rag import Document
from kvfusion_rag.engine.modes import AnswerMode, PlacedDocument, TokenLimits
from kvfusion_rag.engine.requests import Request
from kvfusion_rag.fusion.fused_cache import FusedBuffer
from kvfusion_rag.fusion.interface import Question
from kvfusion_rag.text.documents import EncodedDocuments
from kvfusion_rag.text.layouts import FixedLayout


def documents(rng: random.Random, count: int) -> list[Document]:
    """Return ``count`` documents of 5 to 30 random words."""
    return [Document(" ".join(rng.choices(WORDS.split(), k=rng.randint(5, 30)))) for _ in range(count)]


def request(keys: str, question_tokens: int = 4, size: int = 10) -> Request:
    """Return a request over one document of ``size`` tokens per letter of ``keys``."""
    pieces = tuple(PlacedDocument(key, tuple(range(size)), 0) for key in sorted(keys))
    layout = FixedLayout((1, 2), tuple(range(question_tokens)), None)
    mode = AnswerMode("fusion", tuned=True)
    question, limits = Question(layout.question, size), TokenLimits(1)
    return Request(EncodedDocuments((), {}), question, mode, pieces, layout, "", "", limits)


def buffers() -> int:
    """Return the number of fused buffers in memory."""
    gc.collect()
    return sum(isinstance(one, FusedBuffer) for one in gc.get_objects())
