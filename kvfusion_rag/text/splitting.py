"""Documents within a limit of tokens: encoded whole if they fit, or cut into pieces at sentences and spaces."""

from __future__ import annotations

from dataclasses import replace

from ..errors import ContextLimitError
from ..schema import Document
from .encoder import DocumentEncoder

_USUAL_TOKEN = 8  # characters; more than a token of ordinary text has on average
_PAST_ANY_TOKEN = 64  # characters; more than the longest vocabulary entry that matters for finding a cut


def encode_up_to(encoder: DocumentEncoder, document: Document, max_tokens: int) -> tuple[int, ...] | None:
    """Ids of a document, or None if it has more than ``max_tokens``, which is noticed before a long text is read."""
    beginning = replace(document, text=document.text[: (max_tokens + 1) * _PAST_ANY_TOKEN])
    ids = encoder.encode_document(beginning)
    if len(ids) <= max_tokens and len(beginning.text) < len(document.text):
        ids = encoder.encode_document(document)
    return ids if len(ids) <= max_tokens else None


def split_document(encoder: DocumentEncoder, document: Document, max_tokens: int, most: int) -> list[tuple[int, ...]]:
    """Ids of the pieces of a document that is longer than ``max_tokens``, each in the whole template.

    Raises:
        ContextLimitError: template and title take more than half of ``max_tokens``, or the distinct pieces
            have more than ``most`` ids together; the rest is then not encoded.
    """
    frame = len(encoder.encode_document(Document("x", title=document.title)))  # upper bound of the template's share
    room = max_tokens - frame
    if room < frame:
        raise ContextLimitError(
            f"template and title take {frame} tokens, more than half of the {max_tokens} that the model reads in "
            "one document, so it cannot be split; shorten the title."
        )
    pieces: list[tuple[int, ...]] = []
    text, at = document.text, 0
    distinct: set[tuple[int, ...]] = set()
    tokens = 0
    while at < len(text):
        cut = _cut(encoder, text, at, room)
        piece = encoder.encode_document(replace(document, text=text[at : at + cut].strip()))
        while len(piece) > max_tokens and cut > 1:  # a cut inside a word can spell it with more tokens
            cut = cut * 3 // 4
            piece = encoder.encode_document(replace(document, text=text[at : at + cut].strip()))
        at += cut
        if piece:
            pieces.append(piece)
        tokens += 0 if piece in distinct else len(piece)
        distinct.add(piece)
        if tokens > most:
            raise ContextLimitError(
                f"the first {at} of {len(text)} characters have {tokens} tokens, but at most {most} may be fused; "
                "cut it."
            )
    return pieces


def _cut(encoder: DocumentEncoder, text: str, at: int, max_tokens: int) -> int:
    """Number of characters from ``at`` on that make a piece of at most ``max_tokens`` ids."""
    for characters in (_USUAL_TOKEN, _PAST_ANY_TOKEN):
        window = text[at : at + max_tokens * characters]
        cut = encoder.plain.cut(window, max_tokens)
        if cut < len(window):
            break
    return cut
