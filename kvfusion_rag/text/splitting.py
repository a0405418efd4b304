"""Documents within a token limit: encoded whole if they fit, else cut into pieces at sentences and spaces."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from ..errors import ContextLimitError
from ..schema import Document
from .encoder import LONGEST_TOKEN, USUAL_TOKEN, DocumentEncoder


def encode_up_to(encoder: DocumentEncoder, document: Document, max_tokens: int) -> tuple[int, ...] | None:
    """Return the ids of a document, or None if it has more than ``max_tokens``.

    Only the beginning of a text that is much longer is encoded.
    """
    if encoder.plain.exceeds(document.text, max_tokens):
        return None
    ids = encoder.encode_document(document)
    return ids if len(ids) <= max_tokens else None


def split_document(
    encoder: DocumentEncoder, document: Document, max_tokens: int, most: int
) -> Iterator[tuple[int, ...]]:
    """Yield the ids of the pieces of a document that is longer than ``max_tokens``, each in the complete template.

    Raises:
        ContextLimitError: template and title take more than half of ``max_tokens``, or the distinct pieces have more
            than ``most`` ids in total. In that case the rest is not encoded.
    """
    frame = len(encoder.encode_document(Document("x", title=document.title)))  # upper bound of the template's share
    room = max_tokens - frame
    if room < frame:
        raise ContextLimitError(
            f"template and title take {frame} tokens, more than half of the {max_tokens} that the model reads in "
            "one document, so it cannot be split; shorten the title."
        )
    distinct: set[tuple[int, ...]] = set()
    text, start, tokens = document.text, 0, 0
    while start < len(text):
        cut = _cut(encoder, text, start, room)
        piece = encoder.encode_document(replace(document, text=text[start : start + cut].strip()))
        while len(piece) > max_tokens and cut > 1:  # a cut inside a word can need more tokens to spell it
            cut = cut * 3 // 4
            piece = encoder.encode_document(replace(document, text=text[start : start + cut].strip()))
        start += cut
        tokens += 0 if piece in distinct else len(piece)
        distinct.add(piece)
        if tokens > most:
            raise ContextLimitError(
                f"the first {start} of {len(text)} characters have {tokens} tokens, but at most {most} can be fused; "
                "shorten it."
            )
        if piece:
            yield piece


def _cut(encoder: DocumentEncoder, text: str, start: int, max_tokens: int) -> int:
    """Return the number of characters from ``start`` that make a piece of at most ``max_tokens`` ids."""
    for characters in (USUAL_TOKEN, LONGEST_TOKEN):
        window = text[start : start + max_tokens * characters]
        cut = encoder.plain.cut(window, max_tokens)
        if cut < len(window):
            break
    return cut
