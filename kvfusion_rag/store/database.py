"""A SQLite file shared by threads, processes and their forks, and recreated if it is damaged or missing.

Every transaction opens the file by its path, so a file that another process has replaced is noticed. The contents can
always be rebuilt and are therefore never synced to the disk.
"""

from __future__ import annotations

import os
import sqlite3
import threading
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")

# One transaction at a time in this process. A fork waits for it, because a child must not inherit an open connection:
# SQLite would mistake the parent's locks for the child's.
_lock = threading.Lock()
os.register_at_fork(before=_lock.acquire, after_in_parent=_lock.release, after_in_child=_lock.release)


class _LockedByThread(sqlite3.OperationalError):
    sqlite_errorcode = sqlite3.SQLITE_BUSY


class Database:
    """A SQLite file.

    Args:
        path: the file, created if missing.
        version: version of the contents, stored in the file once it is filled.
        fill: creates the contents within an open transaction.
        mode: permissions of the file.
    """

    def __init__(self, path: Path, version: int, fill: Callable[[sqlite3.Connection], None], mode: int) -> None:
        self._path, self._version, self._fill, self._mode = path, version, fill, mode

    def run(self, work: Callable[[sqlite3.Connection], T], wait: float) -> T:
        """Call ``work`` in a transaction. If the file is damaged, replace it and call ``work`` on the new one.

        Raises:
            sqlite3.Error, OSError: the file is locked for longer than ``wait`` seconds, or is unusable.
        """
        if not _lock.acquire(timeout=wait):
            raise _LockedByThread("database is locked by another thread")
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
            if connection.execute("PRAGMA user_version").fetchone()[0] != self._version:
                self._fill(connection)  # the file is new, or its creator died before filling it
                connection.execute(f"PRAGMA user_version = {self._version}")
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


def is_locked(error: Exception) -> bool:
    """Return whether another process or thread held the file for too long."""
    return _code(error) == sqlite3.SQLITE_BUSY


def _is_damage(error: sqlite3.DatabaseError) -> bool:
    """Return whether the file is damaged, rather than locked, read-only or on a full disk."""
    return _code(error) in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB) or type(error) is sqlite3.DatabaseError


def _code(error: Exception) -> int | None:
    """Return SQLite's primary error code, without the extended code in its higher bits."""
    code = getattr(error, "sqlite_errorcode", None)
    return None if code is None else code & 0xFF
