"""The chunks of one index and their vectors in a SQLite database: a file in a folder, or memory.

A text is stored once, with one vector, and a place for each file that contains it. So a thousand copies of a page cost
and count as one. Searches compare all vectors, which is exact and takes milliseconds for a hundred thousand chunks.

Files are written in transactions, so an interrupted update leaves whole files only. Each row has a checksum, and each
collection the number and sum of them: whatever happens to the file, the index notices it when it is opened. SQLite
can be opened by several processes, but an update would not see another one, so a lock file allows only one.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import xxhash

from ..errors import RetrievalError
from ..text.json_text import parse_json

if TYPE_CHECKING:
    from filelock import FileLock

DATABASE_FILE = "index.sqlite3"
OLD_DATABASE_FILE = "chroma.sqlite3"  # written by version 0.1; may stay in the folder, and is not used
LOCK_FILE = "index.lock"
LOCK_SECONDS = 10.0

_TABLES = """
CREATE TABLE IF NOT EXISTS collection (name TEXT PRIMARY KEY, settings TEXT, rows INTEGER, checks INTEGER);
CREATE TABLE IF NOT EXISTS file (collection TEXT, name TEXT, digest TEXT, title TEXT, left_out TEXT, checked INTEGER,
    PRIMARY KEY (collection, name)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS span (collection TEXT, file TEXT, number INTEGER, key BLOB, start INTEGER, end INTEGER,
    at TEXT, checked INTEGER, PRIMARY KEY (collection, file, number)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS chunk (collection TEXT, key BLOB, title TEXT, text TEXT, vector BLOB, checked INTEGER,
    PRIMARY KEY (collection, key)) WITHOUT ROWID;
"""
_KEYS = {"file": ("name",), "span": ("file", "number"), "chunk": ("key",)}
# Errors of a sound database that cannot be used now. All others mean that the file is damaged.
_TRANSIENT = ("SQLITE_BUSY", "SQLITE_LOCKED", "SQLITE_READONLY", "SQLITE_CANTOPEN", "SQLITE_FULL", "SQLITE_PERM",
              "SQLITE_NOMEM", "SQLITE_AUTH", "SQLITE_INTERRUPT")  # fmt: skip


class DamagedIndexError(RetrievalError):
    """The database contains something else than what was written, for the reason ``cause``."""

    def __init__(self, folder: Path | None, cause: str) -> None:
        super().__init__(f"the index {str(folder)!r} is damaged ({cause}); index its files again.")
        self.cause = cause


@dataclass(frozen=True, slots=True, order=True)
class Place:
    """Where a text is: the ``number``-th chunk of a file, from 1, at these characters of the file's text.

    ``at`` names the place as a reader would: "page 12", or nothing.
    """

    file: str
    number: int
    key: bytes
    start: int
    end: int
    at: str = ""


@dataclass(frozen=True, slots=True)
class StoredFile:
    """One file: the digest of its bytes, its title, what was left out of its text, and its chunks."""

    name: str
    digest: str
    title: str
    left_out: tuple[str, ...]
    places: tuple[Place, ...]


@dataclass(frozen=True, slots=True)
class StoredChunk:
    """A distinct text. ``vector`` has shape (E,) and was computed with ``title``."""

    key: bytes
    title: str
    text: str
    vector: np.ndarray


def text_key(text: str) -> bytes:
    """Return the key under which a text is stored once."""
    return xxhash.xxh3_128_digest(text.encode("utf-8", "surrogatepass"))


class ChunkCollection:
    """Files, their chunks and the vectors of these, in one collection of a database.

    Args:
        folder: folder of the database, created if it is missing; ``None`` for memory.
        name: name of the collection in the folder.
        settings: stored with the collection and shown in error messages of indexes with other settings.

    Attributes:
        files: the stored files by name.
        damage: why the database was emptied when it was opened; ``None`` if it was sound.

    Raises:
        RetrievalError: the folder is in use, cannot be written, or contains other files.
    """

    files: dict[str, StoredFile]
    is_shared = False

    def __init__(self, folder: Path | None, name: str, settings: Mapping[str, str | int]) -> None:
        self._folder = folder
        self._name = name
        self._settings = json.dumps(settings)
        # An index and its documents can be moved together.
        self.base = folder.parent if folder else None
        self.damage: str | None = None
        self._lock = lock_folder(folder) if folder else None
        try:
            try:
                self._open()
            except DamagedIndexError as error:
                self.damage = error.cause
                self._remove_database()
                self._open()
        except BaseException:
            self._unlock()
            raise

    @property
    def location(self) -> str:
        """The folder, for messages."""
        return "in memory" if self._folder is None else str(self._folder)

    def __len__(self) -> int:
        return sum(map(len, self._places.values()))

    def keep_base(self, base: Path) -> None:
        """Do nothing. Only other processes would have to know the folder to which names are relative."""

    def close(self) -> None:
        """Release the folder, or discard the collection in memory."""
        self._database.close()
        self._unlock()

    def places(self, key: bytes) -> list[Place]:
        """Return all places of a text, ordered by file and number."""
        return sorted(self._places.get(key, ()))

    def title(self, key: bytes) -> str | None:
        """Return the title with which a text was embedded, or ``None`` if the text is not stored."""
        return self._titles.get(key)

    def text(self, key: bytes) -> str:
        """Return a stored text.

        Raises:
            RetrievalError: the text cannot be read, or is not what was written.
        """
        with self._explained():
            select = "SELECT text FROM chunk WHERE collection = ? AND key = ?"
            row = self._database.execute(select, (self._name, key)).fetchone()
            if row is None or text_key(row[0]) != key:
                raise DamagedIndexError(self._folder, "a stored text has changed")
        return row[0]

    def read(self, places: Sequence[Place]) -> list[tuple[str, str]]:
        """Return the title of the file and the text of each place.

        Raises:
            RetrievalError: see :meth:`text`.
        """
        return [(self.files[place.file].title, self.text(place.key)) for place in places]

    def nearest(self, vector: np.ndarray) -> Iterator[tuple[float, list[Place]]]:
        """Yield the places of all texts with their cosine distances to ``vector`` (E,), nearest first."""
        if not self._vectors:
            return
        if self._matrix is None:
            self._matrix = np.stack(list(self._vectors.values()))
        # Digits after the fifth depend on the batch in which a text was embedded.
        distances = np.maximum(np.round(1 - self._matrix @ vector, 5), 0.0)
        keys = list(self._vectors)
        for number in np.argsort(distances, kind="stable"):
            yield float(distances[number]), self.places(keys[number])

    def write(self, removed: Iterable[str], files: Sequence[StoredFile], chunks: Sequence[StoredChunk]) -> None:
        """Remove files, add others, and add the texts in them that are new or have another vector, all or nothing.

        Texts that are in no file any more are removed.
        """
        old = [self.files[name] for name in removed if name in self.files]
        orphans = self._orphans(old, files)
        with self._explained(), self._database:
            rows = _Rows(self._database, self._name, self._tally)
            for file in old:
                rows.delete("file", file.name)
                for place in file.places:
                    rows.delete("span", place.file, place.number)
            for key in (*orphans, *(chunk.key for chunk in chunks if chunk.key in self._titles)):
                rows.delete("chunk", key)
            for file in files:
                rows.insert("file", file.name, file.digest, file.title, json.dumps(file.left_out))
                for place in file.places:
                    rows.insert("span", *astuple(place))
            for chunk in chunks:
                rows.insert("chunk", chunk.key, chunk.title, chunk.text, chunk.vector.tobytes())
            self._database.execute(
                "INSERT OR REPLACE INTO collection VALUES (?, ?, ?, ?)", (self._name, self._settings, *rows.tally)
            )
        self._tally = rows.tally
        self._forget(old, orphans)
        for file in files:
            self._remember(file)
        for chunk in chunks:
            self._titles[chunk.key] = chunk.title
            self._vectors[chunk.key] = chunk.vector
        self._matrix = None

    def other_settings(self) -> list[str]:
        """Return the chunk size and embedding model of the other non-empty collections in the folder, in words.

        Raises:
            RetrievalError: they cannot be read, or are not what was written.
        """
        with self._explained():
            select = "SELECT settings FROM collection WHERE name != ? AND rows > 0 ORDER BY name"
            rows = self._database.execute(select, (self._name,)).fetchall()
        try:
            found = [parse_json(settings) for (settings,) in rows]
            return [f"{one['chunk_tokens']} tokens, {one['embedding_model']!r}" for one in found]
        except (ValueError, TypeError, KeyError) as error:
            raise DamagedIndexError(self._folder, "the settings of a collection have changed") from error

    def _orphans(self, removed: list[StoredFile], added: Sequence[StoredFile]) -> list[bytes]:
        """Return the keys of the texts that only ``removed`` files contain."""
        names = {file.name for file in removed}
        kept = {place.key for file in added for place in file.places}
        keys = {place.key for file in removed for place in file.places} - kept
        return [key for key in keys if all(place.file in names for place in self._places[key])]

    def _forget(self, files: list[StoredFile], orphans: list[bytes]) -> None:
        for file in files:
            del self.files[file.name]
            for place in file.places:
                self._places[place.key].discard(place)
        for key in orphans:
            del self._places[key], self._titles[key], self._vectors[key]

    def _remember(self, file: StoredFile) -> None:
        self.files[file.name] = file
        for place in file.places:
            self._places.setdefault(place.key, set()).add(place)

    def _open(self) -> None:
        """Open the database, and read and check everything in this collection except the texts.

        Raises:
            DamagedIndexError: something differs from what was written.
        """
        path = self._folder / DATABASE_FILE if self._folder else None
        if path is not None and path.exists() and not path.is_file():
            raise RetrievalError(f"{str(path)!r} is not a regular file, so the index cannot be opened.")
        if path is not None and path.exists() and path.stat().st_size == 0:
            raise DamagedIndexError(self._folder, "its file is empty")
        with self._explained():
            self._database = sqlite3.connect(path or ":memory:", check_same_thread=False)
            try:
                self._database.executescript(_TABLES)
                (problem,) = self._database.execute("PRAGMA quick_check(1)").fetchone()  # checks pages and their order
                if problem != "ok":
                    raise DamagedIndexError(self._folder, problem)
                self._load()
            except BaseException:
                self._database.close()
                raise

    def _load(self) -> None:
        rows = _Rows(self._database, self._name, (0, 0))
        self.files = {}
        self._places: dict[bytes, set[Place]] = {}
        self._titles: dict[bytes, str] = {}
        self._vectors: dict[bytes, np.ndarray] = {}
        self._matrix: np.ndarray | None = None
        places: dict[str, list[Place]] = {}
        for values in rows.checked("span"):
            places.setdefault(values[0], []).append(Place(*values))
        for name, digest, title, left_out in rows.checked("file"):
            self._remember(StoredFile(name, digest, title, tuple(json.loads(left_out)), tuple(places.get(name, ()))))
        for key, title, _, vector in rows.checked("chunk"):
            self._titles[key] = title
            self._vectors[key] = np.frombuffer(vector, dtype=np.float32)
        select = "SELECT rows, checks FROM collection WHERE name = ?"
        written = self._database.execute(select, (self._name,)).fetchone() or (0, 0)
        if written != rows.tally:
            cause = f"{written[0]} rows were written, but {rows.tally[0]} are left or they differ"
            raise DamagedIndexError(self._folder, cause)
        self._tally = rows.tally

    def _remove_database(self) -> None:
        assert self._folder is not None  # memory is never damaged
        for path in self._folder.glob(f"{DATABASE_FILE}*"):
            path.unlink()

    def _unlock(self) -> None:
        if self._lock is not None:
            self._lock.release()

    @contextmanager
    def _explained(self) -> Generator[None, None, None]:
        """Turn errors of SQLite into ours."""
        try:
            yield
        except (sqlite3.Error, OSError, UnicodeDecodeError) as error:  # SQLite's message may be damaged
            name = getattr(error, "sqlite_errorname", "")
            if isinstance(error, OSError) or name.startswith(_TRANSIENT):
                where = "in memory" if self._folder is None else repr(str(self._folder))
                raise RetrievalError(f"the index {where} cannot be used: {error}.") from error
            raise DamagedIndexError(self._folder, str(error)) from error


class _Rows:
    """The rows of one collection, each with a checksum, and the number and sum of these."""

    def __init__(self, database: sqlite3.Connection, collection: str, tally: tuple[int, int]) -> None:
        self._database = database
        self._collection = collection
        self.tally = tally

    def insert(self, table: str, *values: Any) -> None:
        check = _check(table, (self._collection, *values))
        marks = ", ".join("?" * (len(values) + 2))
        self._database.execute(f"INSERT INTO {table} VALUES ({marks})", (self._collection, *values, check))
        self.tally = (self.tally[0] + 1, self.tally[1] + check)

    def delete(self, table: str, *key: Any) -> None:
        columns = " AND ".join(f"{column} = ?" for column in ("collection", *_KEYS[table]))
        delete = f"DELETE FROM {table} WHERE {columns} RETURNING checked"
        for (check,) in self._database.execute(delete, (self._collection, *key)).fetchall():
            self.tally = (self.tally[0] - 1, self.tally[1] - check)

    def checked(self, table: str) -> Generator[tuple[Any, ...], None, None]:
        """Yield the values of all rows in a table, and count them.

        Raises:
            sqlite3.DatabaseError: a row has another checksum than when it was written.
        """
        select = f"SELECT * FROM {table} WHERE collection = ? ORDER BY {', '.join(_KEYS[table])}"
        for *row, check in self._database.execute(select, (self._collection,)):
            if check != _check(table, row):
                raise sqlite3.DatabaseError(f"a row of {table}s has changed")
            self.tally = (self.tally[0] + 1, self.tally[1] + check)
            yield tuple(row[1:])


def _check(table: str, values: Sequence[Any]) -> int:
    """Return a checksum of 32 bits, so that the sum of a billion of them fits into SQLite's integers."""
    check = xxhash.xxh32(table.encode())
    for value in values:
        check.update(value if isinstance(value, bytes) else repr(value).encode("utf-8", "surrogatepass"))
        check.update(b"\0")
    return check.intdigest()


def lock_folder(folder: Path) -> FileLock:
    """Create the folder of an index, and lock it for this process.

    Raises:
        RetrievalError: the folder is locked already, cannot be written, or contains other files.
    """
    from filelock import FileLock, Timeout

    try:
        folder.mkdir(parents=True, exist_ok=True)
        names = {entry.name for entry in folder.iterdir()} - {LOCK_FILE}
        if names and OLD_DATABASE_FILE not in names and not any(name.startswith(DATABASE_FILE) for name in names):
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
