"""Tables in a Chroma server. Needs the extra ``chroma``.

Chroma searches approximately (HNSW). A record without a vector has the vector (1), because Chroma requires one.
"""

from __future__ import annotations

import os
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal, cast
from urllib.parse import urlsplit

import numpy as np

from ...errors import MissingDependencyError, RetrievalError
from .database import RECORDS_PER_REQUEST, Record, Table, in_parts
from .urls import IndexUrl

if TYPE_CHECKING:
    from chromadb.api import ClientAPI
    from chromadb.api.models.Collection import Collection

TOKEN_VARIABLE = "KVFUSION_INDEX_TOKEN"
_SUFFIX = "-files"
Include = list[Literal["metadatas", "embeddings", "distances"]]


class ChromaDatabase:
    """The collections of a Chroma server.

    The environment variable ``KVFUSION_INDEX_TOKEN`` is sent as a bearer token and as ``X-Chroma-Token``.

    Raises:
        MissingDependencyError: chromadb is not installed.
        RetrievalError: the server cannot be reached.
    """

    def __init__(self, url: IndexUrl) -> None:
        self._url = url
        with self._explained():
            self._client = _connect(url.address)
        self._open: dict[str, Collection] = {}

    @property
    def location(self) -> str:
        return self._url.text

    def collections(self) -> list[str]:
        names: list[str] = []
        with self._explained():
            while page := self._client.list_collections(limit=RECORDS_PER_REQUEST, offset=len(names)):
                names += [one.name for one in page]
        return [name.removesuffix(_SUFFIX) for name in names if name.endswith(_SUFFIX)]

    def read(self, collection: str, table: Table, ids: Sequence[str]) -> list[Record]:
        include: Include = ["metadatas", "embeddings"]
        with self._explained():
            opened = self._existing(collection, table)
            if opened is None:
                return []
            found = [opened.get(ids=list(part), include=include) for part in in_parts(ids)]  # pyright: ignore[reportArgumentType]
        return [record for page in found for record in _records(page, with_vectors=table == "texts")]

    def scan(self, collection: str, table: Table) -> Iterator[Record]:
        offset = 0
        while True:
            with self._explained():
                opened = self._existing(collection, table)
                if opened is None:
                    return
                page = opened.get(limit=RECORDS_PER_REQUEST, offset=offset, include=["metadatas"])
            yield from _records(page, with_vectors=False)
            offset += len(page["ids"])
            if len(page["ids"]) < RECORDS_PER_REQUEST:
                return

    def write(self, collection: str, table: Table, records: Sequence[Record]) -> None:
        with self._explained():
            name = _name(collection, table)
            if name not in self._open:
                self._open[name] = self._client.get_or_create_collection(
                    name, configuration={"hnsw": {"space": "cosine"}}, embedding_function=None
                )
            for start in range(0, len(records), RECORDS_PER_REQUEST):
                part = records[start : start + RECORDS_PER_REQUEST]
                self._open[name].upsert(
                    ids=[record.id for record in part],
                    embeddings=[[1.0] if record.vector is None else record.vector.tolist() for record in part],
                    metadatas=[{"payload": record.payload} for record in part],
                )

    def remove(self, collection: str, table: Table, ids: Sequence[str]) -> None:
        with self._explained():
            if (opened := self._existing(collection, table)) is not None:
                for part in in_parts(ids):
                    opened.delete(ids=list(part))

    def nearest(self, collection: str, vector: np.ndarray, count: int) -> list[tuple[float, Record]]:
        include: Include = ["metadatas", "distances"]
        with self._explained():
            opened = self._existing(collection, "texts")
            if opened is None:
                return []
            found: Any = opened.query(query_embeddings=[vector.tolist()], n_results=count, include=include)  # pyright: ignore[reportArgumentType]
        rows = zip(found["distances"][0], found["ids"][0], found["metadatas"][0], strict=True)
        return [(float(distance), Record(id, _payload(metadata))) for distance, id, metadata in rows]

    def close(self) -> None:
        self._client.close()  # pyright: ignore[reportAttributeAccessIssue]

    def _existing(self, collection: str, table: Table) -> Collection | None:
        """Return a collection of the server, or None if it does not exist."""
        from chromadb.errors import NotFoundError

        name = _name(collection, table)
        if name not in self._open:
            try:
                self._open[name] = self._client.get_collection(name, embedding_function=None)
            except NotFoundError:
                return None
        return self._open[name]

    @contextmanager
    def _explained(self) -> Generator[None, None, None]:
        """Turn errors of the client into ours."""
        try:
            yield
        except ImportError:
            raise
        except Exception as error:  # the client raises errors of Chroma, httpx and Python
            cause = " ".join(str(error).split())[:200]
            raise RetrievalError(f"the index {self._url.text!r} cannot be used: {cause}") from error


def _connect(address: str) -> ClientAPI:
    try:
        import chromadb
        from chromadb.config import Settings
    except ImportError as error:
        raise MissingDependencyError.of_extra("an index in Chroma", str(error.name), "chroma") from error
    parts = urlsplit(address)
    token = os.environ.get(TOKEN_VARIABLE)
    return chromadb.HttpClient(
        host=cast("str", parts.hostname),
        port=cast("int", parts.port),
        ssl=parts.scheme == "https",
        headers={"Authorization": f"Bearer {token}", "X-Chroma-Token": token} if token else None,
        settings=Settings(anonymized_telemetry=False),
    )


def _name(collection: str, table: Table) -> str:
    return collection + (_SUFFIX if table == "files" else "")


def _records(page: Any, *, with_vectors: bool) -> list[Record]:
    vectors = page["embeddings"] if with_vectors else [None] * len(page["ids"])
    return [
        Record(id, _payload(metadata), None if vector is None else np.asarray(vector, dtype=np.float32))
        for id, metadata, vector in zip(page["ids"], page["metadatas"], vectors, strict=True)
    ]


def _payload(metadata: Any) -> str:
    """Return the payload of a record, or an empty text if others have written the record."""
    return str((metadata or {}).get("payload", ""))
