"""Indexes in vector databases that several machines share: a Chroma server, or a Lance table in object storage.

Files, chunks and vectors come in, and the chunks nearest to a vector go out. Records are read as untrusted data. This
room must not know how files are read or texts are embedded.
"""

from __future__ import annotations

from collections.abc import Mapping

from .collection import DatabaseCollection
from .urls import IndexUrl, is_index_url

__all__ = ["DatabaseCollection", "IndexUrl", "is_index_url", "open_collection"]


def open_collection(url: str, name: str, settings: Mapping[str, str | int]) -> DatabaseCollection:
    """Open the collection ``name`` of the index at ``url``, which is created when something is written.

    Raises:
        InvalidInputError: it is not the URL of an index.
        MissingDependencyError: the client of the database is not installed.
        RetrievalError: the database cannot be reached.
    """
    place = IndexUrl.parse(url)
    if place.kind == "chroma":
        from .chroma import ChromaDatabase as Database
    else:
        from .lance import LanceDatabase as Database
    return DatabaseCollection(Database(place), f"{place.name}-{name}", settings)
