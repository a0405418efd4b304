"""Where a question's documents stand: what is prefilled apart, at which positions, and where the question begins.

Pure functions of token ids and settings. Knows neither weights nor the store, but for the names of what is in it.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..model.positions import global_starts, question_start
from ..schema import Mode
from ..text.documents import Reading
from ..text.settings import ModelSettings


@dataclass(frozen=True, slots=True)
class Placed:
    """Ids that are prefilled apart.

    Attributes:
        key: of their KV in the store.
        start: position of the first.
        stored: whether other questions can use it: not where it holds several documents, or stands where the others
            of one question left room.
    """

    key: str
    ids: tuple[int, ...]
    start: int
    stored: bool = True


def place(
    reading: Reading, mode: Mode, settings: ModelSettings, *, prefix_tokens: int
) -> tuple[tuple[Placed, ...] | None, int]:
    """The pieces to prefill, in the order in which they are fused, and the position of the prompt's first token.

    Returns:
        The pieces, or ``None`` if all documents are part of the prompt; and the position.
    """
    if mode == "concat":
        return None, 0
    if mode == "fusion" and settings.positions == "global":
        return _one_after_another(reading, prefix_tokens)
    passage_length = None if mode == "ape" else settings.passage_length
    pieces = tuple(Placed(name, ids, prefix_tokens) for name, ids in reading.keys.items())
    return pieces, question_start(prefix_tokens, passage_length, reading.longest)


def _one_after_another(reading: Reading, prefix_tokens: int) -> tuple[tuple[Placed, ...], int]:
    """In the caller's order, each where the one before ends."""
    pieces = reading.distinct
    *starts, end = global_starts(prefix_tokens, [len(ids) for ids in pieces.values()])
    # Keys of their own, but for the document that stands right after the prefix as ever.
    names = (key if at == prefix_tokens else f"{key}@{at}" for key, at in zip(pieces, starts, strict=True))
    found = zip(names, pieces.values(), starts, strict=True)
    return tuple(Placed(name, ids, at, stored=at == prefix_tokens) for name, ids, at in found), end
