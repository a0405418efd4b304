"""Texts without embedded data."""

from kvfusion_rag.retrieval.files.junk import find_junk, without_spans


def without_junk(text: str) -> tuple[str, tuple[str, ...]]:
    """Return the text without embedded data, and one description for each kind of data that was left out."""
    spans, descriptions = find_junk(text)
    return without_spans(text, spans), descriptions
