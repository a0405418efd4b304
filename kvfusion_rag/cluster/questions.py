"""Reads questions from JSON lines. A line that is not a question becomes a row with an error."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..data.rows import checked, open_text, reading_errors, require_object, required_text
from ..errors import InvalidInputError, KVFusionError
from ..schema import Document
from ..text.citations import place_of

DOCUMENT_FIELDS = ("text", "id", "title", "score")

Retrieve = Callable[[str], Sequence[Document]]


def read_questions(path: str | Path) -> Iterator[Any]:
    """Read the JSON value of each line that is not blank (``.gz`` too), or the text of a line that is not JSON.

    Raises:
        InvalidInputError: the file cannot be read, or is not UTF-8 text.
    """
    with reading_errors(Path(path)), open_text(Path(path)) as lines:
        for line in filter(str.strip, lines):
            try:
                yield json.loads(line)
            except (ValueError, RecursionError):
                yield line


def question_rows(rows: Iterable[Any], retrieve: Retrieve | None) -> Iterator[dict[str, Any]]:
    """Yield id, question and documents of each row as plain data, or id, question and error.

    Args:
        rows: mappings with ``question`` and, if nothing is retrieved, ``documents``: texts, or objects with text, id,
            title, score and metadata, of which only the text ``place`` is kept. ``id`` is the row's position by
            default, counted from 1.
        retrieve: returns the documents of a question without ``documents``.
    """
    for number, row in enumerate(rows, start=1):
        fields = row if isinstance(row, Mapping) else {}
        name, question = str(fields.get("id", number)), fields.get("question")
        try:
            yield {"id": name, **_checked(row, f"row {name}", retrieve)}
        except KVFusionError as error:
            yield {"id": name, "question": question if isinstance(question, str) else None, "error": str(error)}


def _checked(row: object, where: str, retrieve: Retrieve | None) -> dict[str, Any]:
    fields = require_object(row, where, "a question must be a JSON object")
    question = required_text(fields, "question", where)
    if "documents" in fields:
        given = checked(fields, "documents", (list,), "a list of texts or objects", where)
        documents = [_document(one, f"{where}: document {n}") for n, one in enumerate(given, start=1)]
    elif retrieve is not None:
        documents = [_fields(one) for one in retrieve(question)]
    else:
        raise InvalidInputError(f"{where}: documents is missing; list them there, or retrieve them from an index.")
    return {"question": question, "documents": documents}


def _document(value: object, where: str) -> dict[str, Any]:
    if isinstance(value, str):
        return {"text": value}
    fields = require_object(value, where, "a document must be a text or an object")
    metadata = checked(fields, "metadata", (dict, type(None)), "an object", where) or {}
    given = {name: fields[name] for name in DOCUMENT_FIELDS if name in fields}
    return given | {"text": checked(fields, "text", (str,), "a text", where), **_place(metadata)}


def _fields(document: Document) -> dict[str, Any]:
    return {name: getattr(document, name) for name in DOCUMENT_FIELDS} | _place(document.metadata)


def _place(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Return the only field of a document's metadata that answers name, as a field of the document."""
    place = place_of(metadata)
    return {} if place is None else {"metadata": {"place": place}}
