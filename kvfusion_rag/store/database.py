"""A SQLite file that threads, processes and their forks share, and that is made anew where it is damaged or gone.

It keeps what can be made again: nothing is synced, and a file that another process puts in its place is gone on with.
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


class _Held(sqlite3.OperationalError):
    """Another thread of this process uses the file for too long."""

    sqlite_errorcode = sqlite3.SQLITE_BUSY


class Database:
    """One connection a process, used by its threads in turn.

    Args:
        path: of the file; made if missing.
        version: of its contents; kept in the file once it is filled.
        fill: make the contents, in the transaction that it is called in.
        mode: permissions of the file.
    """

    def __init__(self, path: Path, version: int, fill: Callable[[sqlite3.Connection], None], mode: int) -> None:
        self._path, self._version, self._fill, self._mode = path, version, fill, mode
        self._connection: sqlite3.Connection | None = None
        self._opened: tuple[int, int] | None = None  # the file that it is connected to
        self._lock = threading.Lock()
        with _forking:
            _living.add(self)

    def run(self, work: Callable[[sqlite3.Connection], T], wait: float) -> T:
        """``work`` in a transaction of its own; a damaged file is replaced, and it is done on the new one.

        Raises:
            sqlite3.Error, OSError: others use the file for longer than ``wait`` seconds, or it cannot be used.
        """
        if not self._lock.acquire(timeout=wait):
            raise _Held("database is locked by another thread")
        try:
            try:
                return self._transact(work, wait)
            except sqlite3.DatabaseError as error:
                if not _is_broken(error):
                    raise
            self._disconnect()
            if not self._is_whole(wait):  # another process may have replaced it already
                self._disconnect()
                for suffix in ("", "-wal", "-shm", "-journal"):
                    Path(f"{self._path}{suffix}").unlink(missing_ok=True)
            return self._transact(work, wait)
        finally:
            self._lock.release()

    def close(self) -> None:
        """Close the connection; it is opened again when it is needed."""
        with self._lock:
            self._disconnect()

    def before_fork(self) -> None:
        """Wait for the transaction under way and close the connection.

        A connection must not be carried over a fork: SQLite would take the locks of the parent's for the child's.
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
                self._fill(connection)  # a new file, or one whose maker died before it was filled
                connection.execute(f"PRAGMA user_version = {self._version}")
            outcome = work(connection)
        except BaseException:
            if connection.in_transaction:
                connection.execute("ROLLBACK")
            raise
        connection.execute("COMMIT")
        return outcome

    def _connect(self, wait: float) -> sqlite3.Connection:
        if self._connection is not None and self._opened != _identity(self._path):
            self._disconnect()  # another process has replaced the file
        if self._connection is None:
            self._make()
            self._opened = _identity(self._path)
            connection = sqlite3.connect(self._path, timeout=wait, isolation_level=None, check_same_thread=False)
            try:
                _use_log(connection, wait)
                connection.execute("PRAGMA synchronous = OFF")
            except BaseException:
                connection.close()
                raise
            self._connection = connection
        return self._connection

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
        if self._connection is not None:
            self._connection.close()
        self._connection = None

    def _is_whole(self, wait: float) -> bool:
        try:
            return self._connect(wait).execute("PRAGMA quick_check").fetchone()[0] == "ok"
        except sqlite3.DatabaseError:
            return False


def _use_log(connection: sqlite3.Connection, wait: float) -> None:
    """Let readers and a writer go on beside each other.

    Where two processes set this up together SQLite refuses at once, so waiting is done here.
    """
    end = time.monotonic() + wait
    while True:
        try:
            connection.execute("PRAGMA journal_mode = WAL")
            return
        except sqlite3.OperationalError as error:
            if not is_held(error) or time.monotonic() >= end:
                raise
        time.sleep(0.01)


def is_held(error: Exception) -> bool:
    """Whether another process or thread held the file for too long."""
    return _code(error) == sqlite3.SQLITE_BUSY


def _is_broken(error: sqlite3.DatabaseError) -> bool:
    """Whether the file is damaged, as opposed to locked, read-only or on a full disk."""
    return _code(error) in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB) or type(error) is sqlite3.DatabaseError


def _code(error: Exception) -> int | None:
    """SQLite's kind of error, without the details that it keeps in the higher bits."""
    code = getattr(error, "sqlite_errorcode", None)
    return None if code is None else code & 0xFF


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    return found.st_dev, found.st_ino


# Weak, so that stores can be collected; none begins while the process forks.
_living: weakref.WeakSet[Database] = weakref.WeakSet()
_forking = threading.Lock()


def _before_fork() -> None:
    _forking.acquire()
    for database in _living:
        database.before_fork()


def _after_fork() -> None:
    for database in _living:
        database.after_fork()
    _forking.release()


os.register_at_fork(before=_before_fork, after_in_parent=_after_fork, after_in_child=_after_fork)
