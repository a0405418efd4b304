"""A SQLite file shared by threads, processes and their forks, and recreated if it is damaged or missing.

The contents can always be rebuilt. They are therefore never synced to the disk, and a file that another process has
replaced is simply opened again.
"""

from __future__ import annotations

import os
import sqlite3
import threading
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")


class _LockedByThread(sqlite3.OperationalError):
    sqlite_errorcode = sqlite3.SQLITE_BUSY


class Database:
    """One connection per process, used by one thread at a time.

    Args:
        path: SQLite file, created if missing.
        version: version of the contents, stored in the file once it is filled.
        fill: creates the contents within an open transaction.
        mode: permissions of the file.
    """

    def __init__(self, path: Path, version: int, fill: Callable[[sqlite3.Connection], None], mode: int) -> None:
        self._path, self._version, self._fill, self._mode = path, version, fill, mode
        self._connection: sqlite3.Connection | None = None
        self._opened: tuple[int, int] | None = None  # identity of the connected file
        self._lock = threading.Lock()
        with _forking:
            _databases.add(self)

    def run(self, work: Callable[[sqlite3.Connection], T], wait: float) -> T:
        """Call ``work`` in a transaction. If the file is damaged, replace it and call ``work`` on the new one.

        Raises:
            sqlite3.Error, OSError: the file is locked for longer than ``wait`` seconds, or is unusable.
        """
        if not self._lock.acquire(timeout=wait):
            raise _LockedByThread("database is locked by another thread")
        try:
            try:
                return self._transact(work, wait)
            except sqlite3.DatabaseError as error:
                if not _is_damage(error):
                    raise
            self._disconnect()
            if not self._is_intact(wait):  # otherwise another process has already replaced it
                self._disconnect()
                for suffix in ("", "-wal", "-shm", "-journal"):
                    Path(f"{self._path}{suffix}").unlink(missing_ok=True)
            return self._transact(work, wait)
        finally:
            self._lock.release()

    def close(self) -> None:
        """Close the connection. The next :meth:`run` opens it again."""
        with self._lock:
            self._disconnect()

    def before_fork(self) -> None:
        """Wait for the current transaction and close the connection.

        A connection must not survive a fork: SQLite would mistake the parent's locks for the child's.
        """
        self._lock.acquire()
        self._disconnect()

    def after_fork(self) -> None:
        self._lock.release()

    def _transact(self, work: Callable[[sqlite3.Connection], T], wait: float) -> T:
        connection = self._connect(wait)
        connection.execute(f"PRAGMA busy_timeout = {round(1000 * wait)}")
        connection.execute("BEGIN IMMEDIATE")
        try:
            if connection.execute("PRAGMA user_version").fetchone()[0] != self._version:
                self._fill(connection)  # the file is new, or its creator died before filling it
                connection.execute(f"PRAGMA user_version = {self._version}")
            result = work(connection)
        except BaseException:
            if connection.in_transaction:
                connection.execute("ROLLBACK")
            raise
        connection.execute("COMMIT")
        return result

    def _connect(self, wait: float) -> sqlite3.Connection:
        if self._connection is not None and self._opened != _identity(self._path):
            self._disconnect()  # another process has replaced the file
        if self._connection is None:
            self._create()
            self._opened = _identity(self._path)
            connection = sqlite3.connect(self._path, timeout=wait, isolation_level=None, check_same_thread=False)
            try:
                _enable_write_ahead_log(connection, wait)
                connection.execute("PRAGMA synchronous = OFF")
            except BaseException:
                connection.close()
                raise
            self._connection = connection
        return self._connection

    def _create(self) -> None:
        """Create an empty file with the right permissions, which SQLite copies to its auxiliary files."""
        try:
            descriptor = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, self._mode)
        except FileExistsError:
            return
        try:
            os.fchmod(descriptor, self._mode)  # independent of the umask
        finally:
            os.close(descriptor)

    def _disconnect(self) -> None:
        if self._connection is not None:
            self._connection.close()
        self._connection = None

    def _is_intact(self, wait: float) -> bool:
        try:
            return self._connect(wait).execute("PRAGMA quick_check").fetchone()[0] == "ok"
        except sqlite3.DatabaseError:
            return False


def _enable_write_ahead_log(connection: sqlite3.Connection, wait: float) -> None:
    """Let readers and a writer work at the same time.

    SQLite ignores its own time-out if two processes set this at the same moment, so this function retries.
    """
    end = time.monotonic() + wait
    while True:
        try:
            connection.execute("PRAGMA journal_mode = WAL")
            return
        except sqlite3.OperationalError as error:
            if not is_locked(error) or time.monotonic() >= end:
                raise
        time.sleep(0.01)


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


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        status = path.stat()
    except FileNotFoundError:
        return None
    return status.st_dev, status.st_ino


_databases: weakref.WeakSet[Database] = weakref.WeakSet()
_forking = threading.Lock()  # no database is created while the process forks


def _before_fork() -> None:
    _forking.acquire()
    for database in _databases:
        database.before_fork()


def _after_fork() -> None:
    for database in _databases:
        database.after_fork()
    _forking.release()


os.register_at_fork(before=_before_fork, after_in_parent=_after_fork, after_in_child=_after_fork)
