"""What a vector database must do for an index: keep records in two tables, and find those nearest to a vector."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np

Table = Literal["texts", "files"]
TABLES: tuple[Table, ...] = ("texts", "files")
RECORDS_PER_REQUEST = 500


@dataclass(frozen=True, slots=True)
class Record:
    """One record.

    Attributes:
        id: 32 hexadecimal digits.
        payload: JSON text.
        vector: shape (E,) and length 1 in the table "texts"; ``None`` in "files".
    """

    id: str
    payload: str
    vector: np.ndarray | None = None


class VectorDatabase(Protocol):
    """Tables of collections. A table that does not exist is empty, and the first write creates it.

    All methods raise RetrievalError if the database cannot be reached or used.
    """

    @property
    def location(self) -> str:
        """The URL of the index, for messages."""
        ...

    def collections(self) -> list[str]:
        """Return the names of all collections whose table "files" exists."""
        ...

    def read(self, collection: str, table: Table, ids: Sequence[str]) -> list[Record]:
        """Return the records with these ids that exist, in any order."""
        ...

    def scan(self, collection: str, table: Table) -> Iterator[Record]:
        """Yield all records, without their vectors."""
        ...

    def write(self, collection: str, table: Table, records: Sequence[Record]) -> None:
        """Add records, or replace those with the same id."""
        ...

    def remove(self, collection: str, table: Table, ids: Sequence[str]) -> None:
        """Remove the records with these ids that exist."""
        ...

    def nearest(self, collection: str, vector: np.ndarray, count: int) -> list[tuple[float, Record]]:
        """Return the ``count`` records of "texts" nearest to a vector (E,), nearest first, with cosine distances."""
        ...

    def close(self) -> None:
        """Release the connection."""
        ...


def in_parts(ids: Sequence[str], size: int = RECORDS_PER_REQUEST) -> Iterator[Sequence[str]]:
    """Yield ids in parts that one request can name."""
    for start in range(0, len(ids), size):
        yield ids[start : start + size]
