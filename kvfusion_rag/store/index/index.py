"""Which files a store folder has, how large they are and when they were used, for eviction and totals.

All processes together keep the caps through the index. A file is counted before it is written and uncounted after it
is removed, so that a process that dies in between leaves no uncounted file. Only while another process holds the
index, files are written first and counted later.
"""

from __future__ import annotations

import logging
import sqlite3
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TypeVar

from ..folder import Entry, Folder
from ..format import namespace_of
from ..size_limits import Caps
from .database import DamagedError, Database, LockedError, is_locked

logger = logging.getLogger(__name__)
T = TypeVar("T")

SHORT_WAIT = 0.05  # seconds that an answer waits for a locked index, once until it is free again
LONG_WAIT = 10.0  # the same for maintenance
FLUSH_TOUCHES, FLUSH_SECONDS = 64, 5.0  # uses of documents that are written together
UNCOUNTED_SHARE = 16  # of the caps, one part of this many may be written while the index is locked
_LATEST = 1 << 62  # limit of the numbers that order uses

_TABLES = (
    f"""CREATE TABLE documents (
    name TEXT NOT NULL PRIMARY KEY CHECK (typeof(name) = 'text'),
    namespace TEXT NOT NULL CHECK (typeof(namespace) = 'text'),
    bytes INTEGER NOT NULL CHECK (typeof(bytes) = 'integer' AND bytes BETWEEN 0 AND {_LATEST}),
    used INTEGER NOT NULL CHECK (typeof(used) = 'integer' AND used BETWEEN 0 AND {_LATEST}),
    written INTEGER NOT NULL CHECK (written IN (0, 1))) WITHOUT ROWID""",
    "CREATE INDEX by_use ON documents (used)",
    "CREATE INDEX by_namespace_and_use ON documents (namespace, used)",
    """CREATE TABLE totals (
    namespace TEXT NOT NULL PRIMARY KEY, bytes INTEGER NOT NULL, entries INTEGER NOT NULL) WITHOUT ROWID""",
    """CREATE TRIGGER added AFTER INSERT ON documents BEGIN
    INSERT INTO totals VALUES (new.namespace, new.bytes, 1)
    ON CONFLICT (namespace) DO UPDATE SET bytes = bytes + new.bytes, entries = entries + 1; END""",
    """CREATE TRIGGER removed AFTER DELETE ON documents BEGIN
    UPDATE totals SET bytes = bytes - old.bytes, entries = entries - 1 WHERE namespace = old.namespace; END""",
)


class Index:
    """The index of one folder, shared with other threads and processes.

    Opening it checks it and compares it with the files. Apart from that, :meth:`recount`, :meth:`totals` and removals,
    every operation looks at a bounded number of rows.

    Args:
        path: SQLite file, created if missing.
        folder: the folder whose files are counted.
        caps: limits that all files together keep.
        mode: permissions of the SQLite file.

    Raises:
        sqlite3.Error, OSError: from every method except ``touch``, ``count_later`` and ``close``, if the index is
            locked for too long or unusable.
    """

    def __init__(self, path: Path, folder: Folder, caps: Caps, mode: int = 0o600) -> None:
        self._path, self._folder, self._caps = path, folder, caps
        self._database = Database(path, _TABLES, self._fill, _check, mode)
        self._touched: dict[str, None] = {}  # ordered by last use
        self._uncounted: dict[str, Entry] = {}  # written while the index was locked
        self._flushed = time.monotonic()
        self._is_busy = False  # held by another process at the last try
        self.evictions = 0
        self._run(self._open, LONG_WAIT)

    def reserve(self, entry: Entry) -> bool:
        """Evict files until ``entry``, which must not exceed a cap, fits, and count it before it is written.

        Returns:
            False if another process holds the index. The file may be written all the same: see :meth:`count_later`.

        Raises:
            LockedError: another process holds the index, and too many files are uncounted already.
        """
        try:
            self._run_soon(lambda database: self._count(database, entry, written=False))
        except (OSError, sqlite3.Error) as error:
            if not is_locked(error):
                raise
            waiting = sum(other.bytes for other in list(self._uncounted.values()))
            if waiting + entry.bytes > self._caps.largest // UNCOUNTED_SHARE:
                raise LockedError("the index has been locked for too long") from error
            return False
        return True

    def count_later(self, entry: Entry) -> None:
        """Count a file in the next transaction, if it still exists then."""
        self._uncounted[entry.name] = entry

    def confirm(self, entry: Entry) -> bool:
        """Return whether a reserved file that was just written is still counted, and remove it if not.

        Both happen in one transaction, because another process may be about to remove the row.
        """

        def work(database: sqlite3.Connection) -> bool:
            found = database.execute("UPDATE documents SET written = 1 WHERE name = ?", (entry.name,)).rowcount == 1
            if not found:
                self._folder.remove(entry.name)
            return found

        try:
            return self._run_soon(work)
        except (OSError, sqlite3.Error) as error:
            if not is_locked(error):
                raise
            self.count_later(entry)
            return True

    def remove(self, names: Iterable[str], *, soon: bool = False) -> None:
        """Remove files together with their rows. With ``soon``, do not wait long for a locked index."""
        names = list(names)

        def work(database: sqlite3.Connection) -> None:
            for name in names:
                self._remove(database, name)

        self._run_soon(work) if soon else self._run(work, LONG_WAIT)

    def names(self, beginning: str) -> list[str]:
        """Return the names of counted files that begin with ``beginning``, including files that are being written."""
        query = "SELECT name FROM documents WHERE name >= ? AND name < ?"

        def work(database: sqlite3.Connection) -> list[str]:
            names = [name for (name,) in database.execute(query, (beginning, beginning + "\U0010ffff"))]
            if None in map(namespace_of, names):
                raise DamagedError("it named other files")
            return names

        return self._run(work, LONG_WAIT)

    def touch(self, name: str) -> None:
        """Record that a file was used. Uses are written in batches and never waited for, so that reads stay cheap."""
        self._touched.pop(name, None)
        self._touched[name] = None
        if len(self._touched) >= FLUSH_TOUCHES or time.monotonic() - self._flushed > FLUSH_SECONDS:
            self._flush(0.0)

    def totals(self) -> dict[str, tuple[int, int]]:
        """Return bytes and number of documents by namespace."""
        return self._run(_true_totals, LONG_WAIT)

    def recount(self) -> tuple[int, int]:
        """Count exactly the files that exist. Return how many were not counted, and how many counted ones are gone.

        A document that is being written meanwhile loses its row, which its writer notices in :meth:`confirm`.
        """

        def work(database: sqlite3.Connection) -> tuple[int, int]:
            _check(database)
            return self._match_files(database, also_unwritten=True)

        return self._run(work, LONG_WAIT)

    def close(self) -> None:
        """Write the recorded uses, and count what was written while the index was locked."""
        if self._touched or self._uncounted:
            self._flush(SHORT_WAIT)

    def _run_soon(self, work: Callable[[sqlite3.Connection], T]) -> T:
        """Run ``work`` for an answer, which waits at most once while another process holds the index."""
        return self._run(work, 0.0 if self._is_busy else SHORT_WAIT)

    def _run(self, work: Callable[[sqlite3.Connection], T], wait: float) -> T:
        """Run ``work`` after what was postponed."""
        touched: list[str] = []
        uncounted: list[Entry] = []

        def postponed_and_work(database: sqlite3.Connection) -> T:
            touched[:], uncounted[:] = self._touched, self._uncounted.values()
            for name in touched:
                database.execute("UPDATE documents SET used = ? WHERE name = ?", (_next_use(database), name))
            for entry in uncounted:
                if self._folder.has(entry.name):
                    self._count(database, entry, written=True)
            return work(database)

        try:
            result = self._database.run(postponed_and_work, wait)
        except (OSError, sqlite3.Error) as error:
            self._is_busy = is_locked(error)
            raise
        for name in touched:
            self._touched.pop(name, None)
        for entry in uncounted:
            self._uncounted.pop(entry.name, None)
        self._is_busy, self._flushed = False, time.monotonic()
        return result

    def _flush(self, wait: float) -> None:
        try:
            self._run(lambda database: None, wait)
        except (OSError, sqlite3.Error):  # only the order of eviction suffers
            self._touched.clear()
            self._flushed = time.monotonic()

    def _open(self, database: sqlite3.Connection) -> None:
        _check(database)
        uncounted, missing = self._match_files(database)
        if uncounted or missing:
            logger.warning(
                "%s was corrected: %d files were not counted, and %d counted ones did not exist",
                self._path, uncounted, missing,
            )  # fmt: skip

    def _fill(self, database: sqlite3.Connection) -> int:
        entries = list(self._folder.scan())
        _insert(database, entries, written=True)
        return len(entries)

    def _match_files(self, database: sqlite3.Connection, *, also_unwritten: bool = False) -> tuple[int, int]:
        """Make the rows match the files. Return how many were not counted, and how many counted ones are gone.

        Args:
            database: an open transaction.
            also_unwritten: count files as gone too that other processes may just be writing.
        """
        counted: dict[str, int] = dict(database.execute("SELECT name, bytes FROM documents"))
        existing = {entry.name: entry for entry in self._folder.scan()}
        missing = counted.keys() - existing.keys()
        if not also_unwritten:
            missing -= {name for (name,) in database.execute("SELECT name FROM documents WHERE written = 0")}
        uncounted = [entry for name, entry in existing.items() if counted.get(name) != entry.bytes]
        for name in (*missing, *(entry.name for entry in uncounted)):
            _delete(database, name)
        _insert(database, uncounted, written=True)
        return len(uncounted), len(missing)

    def _count(self, database: sqlite3.Connection, entry: Entry, *, written: bool) -> None:
        """Evict files until ``entry`` fits, and insert its row."""
        _delete(database, entry.name)
        caps = self._caps
        if caps.namespace_bytes is not None:
            own, total = _bytes(database, entry.namespace), _bytes(database)
            excess = max(own + entry.bytes - caps.largest, total + entry.bytes - caps.max_bytes)
            self._evict(database, excess, entry.namespace)
        excess = _bytes(database) + entry.bytes - caps.max_bytes
        if self._evict(database, excess) < excess:
            raise DamagedError("its totals were wrong")
        _insert(database, [entry], written=written)

    def _evict(self, database: sqlite3.Connection, excess: int, namespace: str | None = None) -> int:
        """Remove the least recently used files, of one namespace if given, until ``excess`` bytes are free.

        Returns:
            The bytes that were freed, which are fewer if no file is left.
        """
        condition, values = ("", ()) if namespace is None else ("WHERE namespace = ?", (namespace,))
        query = f"SELECT name, bytes FROM documents {condition} ORDER BY used LIMIT 1"
        freed = 0
        while freed < excess:
            oldest = database.execute(query, values).fetchone()
            if oldest is None:
                break
            self._remove(database, oldest[0])
            freed += oldest[1]
            self.evictions += 1
        return freed

    def _remove(self, database: sqlite3.Connection, name: str) -> None:
        self._folder.remove(name)
        _delete(database, name)


def _check(database: sqlite3.Connection) -> None:
    """Raise DamagedError unless every row is a document and the totals are those of the rows."""
    (problem,) = database.execute("PRAGMA integrity_check(1)").fetchone()
    if problem != "ok":
        raise DamagedError(f"it was damaged ({problem})")
    for name, namespace in database.execute("SELECT name, namespace FROM documents"):
        if namespace_of(name) != namespace:
            raise DamagedError("it named other files")
    _true_totals(database)


def _true_totals(database: sqlite3.Connection) -> dict[str, tuple[int, int]]:
    """Return bytes and number of documents by namespace, or raise DamagedError if the totals say something else."""
    added = database.execute("SELECT namespace, SUM(bytes), COUNT(*) FROM documents GROUP BY namespace").fetchall()
    recorded = database.execute("SELECT * FROM totals WHERE bytes != 0 OR entries != 0").fetchall()
    if sorted(added) != sorted(recorded):
        raise DamagedError("its totals were wrong")
    return {namespace: (size, entries) for namespace, size, entries in added}


def _bytes(database: sqlite3.Connection, namespace: str | None = None) -> int:
    """Return the bytes of all documents, or of those of one namespace."""
    condition, values = ("", ()) if namespace is None else ("WHERE namespace = ?", (namespace,))
    return database.execute(f"SELECT COALESCE(SUM(bytes), 0) FROM totals {condition}", values).fetchone()[0]


def _insert(database: sqlite3.Connection, entries: Iterable[Entry], *, written: bool) -> None:
    used = _next_use(database)
    rows = [(entry.name, entry.namespace, entry.bytes, used, written) for entry in entries]
    database.executemany("INSERT OR IGNORE INTO documents VALUES (?, ?, ?, ?, ?)", rows)


def _delete(database: sqlite3.Connection, name: str) -> None:
    database.execute("DELETE FROM documents WHERE name = ?", (name,))


def _next_use(database: sqlite3.Connection) -> int:
    """Return a number above those of all uses so far. A real clock could jump."""
    latest = database.execute("SELECT COALESCE(MAX(used), 0) FROM documents").fetchone()[0]
    if latest >= _LATEST:
        raise DamagedError("its uses were numbered wrongly")
    return latest + 1
