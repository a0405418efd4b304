"""What lies in a store folder, how large it is and when it was last used: a small SQLite file beside the documents.

It decides what leaves when a byte cap is reached, for all processes together. It is a convenience, never the truth:
what it says of a document is checked when the file is opened, and a damaged index is built anew from the files.
Every operation touches a bounded number of rows but for those that it removes.
"""

from __future__ import annotations

import os
import sqlite3
import threading
import time
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

SHORT_WAIT = 0.5  # seconds that another process may hold the index, in the path of an answer
LONG_WAIT = 10.0  # and in maintenance
FLUSH_TOUCHES, FLUSH_SECONDS = 64, 5.0  # uses of documents that are written down together
_VERSION = 1  # of what follows; kept in the file once it is filled
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
T = TypeVar("T")
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
    """The index of one folder, shared with other threads and processes. One connection a process, used in turn.

    Args:
        path: of the SQLite file; made if missing.
        scan: all documents there are, to build the index from.
        mode: permissions of the file.

    Raises:
        sqlite3.Error, OSError: from any method, when the file is held by others for too long or cannot be used.
    """

    def __init__(self, path: Path, scan: Callable[[], Iterable[Entry]], mode: int = 0o600) -> None:
        self._path, self._scan, self._mode = path, scan, mode
        self._inherited: list[sqlite3.Connection] = []
        self._database: sqlite3.Connection | None = None
        self._begin()
        in_child = weakref.WeakMethod(self._begin)
        os.register_at_fork(after_in_child=lambda: (begin := in_child()) and begin())
        self._run(lambda database: None, LONG_WAIT)

    def _begin(self) -> None:
        """Without connection: so at first, and in a forked process.

        A connection must not be used over a fork, nor closed: closing would take the locks of the parent's away.
        """
        if self._database is not None:
            self._inherited.append(self._database)
        self._database = None
        self._lock = threading.RLock()
        self._touched: dict[str, None] = {}  # in the order of their last use
        self._flushed = time.monotonic()

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

        def work(database: sqlite3.Connection) -> int:
            removed = 0
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

        return self._run(work, SHORT_WAIT)

    def confirm(self, name: str, remove: Callable[[str], None]) -> bool:
        """Whether a document that was just written is still counted; if not, it is removed.

        In one transaction with the removal, since a plain look could see what another process is about to change.
        """

        def work(database: sqlite3.Connection) -> bool:
            counted = database.execute("SELECT 1 FROM documents WHERE name = ?", (name,)).fetchone() is not None
            if not counted:
                remove(name)
            return counted

        return self._run(work, SHORT_WAIT)

    def remove(self, names: Iterable[str], remove: Callable[[str], None], *, wait: float = LONG_WAIT) -> None:
        """Remove documents, files and counts together."""

        def work(database: sqlite3.Connection) -> None:
            for name in names:
                remove(name)
                database.execute("DELETE FROM documents WHERE name = ?", (name,))

        names = list(names)
        self._run(work, wait)

    def names(self, beginning: str) -> list[str]:
        """Names of documents that are counted, those that are just being written too."""
        query = "SELECT name FROM documents WHERE name >= ? AND name < ?"
        span = (beginning, beginning + "\U0010ffff")
        return self._run(lambda database: [name for (name,) in database.execute(query, span)], LONG_WAIT)

    def touch(self, name: str) -> None:
        """Note that a document was used; written down now and then, so that reading stays cheap."""
        with self._lock:
            self._touched.pop(name, None)
            self._touched[name] = None
            due = len(self._touched) >= FLUSH_TOUCHES or time.monotonic() - self._flushed > FLUSH_SECONDS
        if due:
            try:
                self._run(self._flush, 0.0)
            except sqlite3.Error:
                self._flushed = time.monotonic()  # held by another process; the next time

    def totals(self) -> dict[str, tuple[int, int]]:
        """Bytes and number of documents of each namespace."""
        query = "SELECT namespace, bytes, entries FROM totals WHERE entries > 0"
        return self._run(lambda database: {row[0]: (row[1], row[2]) for row in database.execute(query)}, LONG_WAIT)

    def set_right(self) -> tuple[int, int]:
        """Count exactly the files that there are; how many were not counted, and how many counted ones are missing.

        A document that is being written meanwhile is no longer counted, which its writer notices.
        """

        def work(database: sqlite3.Connection) -> tuple[int, int]:
            counted = {name for (name,) in database.execute("SELECT name FROM documents")}
            there = {entry.name: entry for entry in self._scan()}
            for name in counted - there.keys():
                database.execute("DELETE FROM documents WHERE name = ?", (name,))
            self._insert(database, [entry for name, entry in there.items() if name not in counted])
            return len(there.keys() - counted), len(counted - there.keys())

        return self._run(work, LONG_WAIT)

    def close(self) -> None:
        """Close the connection, writing down what was used."""
        with self._lock:
            if self._database is None:
                return
            try:
                if self._touched:
                    self._run(self._flush, SHORT_WAIT)
            except sqlite3.Error:
                pass  # only the order of eviction is lost
            finally:
                self._disconnect()

    def _run(self, work: Callable[[sqlite3.Connection], T], wait: float) -> T:
        """``work`` in a transaction of its own; a damaged index is replaced, and it is done on the new one."""
        with self._lock:
            try:
                return self._transact(work, wait)
            except sqlite3.DatabaseError as error:
                if not _is_broken(error):
                    raise
            self._disconnect()
            if not self._is_whole():  # another process may have replaced it already
                self._disconnect()
                for suffix in ("", "-wal", "-shm", "-journal"):
                    Path(f"{self._path}{suffix}").unlink(missing_ok=True)
            return self._transact(work, wait)

    def _transact(self, work: Callable[[sqlite3.Connection], T], wait: float) -> T:
        database = self._connect()
        database.execute(f"PRAGMA busy_timeout = {round(1000 * wait)}")
        database.execute("BEGIN IMMEDIATE")
        try:
            if database.execute("PRAGMA user_version").fetchone()[0] != _VERSION:
                self._fill(database)  # a new file, or one whose maker died before it was filled
            outcome = work(database)
        except BaseException:
            if database.in_transaction:
                database.execute("ROLLBACK")
            raise
        database.execute("COMMIT")
        return outcome

    def _connect(self) -> sqlite3.Connection:
        if self._database is None:
            self._make()
            self._database = sqlite3.connect(
                self._path, timeout=LONG_WAIT, isolation_level=None, check_same_thread=False
            )
            self._database.execute("PRAGMA journal_mode = WAL")
            self._database.execute("PRAGMA synchronous = OFF")  # a lost index is built anew
        return self._database

    def _make(self) -> None:
        """An empty file with the right permissions, which SQLite gives its further files too."""
        try:
            place = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, self._mode)
        except FileExistsError:
            return
        try:
            os.fchmod(place, self._mode)  # whatever the umask says
        finally:
            os.close(place)

    def _disconnect(self) -> None:
        if self._database is not None:
            self._database.close()
        self._database = None

    def _is_whole(self) -> bool:
        try:
            return self._connect().execute("PRAGMA quick_check").fetchone()[0] == "ok"
        except sqlite3.DatabaseError:
            return False

    def _fill(self, database: sqlite3.Connection) -> None:
        for statement in _TABLES:
            database.execute(statement)
        self._insert(database, self._scan())
        database.execute(f"PRAGMA user_version = {_VERSION}")

    def _insert(self, database: sqlite3.Connection, entries: Iterable[Entry]) -> None:
        now = self._tick(database)
        rows = [(e.name, e.namespace, e.bytes, now) for e in entries]
        database.executemany("INSERT OR IGNORE INTO documents VALUES (?, ?, ?, ?)", rows)

    def _flush(self, database: sqlite3.Connection) -> None:
        touched, self._touched, self._flushed = self._touched, {}, time.monotonic()
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


def is_held(error: Exception) -> bool:
    """Whether another process held the index for too long."""
    return getattr(error, "sqlite_errorcode", None) == sqlite3.SQLITE_BUSY


def _is_broken(error: sqlite3.DatabaseError) -> bool:
    """Whether the file is damaged, as opposed to locked, read-only or on a full disk."""
    code = getattr(error, "sqlite_errorcode", None)
    return code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB) or type(error) is sqlite3.DatabaseError
