"""What lies in a store folder, how large it is and when it was last used: a small SQLite file beside the documents.

It decides what leaves when a byte cap is reached, for all processes together. It is a convenience, never the truth:
what it says of a document is checked when the file is opened, and a damaged index is built anew from the files.
Every operation touches a bounded number of rows but for those that it removes.
"""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from .database import Database

SHORT_WAIT = 0.5  # seconds that others may hold the index, in the path of an answer
LONG_WAIT = 10.0  # and in maintenance
QUARANTINED = 4  # broken files that are kept
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
ASIDE = "quarantine"  # stands for a namespace, which no key has
EVERYWHERE = ""  # likewise


@dataclass(frozen=True, slots=True)
class Entry:
    """A file as the index knows it: its name, the namespace of its document (or ASIDE), bytes."""

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
        scan: all files there are, to build the index from.
        mode: permissions of the file.

    Raises:
        sqlite3.Error, OSError: from any method but ``touch`` and ``close``, when the file is held by others for too
            long or cannot be used.
    """

    def __init__(self, path: Path, scan: Callable[[], Iterable[Entry]], mode: int = 0o600) -> None:
        self._scan = scan
        self._touched: dict[str, None] = {}  # in the order of their last use
        self._flushed = time.monotonic()
        self._database = Database(path, _VERSION, self._fill, mode)
        self._database.run(lambda database: None, LONG_WAIT)

    def reserve(self, entry: Entry, caps: Caps, remove: Callable[[str], None]) -> int | None:
        """Make room for ``entry`` and count it, before it is written.

        Their files are removed before they are forgotten, so a process that dies here leaves nothing uncounted.

        Returns:
            How many documents were removed; ``None`` where the entry is larger than a cap.
        """
        own = caps.total if caps.namespace is None else min(caps.namespace, caps.total)
        if entry.bytes > own:
            return None

        def work(database: sqlite3.Connection) -> int:
            self._flush(database)
            self._delete(database, entry.name)
            removed = self._make_room(database, entry, caps, own, remove)
            self._insert(database, [entry])
            return removed

        return self._database.run(work, SHORT_WAIT)

    def confirm(self, name: str, remove: Callable[[str], None]) -> bool:
        """Whether a document that was just written is still counted; if not, it is removed.

        In one transaction with the removal, since a plain look could see what another process is about to change.
        """

        def work(database: sqlite3.Connection) -> bool:
            counted = database.execute("SELECT 1 FROM documents WHERE name = ?", (name,)).fetchone() is not None
            if not counted:
                remove(name)
            return counted

        return self._database.run(work, SHORT_WAIT)

    def remove(self, names: Iterable[str], remove: Callable[[str], None], *, wait: float = LONG_WAIT) -> None:
        """Remove files and their counts together."""
        names = list(names)

        def work(database: sqlite3.Connection) -> None:
            for name in names:
                remove(name)
                self._delete(database, name)

        self._database.run(work, wait)

    def put_aside(self, name: str, aside: Entry, move: Callable[[], None], remove: Callable[[str], None]) -> None:
        """Move a broken document out of the way, where it is counted still; the oldest of too many are removed."""

        def work(database: sqlite3.Connection) -> None:
            move()
            self._delete(database, name)
            self._delete(database, aside.name)  # an earlier one of the same document
            self._insert(database, [aside])
            query = "SELECT name FROM documents WHERE namespace = ? ORDER BY used DESC LIMIT -1 OFFSET ?"
            for (old,) in database.execute(query, (ASIDE, QUARANTINED)).fetchall():
                remove(old)
                self._delete(database, old)

        self._database.run(work, SHORT_WAIT)

    def names(self, beginning: str) -> list[str]:
        """Names of files that are counted, those that are just being written too."""
        query = "SELECT name FROM documents WHERE name >= ? AND name < ?"
        span = (beginning, beginning + "\U0010ffff")
        return self._database.run(lambda database: [name for (name,) in database.execute(query, span)], LONG_WAIT)

    def touch(self, name: str) -> None:
        """Note that a document was used; written down now and then and never waited for, so that reading is cheap."""
        self._touched.pop(name, None)
        self._touched[name] = None
        if len(self._touched) >= FLUSH_TOUCHES or time.monotonic() - self._flushed > FLUSH_SECONDS:
            try:
                self._database.run(self._flush, 0.0)
            except (OSError, sqlite3.Error):  # held by others, or no longer to be written; only an order is lost
                self._flushed = time.monotonic()

    def totals(self) -> dict[str, tuple[int, int]]:
        """Bytes and number of documents of each namespace."""
        query = "SELECT namespace, bytes, entries FROM totals WHERE entries > 0 AND namespace != ?"
        return self._database.run(
            lambda database: {row[0]: (row[1], row[2]) for row in database.execute(query, (ASIDE,))}, LONG_WAIT
        )

    def set_right(self) -> tuple[int, int]:
        """Count exactly the files that there are; how many were not counted, and how many counted ones are missing.

        A document that is being written meanwhile is no longer counted, which its writer notices.
        """

        def work(database: sqlite3.Connection) -> tuple[int, int]:
            counted = {name for (name,) in database.execute("SELECT name FROM documents")}
            there = {entry.name: entry for entry in self._scan()}
            for name in counted - there.keys():
                self._delete(database, name)
            self._insert(database, [entry for name, entry in there.items() if name not in counted])
            return len(there.keys() - counted), len(counted - there.keys())

        return self._database.run(work, LONG_WAIT)

    def close(self) -> None:
        """Close the connection, writing down what was used."""
        try:
            if self._touched:
                self._database.run(self._flush, SHORT_WAIT)
        except (OSError, sqlite3.Error):
            pass  # only the order of eviction is lost
        self._database.close()

    def _fill(self, database: sqlite3.Connection) -> None:
        for statement in _TABLES:
            database.execute(statement)
        self._insert(database, self._scan())

    def _make_room(
        self, database: sqlite3.Connection, entry: Entry, caps: Caps, own: int, remove: Callable[[str], None]
    ) -> int:
        """Let files leave until ``entry`` fits, those used longest ago first; how many documents that were.

        What was put aside goes first; then, where namespaces have a cap, documents of the entry's; then any.
        """
        total, mine = self._bytes(database, EVERYWHERE), self._bytes(database, entry.namespace)
        removed = 0
        for namespace in (ASIDE, entry.namespace, EVERYWHERE) if caps.namespace else (ASIDE, EVERYWHERE):
            is_own = namespace == entry.namespace
            while total + entry.bytes > caps.total or (is_own and mine + entry.bytes > own):
                oldest = self._oldest(database, namespace)
                if oldest is None:
                    break
                remove(oldest.name)
                self._delete(database, oldest.name)
                total -= oldest.bytes
                mine -= oldest.bytes if is_own else 0
                removed += namespace != ASIDE
        return removed

    def _insert(self, database: sqlite3.Connection, entries: Iterable[Entry]) -> None:
        now = self._tick(database)
        rows = [(e.name, e.namespace, e.bytes, now) for e in entries]
        database.executemany("INSERT OR IGNORE INTO documents VALUES (?, ?, ?, ?)", rows)

    def _flush(self, database: sqlite3.Connection) -> None:
        touched, self._touched, self._flushed = self._touched, {}, time.monotonic()
        for name in list(touched):  # a reader may be adding the last one
            database.execute("UPDATE documents SET used = ? WHERE name = ?", (self._tick(database), name))

    @staticmethod
    def _delete(database: sqlite3.Connection, name: str) -> None:
        database.execute("DELETE FROM documents WHERE name = ?", (name,))

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
