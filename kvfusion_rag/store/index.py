"""What lies in a store folder, how large it is and when it was last used: a small SQLite file beside the documents.

It decides what leaves when a byte cap is reached, for all processes together. It is a convenience, never the truth:
what it says of a document is checked when the file is opened, and a broken index is built anew from the files.
Every operation touches a bounded number of rows but for those that it removes.
"""

from __future__ import annotations

import os
import sqlite3
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

BUSY_SECONDS = 10.0  # how long another process may hold the index
_SCHEMA = """
CREATE TABLE IF NOT EXISTS documents (
    name TEXT PRIMARY KEY, namespace TEXT NOT NULL, bytes INTEGER NOT NULL, used INTEGER NOT NULL) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS by_use ON documents (used);
CREATE INDEX IF NOT EXISTS by_namespace_use ON documents (namespace, used);
CREATE TABLE IF NOT EXISTS totals (namespace TEXT PRIMARY KEY, bytes INTEGER NOT NULL, entries INTEGER NOT NULL);
CREATE TABLE IF NOT EXISTS clock (one INTEGER PRIMARY KEY CHECK (one = 1), now INTEGER NOT NULL);
INSERT OR IGNORE INTO clock VALUES (1, 0);
CREATE TRIGGER IF NOT EXISTS added AFTER INSERT ON documents BEGIN
    INSERT INTO totals VALUES (new.namespace, new.bytes, 1)
    ON CONFLICT (namespace) DO UPDATE SET bytes = bytes + new.bytes, entries = entries + 1; END;
CREATE TRIGGER IF NOT EXISTS removed AFTER DELETE ON documents BEGIN
    UPDATE totals SET bytes = bytes - old.bytes, entries = entries - 1 WHERE namespace = old.namespace; END;
"""
EVERYWHERE = ""  # no namespace of a key is empty


@dataclass(frozen=True, slots=True)
class Entry:
    """A document as the index knows it: the name of its file, namespace, bytes."""

    name: str
    namespace: str
    bytes: int


@dataclass(frozen=True, slots=True)
class Caps:
    """Most bytes of the whole store, and of each namespace (``None``: no limit of its own)."""

    total: int
    namespace: int | None = None


class Index:
    """The index of one folder, shared with other threads and processes.

    Args:
        path: of the SQLite file; made if missing.
        scan: all documents there are, to build the index from.

    Raises:
        sqlite3.Error, OSError: from any method, when the file cannot be used; :meth:`rebuild` may help.
    """

    def __init__(self, path: Path, scan: Callable[[], Iterable[Entry]]) -> None:
        self._path, self._scan = path, scan
        self._local = threading.local()
        self._lock = threading.Lock()
        self._touched: dict[str, None] = {}  # in the order of their last use
        try:
            database = self._connect()
            fresh = database.execute("SELECT 1 FROM sqlite_master WHERE name = 'documents'").fetchone() is None
            database.executescript(_SCHEMA)
        except sqlite3.DatabaseError as error:
            if not _is_broken(error):
                raise
            self.rebuild()
        else:
            if fresh:
                self._fill()

    def reserve(self, entry: Entry, caps: Caps, remove: Callable[[str], None]) -> int | None:
        """Make room for ``entry`` and count it, before it is written.

        Documents used longest ago leave first: those of its namespace as far as its own cap asks, then any. Their
        files are removed before they are forgotten, so a process that dies here leaves nothing uncounted.

        Returns:
            How many were removed; ``None`` where the entry is larger than a cap.
        """
        limits = [(caps.namespace, entry.namespace), (caps.total, EVERYWHERE)]
        if any(cap is not None and entry.bytes > cap for cap, _ in limits):
            return None
        removed = 0
        with self._transaction() as database:
            self._flush(database)
            database.execute("DELETE FROM documents WHERE name = ?", (entry.name,))
            for cap, namespace in limits:
                if cap is None:
                    continue
                used = self._bytes(database, namespace)
                while used + entry.bytes > cap:
                    oldest = self._oldest(database, namespace)
                    if oldest is None:
                        break
                    remove(oldest.name)
                    database.execute("DELETE FROM documents WHERE name = ?", (oldest.name,))
                    used -= oldest.bytes
                    removed += 1
            values = (entry.name, entry.namespace, entry.bytes, self._tick(database))
            database.execute("INSERT INTO documents VALUES (?, ?, ?, ?)", values)
        return removed

    def holds(self, name: str) -> bool:
        """Whether a document is counted; one that is not was removed by another process meanwhile."""
        return self._connect().execute("SELECT 1 FROM documents WHERE name = ?", (name,)).fetchone() is not None

    def remove(self, names: Iterable[str], remove: Callable[[str], None]) -> None:
        """Remove documents, files and counts together, so that nobody writes one anew in between."""
        with self._transaction() as database:
            for name in names:
                remove(name)
                database.execute("DELETE FROM documents WHERE name = ?", (name,))

    def touch(self, name: str) -> None:
        """Note that a document was used; written down with the next change, so that reading stays cheap."""
        with self._lock:
            self._touched.pop(name, None)
            self._touched[name] = None

    def totals(self) -> dict[str, tuple[int, int]]:
        """Bytes and number of documents of each namespace."""
        rows = self._connect().execute("SELECT namespace, bytes, entries FROM totals WHERE entries > 0")
        return {namespace: (size, entries) for namespace, size, entries in rows}

    def entries(self) -> list[Entry]:
        return [Entry(*row) for row in self._connect().execute("SELECT name, namespace, bytes FROM documents")]

    def rebuild(self) -> None:
        """Throw the index away and make it anew from the files."""
        self.close()
        for suffix in ("", "-wal", "-shm", "-journal"):
            Path(f"{self._path}{suffix}").unlink(missing_ok=True)
        self._connect().executescript(_SCHEMA)
        self._fill()

    def close(self) -> None:
        """Close this thread's connection, writing down what was used."""
        database = getattr(self._local, "database", None)
        if database is None:
            return
        self._local.database = None
        try:
            with self._lock:
                touched = bool(self._touched)
            if touched:
                self._local.database = database
                with self._transaction() as open_database:
                    self._flush(open_database)
        except sqlite3.Error:
            pass  # only the order of eviction is lost
        finally:
            self._local.database = None
            database.close()

    def _connect(self) -> sqlite3.Connection:
        """This thread's connection; a forked process opens its own."""
        owner = (os.getpid(), threading.get_ident())
        if getattr(self._local, "owner", None) != owner or self._local.database is None:
            database = sqlite3.connect(self._path, timeout=BUSY_SECONDS, isolation_level=None)
            database.execute("PRAGMA journal_mode = WAL")
            database.execute("PRAGMA synchronous = OFF")  # a lost index is built anew
            self._local.database, self._local.owner = database, owner
        return self._local.database

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        database = self._connect()
        database.execute("BEGIN IMMEDIATE")
        try:
            yield database
        except BaseException:
            database.execute("ROLLBACK")
            raise
        database.execute("COMMIT")

    def _fill(self) -> None:
        with self._transaction() as database:
            now = self._tick(database)
            database.executemany(
                "INSERT OR IGNORE INTO documents VALUES (?, ?, ?, ?)",
                [(e.name, e.namespace, e.bytes, now) for e in self._scan()],
            )

    def _flush(self, database: sqlite3.Connection) -> None:
        with self._lock:
            touched, self._touched = self._touched, {}
        for name in touched:
            database.execute("UPDATE documents SET used = ? WHERE name = ?", (self._tick(database), name))

    @staticmethod
    def _tick(database: sqlite3.Connection) -> int:
        """A number that grows with every use; no clock, which may jump."""
        database.execute("UPDATE clock SET now = now + 1")
        return database.execute("SELECT now FROM clock").fetchone()[0]

    @staticmethod
    def _bytes(database: sqlite3.Connection, namespace: str) -> int:
        if namespace == EVERYWHERE:
            return database.execute("SELECT COALESCE(SUM(bytes), 0) FROM totals").fetchone()[0]
        row = database.execute("SELECT bytes FROM totals WHERE namespace = ?", (namespace,)).fetchone()
        return 0 if row is None else row[0]

    @staticmethod
    def _oldest(database: sqlite3.Connection, namespace: str) -> Entry | None:
        query = "SELECT name, namespace, bytes FROM documents"
        if namespace == EVERYWHERE:
            row = database.execute(f"{query} ORDER BY used LIMIT 1").fetchone()
        else:
            row = database.execute(f"{query} WHERE namespace = ? ORDER BY used LIMIT 1", (namespace,)).fetchone()
        return None if row is None else Entry(*row)


def _is_broken(error: sqlite3.DatabaseError) -> bool:
    """Whether the file is damaged, as opposed to locked, read-only or on a full disk."""
    return error.sqlite_errorcode in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB) or type(error) is (
        sqlite3.DatabaseError
    )
