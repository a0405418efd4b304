"""Sizes and last use of the files in a store folder, in a small SQLite file beside the documents.

The index decides which files are evicted when a cap is reached, for all processes together. It is not trusted: a
document's file is checked whenever it is opened, and a damaged index is rebuilt from the files. Apart from removals,
every operation touches a bounded number of rows.
"""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from ..errors import InvalidInputError
from .database import Database

SHORT_WAIT = 0.5  # seconds to wait for a locked index while an answer needs the store
LONG_WAIT = 10.0  # the same for maintenance
FLUSH_TOUCHES, FLUSH_SECONDS = 64, 5.0  # uses of documents that are written together
_VERSION = 2
_TABLES = (
    """CREATE TABLE IF NOT EXISTS documents (
    name TEXT PRIMARY KEY, namespace TEXT NOT NULL, bytes INTEGER NOT NULL, used INTEGER NOT NULL) WITHOUT ROWID""",
    "CREATE INDEX IF NOT EXISTS by_use ON documents (used)",
    "CREATE INDEX IF NOT EXISTS by_namespace_use ON documents (namespace, used)",
    "CREATE TABLE IF NOT EXISTS totals (namespace TEXT PRIMARY KEY, bytes INTEGER NOT NULL, entries INTEGER NOT NULL)",
    "CREATE TABLE IF NOT EXISTS clock (one INTEGER PRIMARY KEY CHECK (one = 1), now INTEGER NOT NULL)",
    "INSERT OR IGNORE INTO clock VALUES (1, 0)",
    """CREATE TRIGGER IF NOT EXISTS added AFTER INSERT ON documents BEGIN
    INSERT INTO totals VALUES (new.namespace, new.bytes, 1)
    ON CONFLICT (namespace) DO UPDATE SET bytes = bytes + new.bytes, entries = entries + 1; END""",
    """CREATE TRIGGER IF NOT EXISTS removed AFTER DELETE ON documents BEGIN
    UPDATE totals SET bytes = bytes - old.bytes, entries = entries - 1 WHERE namespace = old.namespace; END""",
)


@dataclass(frozen=True, slots=True)
class Entry:
    """A file in the index.

    Attributes:
        name: path relative to the store folder.
        namespace: namespace part of the document's key.
        bytes: size of the file.
    """

    name: str
    namespace: str
    bytes: int


@dataclass(frozen=True, slots=True)
class Caps:
    """Limits of a tier in bytes.

    Attributes:
        max_bytes: limit on all documents together.
        namespace_bytes: limit on each namespace, or None if only ``max_bytes`` applies. With this limit, a full tier
            evicts documents of the writer's own namespace first, and those of others only if none is left.

    Raises:
        InvalidInputError: a limit is not a whole number from 1.
    """

    max_bytes: int
    namespace_bytes: int | None = None

    def __post_init__(self) -> None:
        require_bytes("max_bytes", self.max_bytes)
        if self.namespace_bytes is not None:
            require_bytes("namespace_bytes", self.namespace_bytes)

    @property
    def largest(self) -> int:
        """Bytes that documents of one namespace may take."""
        return self.max_bytes if self.namespace_bytes is None else min(self.namespace_bytes, self.max_bytes)


def require_bytes(name: str, value: object) -> None:
    """Raise InvalidInputError if ``value`` is not a whole number from 1."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise InvalidInputError(f"{name} is {value!r}, but it must be a whole number of bytes from 1.")


def add_up(sizes: Iterable[tuple[str, int]]) -> dict[str, tuple[int, int]]:
    """Return bytes and number of documents by namespace, from the namespace and size of each document."""
    totals: dict[str, tuple[int, int]] = {}
    for namespace, size in sizes:
        total, count = totals.get(namespace, (0, 0))
        totals[namespace] = (total + size, count + 1)
    return totals


class Index:
    """The index of one folder, shared with other threads and processes.

    Args:
        path: SQLite file, created if missing.
        scan: lists all files in the folder, to build the index.
        unlink: removes a file by its name, and accepts that it is gone already.
        mode: permissions of the SQLite file.

    Raises:
        sqlite3.Error, OSError: from every method except ``touch`` and ``close``, if the index is locked for too long
            or unusable.
    """

    def __init__(
        self, path: Path, scan: Callable[[], Iterable[Entry]], unlink: Callable[[str], None], mode: int = 0o600
    ) -> None:
        self._scan, self._unlink = scan, unlink
        self._touched: dict[str, None] = {}  # ordered by last use
        self._flushed = time.monotonic()
        self._database = Database(path, _VERSION, self._fill, mode)
        self._database.run(lambda database: None, LONG_WAIT)

    def reserve(self, entry: Entry, caps: Caps) -> int | None:
        """Evict files until ``entry`` fits, and count it before it is written.

        Files are removed before their rows, so a process that dies in between leaves no uncounted file.

        Returns:
            The number of evicted documents, or None if the entry is larger than a cap.
        """
        if entry.bytes > caps.largest:
            return None

        def work(database: sqlite3.Connection) -> int:
            self._flush(database)
            self._delete(database, entry.name)
            evicted = self._make_room(database, entry, caps)
            self._insert(database, [entry])
            return evicted

        return self._database.run(work, SHORT_WAIT)

    def confirm(self, name: str) -> bool:
        """Return whether a file that was just written is still counted, and remove it if not.

        Both happen in one transaction, because another process may be about to remove the row.
        """

        def work(database: sqlite3.Connection) -> bool:
            counted = database.execute("SELECT 1 FROM documents WHERE name = ?", (name,)).fetchone() is not None
            if not counted:
                self._unlink(name)
            return counted

        return self._database.run(work, SHORT_WAIT)

    def remove(self, names: Iterable[str], *, wait: float = LONG_WAIT) -> None:
        """Remove files together with their rows."""
        names = list(names)

        def work(database: sqlite3.Connection) -> None:
            for name in names:
                self._unlink(name)
                self._delete(database, name)

        self._database.run(work, wait)

    def names(self, beginning: str) -> list[str]:
        """Return the names of counted files that begin with ``beginning``, including files that are being written."""
        query = "SELECT name FROM documents WHERE name >= ? AND name < ?"
        span = (beginning, beginning + "\U0010ffff")
        return self._database.run(lambda database: [name for (name,) in database.execute(query, span)], LONG_WAIT)

    def touch(self, name: str) -> None:
        """Record that a file was used. Uses are written in batches and never waited for, so that reads stay cheap."""
        self._touched.pop(name, None)
        self._touched[name] = None
        if len(self._touched) >= FLUSH_TOUCHES or time.monotonic() - self._flushed > FLUSH_SECONDS:
            try:
                self._database.run(self._flush, 0.0)
            except (OSError, sqlite3.Error):  # only the order of eviction suffers
                self._flushed = time.monotonic()

    def totals(self) -> dict[str, tuple[int, int]]:
        """Return bytes and number of documents by namespace."""
        query = "SELECT namespace, bytes, entries FROM totals WHERE entries > 0"
        return self._database.run(
            lambda database: {row[0]: (row[1], row[2]) for row in database.execute(query)}, LONG_WAIT
        )

    def repair(self) -> tuple[int, int]:
        """Count exactly the files that exist. Return how many were not counted, and how many counted ones are gone.

        A document that is being written meanwhile loses its row, which its writer notices in :meth:`confirm`.
        """

        def work(database: sqlite3.Connection) -> tuple[int, int]:
            counted = {name for (name,) in database.execute("SELECT name FROM documents")}
            existing = {entry.name: entry for entry in self._scan()}
            for name in counted - existing.keys():
                self._delete(database, name)
            self._insert(database, [entry for name, entry in existing.items() if name not in counted])
            return len(existing.keys() - counted), len(counted - existing.keys())

        return self._database.run(work, LONG_WAIT)

    def close(self) -> None:
        """Write the recorded uses."""
        try:
            if self._touched:
                self._database.run(self._flush, SHORT_WAIT)
        except (OSError, sqlite3.Error):
            pass  # only the order of eviction suffers

    def _fill(self, database: sqlite3.Connection) -> None:
        for statement in _TABLES:
            database.execute(statement)
        self._insert(database, self._scan())

    def _make_room(self, database: sqlite3.Connection, entry: Entry, caps: Caps) -> int:
        """Evict the least recently used files until ``entry`` fits. Return the number of evicted files."""
        total = database.execute("SELECT COALESCE(SUM(bytes), 0) FROM totals").fetchone()[0]
        row = database.execute("SELECT bytes FROM totals WHERE namespace = ?", (entry.namespace,)).fetchone()
        own = 0 if row is None else row[0]
        evicted = 0
        for is_own in (True, False) if caps.namespace_bytes else (False,):
            condition, values = ("WHERE namespace = ?", (entry.namespace,)) if is_own else ("", ())
            query = f"SELECT name, bytes FROM documents {condition} ORDER BY used LIMIT 1"
            while total + entry.bytes > caps.max_bytes or (is_own and own + entry.bytes > caps.largest):
                oldest = database.execute(query, values).fetchone()
                if oldest is None:
                    break
                name, size = oldest
                self._unlink(name)
                self._delete(database, name)
                total -= size
                own -= size if is_own else 0
                evicted += 1
        return evicted

    def _insert(self, database: sqlite3.Connection, entries: Iterable[Entry]) -> None:
        now = self._tick(database)
        rows = [(entry.name, entry.namespace, entry.bytes, now) for entry in entries]
        database.executemany("INSERT OR IGNORE INTO documents VALUES (?, ?, ?, ?)", rows)

    def _flush(self, database: sqlite3.Connection) -> None:
        touched, self._touched, self._flushed = self._touched, {}, time.monotonic()
        for name in list(touched):  # a copy, because a reader may be adding the last one
            database.execute("UPDATE documents SET used = ? WHERE name = ?", (self._tick(database), name))

    @staticmethod
    def _delete(database: sqlite3.Connection, name: str) -> None:
        database.execute("DELETE FROM documents WHERE name = ?", (name,))

    @staticmethod
    def _tick(database: sqlite3.Connection) -> int:
        """Return a number that grows with every use. A real clock could jump."""
        database.execute("UPDATE clock SET now = now + 1")
        return database.execute("SELECT now FROM clock").fetchone()[0]
