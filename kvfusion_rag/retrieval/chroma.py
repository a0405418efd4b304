"""The chunks of one index in Chroma: a collection in a folder, or a private one in memory.

This is the only module that imports chromadb. Chroma's files are not safe for several processes, so a lock file allows
only one process at a time to open a folder.
"""

from __future__ import annotations

import sqlite3
import uuid
from collections.abc import Generator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import MissingDependencyError, RetrievalError

if TYPE_CHECKING:
    from chromadb.api.client import Client
    from filelock import FileLock

DATABASE_FILE = "chroma.sqlite3"
LOCK_FILE = "index.lock"
LOCK_SECONDS = 10.0
SEARCH_BREADTH = 200  # ef of HNSW, well above the default, because a missed chunk costs more than a millisecond


@dataclass(frozen=True, slots=True)
class Row:
    """One stored chunk."""

    id: str
    text: str
    metadata: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class StoredFile:
    """The stored chunks of one file. ``complete`` is False if an earlier write was interrupted."""

    digest: str
    ids: tuple[str, ...]
    complete: bool


class ChunkCollection:
    """Chunks with their vectors. Metadata must contain ``file``, ``digest`` and ``chunks`` (their number in the file).

    Args:
        folder: folder of the collection, created if it is missing; ``None`` for a collection in memory.
        name: name of the collection in the folder. Not used in memory.
        settings: stored with the collection and shown in error messages of indexes with other settings.

    Raises:
        RetrievalError: the folder is in use, cannot be written, or contains other files.
        MissingDependencyError: chromadb is not installed.
    """

    def __init__(self, folder: Path | None, name: str, settings: Mapping[str, str | int]) -> None:
        self._folder = folder
        # All in-memory clients of a process share one database, so each index needs its own name.
        self._name = name if folder else f"kvfusion-{uuid.uuid4().hex}"
        self._lock = _lock(folder) if folder else None
        try:
            with _explained(folder):
                self._client = _connect(folder)
                self._collection = self._client.get_or_create_collection(
                    self._name,
                    embedding_function=None,
                    metadata=dict(settings),
                    configuration={
                        "hnsw": {"space": "cosine", "ef_construction": SEARCH_BREADTH, "ef_search": SEARCH_BREADTH}
                    },
                )
        except BaseException:
            self._unlock()
            raise

    def __len__(self) -> int:
        with _explained(self._folder):
            return self._collection.count()

    def close(self) -> None:
        """Release the folder, or discard the collection in memory."""
        with _explained(self._folder):
            if self._folder is None:
                self._client.delete_collection(self._name)
            self._client.close()
        self._unlock()

    def stored_files(self) -> dict[str, StoredFile]:
        """Return the stored files by name."""
        with _explained(self._folder):
            rows = self._collection.get(include=["metadatas"])
        by_file: dict[str, list[tuple[str, Mapping[str, Any]]]] = {}
        for chunk_id, metadata in zip(rows["ids"], rows["metadatas"] or [], strict=True):
            by_file.setdefault(str(metadata["file"]), []).append((chunk_id, metadata))
        return {file: _stored_file(chunks) for file, chunks in by_file.items()}

    def delete(self, ids: Sequence[str]) -> None:
        """Remove chunks by id."""
        with _explained(self._folder):
            for part in self._parts(len(ids)):
                self._collection.delete(ids=list(ids[part]))

    def write(self, rows: Sequence[Row], vectors: np.ndarray) -> None:
        """Add chunks, or replace those with the same id. ``vectors`` has shape (rows, embedding dimension)."""
        with _explained(self._folder):
            for part in self._parts(len(rows)):
                self._collection.upsert(
                    ids=[row.id for row in rows[part]],
                    documents=[row.text for row in rows[part]],
                    metadatas=[dict(row.metadata) for row in rows[part]],
                    embeddings=vectors[part],
                )

    def rows(self) -> list[Row]:
        """Return all chunks, ordered by file and position."""
        with _explained(self._folder):
            result = self._collection.get(include=["documents", "metadatas"])
        columns = (result["ids"], result["documents"] or [], result["metadatas"] or [])
        rows = [Row(i, text, meta) for i, text, meta in zip(*columns, strict=True)]
        return sorted(rows, key=lambda row: (row.metadata["file"], row.metadata["chunk"]))

    def nearest(self, vector: np.ndarray, count: int) -> list[tuple[Row, float]]:
        """Return the ``count`` chunks nearest to ``vector`` with their cosine distances. Ties are ordered by id."""
        with _explained(self._folder):
            result = self._collection.query(
                query_embeddings=[vector], n_results=count, include=["documents", "metadatas", "distances"]
            )
        assert result["documents"] and result["metadatas"] and result["distances"]
        columns = (result["ids"][0], result["documents"][0], result["metadatas"][0], result["distances"][0])
        # Digits after the fifth depend on the batch in which a text was embedded.
        hits = [(Row(i, text, meta), max(0.0, round(far, 5))) for i, text, meta, far in zip(*columns, strict=True)]
        return sorted(hits, key=lambda hit: (hit[1], hit[0].id))

    def other_settings(self) -> list[dict[str, Any]]:
        """Return the settings of the other non-empty collections in the folder."""
        with _explained(self._folder):
            others = [c for c in self._client.list_collections() if c.name != self._name and c.count()]
        return [dict(other.metadata or {}) for other in others]

    def _parts(self, total: int) -> list[slice]:
        size = self._client.get_max_batch_size()
        return [slice(start, start + size) for start in range(0, total, size)]

    def _unlock(self) -> None:
        if self._lock is not None:
            self._lock.release()


def _stored_file(chunks: list[tuple[str, Mapping[str, Any]]]) -> StoredFile:
    digest = str(chunks[0][1]["digest"])
    complete = all(m["digest"] == digest and m["chunks"] == len(chunks) for _, m in chunks)
    return StoredFile(digest, tuple(chunk_id for chunk_id, _ in chunks), complete)


def _lock(folder: Path) -> FileLock:
    try:
        from filelock import FileLock, Timeout
    except ImportError as error:
        raise _missing(error) from error
    try:
        folder.mkdir(parents=True, exist_ok=True)
        names = {entry.name for entry in folder.iterdir()} - {LOCK_FILE}
        if names and DATABASE_FILE not in names:
            inside = [name for name in sorted(names) if (folder / name / DATABASE_FILE).is_file()]
            remedy = f"did you mean {str(folder / inside[0])!r}?" if inside else "use a new folder."
            raise RetrievalError(
                f"{str(folder)!r} is not an index: it contains {min(names)!r} but no {DATABASE_FILE}; {remedy}"
            )
        lock = FileLock(folder / LOCK_FILE)
        lock.acquire(timeout=LOCK_SECONDS)
    except Timeout as error:
        raise RetrievalError(
            f"the index {str(folder)!r} is in use by another process or another open index; retry when it is closed."
        ) from error
    except OSError as error:
        raise RetrievalError(f"the index {str(folder)!r} cannot be opened: {error.strerror}.") from error
    return lock


def _connect(folder: Path | None) -> Client:
    try:
        import chromadb
        from chromadb.api.client import Client
        from chromadb.config import Settings
    except ImportError as error:
        raise _missing(error) from error
    if folder is not None:
        _require_database(folder / DATABASE_FILE)
        client = chromadb.PersistentClient(folder, settings=Settings(anonymized_telemetry=False))
    else:
        # Chroma rejects in-memory clients with different settings in one process, so this one uses the defaults,
        # like other libraries. Chroma sends no telemetry since version 1.5.
        client = chromadb.EphemeralClient()
    assert isinstance(client, Client)  # the declared type lacks close()
    return client


def _require_database(path: Path) -> None:
    """Raise an error for a broken file. If Chroma failed on it, this process could not open the folder again."""
    if path.exists():
        with closing(sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True)) as database:
            database.execute("PRAGMA schema_version").fetchone()


def _missing(error: ImportError) -> MissingDependencyError:
    return MissingDependencyError(
        f'an index needs {error.name}, which is not installed: pip install "kvfusion-rag[rag]".'
    )


@contextmanager
def _explained(folder: Path | None) -> Generator[None, None, None]:
    """Turn errors of Chroma into a RetrievalError that names the remedy."""
    try:
        yield
    except MissingDependencyError:
        raise
    except (OSError, ValueError, sqlite3.Error, _chroma_error()) as error:
        cause = " ".join(str(error).split())[:300]
        where = "in memory" if folder is None else f"{str(folder)!r}"
        remedy = "" if folder is None else "; delete the folder to rebuild it"
        raise RetrievalError(f"the index {where} cannot be used: {cause}{remedy}.") from error


def _chroma_error() -> type[Exception]:
    try:
        from chromadb.errors import ChromaError
    except ImportError as error:
        raise _missing(error) from error
    return ChromaError
