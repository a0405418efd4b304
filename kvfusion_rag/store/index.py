"""Sizes and last use of the files in a store folder, in a small SQLite file beside the documents.

The index decides which files are evicted when a cap is reached, for all processes together. It is not trusted: a
document's file is checked whenever it is opened, and a damaged or missing index is rebuilt from the files. It is
therefore never synced to the disk. Every transaction opens it by its path, so an index that another process has
replaced is noticed. Apart from removals, every operation touches a bounded number of rows.
"""

from __future__ import annotations

import os
import sqlite3
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from .size_limits import Caps

T = TypeVar("T")
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


# One transaction at a time in this process. A fork waits for it, because a child must not inherit an open connection:
# SQLite would mistake the parent's locks for the child's.
_lock = threading.Lock()
os.register_at_fork(before=_lock.acquire, after_in_parent=_lock.release, after_in_child=_lock.release)


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
        self._path, self._scan, self._unlink, self._mode = path, scan, unlink, mode
        self._touched: dict[str, None] = {}  # ordered by last use
        self._flushed = time.monotonic()
        self._run(lambda database: None, LONG_WAIT)

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

        return self._run(work, SHORT_WAIT)

    def confirm(self, name: str) -> bool:
        """Return whether a file that was just written is still counted, and remove it if not.

        Both happen in one transaction, because another process may be about to remove the row.
        """

        def work(database: sqlite3.Connection) -> bool:
            counted = database.execute("SELECT 1 FROM documents WHERE name = ?", (name,)).fetchone() is not None
            if not counted:
                self._unlink(name)
            return counted

        return self._run(work, SHORT_WAIT)

    def remove(self, names: Iterable[str], *, wait: float = LONG_WAIT) -> None:
        """Remove files together with their rows."""
        names = list(names)

        def work(database: sqlite3.Connection) -> None:
            for name in names:
                self._unlink(name)
                self._delete(database, name)

        self._run(work, wait)

    def names(self, beginning: str) -> list[str]:
        """Return the names of counted files that begin with ``beginning``, including files that are being written."""
        query = "SELECT name FROM documents WHERE name >= ? AND name < ?"
        span = (beginning, beginning + "\U0010ffff")
        return self._run(lambda database: [name for (name,) in database.execute(query, span)], LONG_WAIT)

    def touch(self, name: str) -> None:
        """Record that a file was used. Uses are written in batches and never waited for, so that reads stay cheap."""
        self._touched.pop(name, None)
        self._touched[name] = None
        if len(self._touched) >= FLUSH_TOUCHES or time.monotonic() - self._flushed > FLUSH_SECONDS:
            try:
                self._run(self._flush, 0.0)
            except (OSError, sqlite3.Error):  # only the order of eviction suffers
                self._flushed = time.monotonic()

    def totals(self) -> dict[str, tuple[int, int]]:
        """Return bytes and number of documents by namespace."""
        query = "SELECT namespace, bytes, entries FROM totals WHERE entries > 0"
        return self._run(lambda database: {row[0]: (row[1], row[2]) for row in database.execute(query)}, LONG_WAIT)

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

        return self._run(work, LONG_WAIT)

    def close(self) -> None:
        """Write the recorded uses."""
        try:
            if self._touched:
                self._run(self._flush, SHORT_WAIT)
        except (OSError, sqlite3.Error):
            pass  # only the order of eviction suffers

    def _run(self, work: Callable[[sqlite3.Connection], T], wait: float) -> T:
        """Call ``work`` in a transaction. If the index is damaged, rebuild it and call ``work`` on the new one."""
        if not _lock.acquire(timeout=wait):
            raise TimeoutError("the index is locked by another thread")
        try:
            try:
                return self._transact(work, wait)
            except sqlite3.DatabaseError as error:
                if not _is_damage(error):
                    raise
            for suffix in ("", "-journal"):
                Path(f"{self._path}{suffix}").unlink(missing_ok=True)
            return self._transact(work, wait)
        finally:
            _lock.release()

    def _transact(self, work: Callable[[sqlite3.Connection], T], wait: float) -> T:
        self._create()
        with closing(sqlite3.connect(self._path, timeout=wait, isolation_level=None)) as connection:
            connection.execute("PRAGMA synchronous = OFF")
            connection.execute("PRAGMA journal_mode = TRUNCATE")
            connection.execute("BEGIN IMMEDIATE")  # closing without a commit rolls back
            if connection.execute("PRAGMA user_version").fetchone()[0] != _VERSION:
                self._fill(connection)  # the file is new, or its creator died before filling it
                connection.execute(f"PRAGMA user_version = {_VERSION}")
            result = work(connection)
            connection.execute("COMMIT")
            return result

    def _create(self) -> None:
        """Create an empty file with the right permissions, which SQLite copies to its journal."""
        try:
            descriptor = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, self._mode)
        except FileExistsError:
            return
        try:
            os.fchmod(descriptor, self._mode)  # independent of the umask
        finally:
            os.close(descriptor)

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


def is_locked(error: Exception) -> bool:
    """Return whether another process or thread held the index for too long."""
    return isinstance(error, TimeoutError) or _code(error) == sqlite3.SQLITE_BUSY


def _is_damage(error: sqlite3.DatabaseError) -> bool:
    """Return whether the index is damaged, rather than locked, read-only or on a full disk."""
    return _code(error) in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB) or type(error) is sqlite3.DatabaseError


def _code(error: Exception) -> int:
    """Return SQLite's primary error code, without the extended code in its higher bits."""
    return getattr(error, "sqlite_errorcode", 0) & 0xFF
