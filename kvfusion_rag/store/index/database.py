"""A SQLite file that is built again when it is damaged, and that several processes and threads share.

Nothing in the file is trusted. Every transaction opens it by its path, so a file that another process has replaced is
noticed, and compares its tables with the expected ones. If a transaction fails, the file is checked: a damaged one is
removed and filled again from its source. The file is therefore never synced to the disk.
"""

from __future__ import annotations

import logging
import os
import shutil
import sqlite3
import stat
import time
from collections.abc import Callable, Sequence
from contextlib import closing, suppress
from pathlib import Path
from typing import TypeVar

from ...model.forks import fork_safe_lock

logger = logging.getLogger(__name__)
T = TypeVar("T")

STEP_SECONDS = 0.05  # longest wait while other threads of this process cannot use the file
_FILES = ("", "-journal", "-wal", "-shm")  # endings of all names that SQLite uses
_JOURNAL_MAGIC = bytes.fromhex("d9d505f920a163d7")  # at the end of a journal that names further files
_LOCKED = (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED)
_SYSTEM = (sqlite3.SQLITE_FULL, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_NOMEM, sqlite3.SQLITE_PERM)

# One transaction at a time in this process. A fork waits for it, because a child must not inherit an open connection:
# SQLite would mistake the parent's locks for the child's.
_lock = fork_safe_lock()


class LockedError(TimeoutError):
    """The file is in use by others for too long."""


class DamagedError(sqlite3.DatabaseError):
    """The file does not contain what was written to it. The message completes "because ..."."""


class Database:
    """A SQLite file.

    Args:
        path: the file, created if missing.
        tables: statements that create its tables, as SQLite stores them.
        fill: fills new tables from the source, and returns the number of rows.
        check: raises an error if the contents are damaged.
        mode: permissions of the file.
    """

    def __init__(
        self,
        path: Path,
        tables: Sequence[str],
        fill: Callable[[sqlite3.Connection], int],
        check: Callable[[sqlite3.Connection], None],
        mode: int,
    ) -> None:
        self._path, self._tables, self._fill, self._check, self._mode = path, tables, fill, check, mode

    def run(self, work: Callable[[sqlite3.Connection], T], wait: float) -> T:
        """Return the result of ``work`` in a transaction. It is called again if the file had to be rebuilt.

        Args:
            work: raises :class:`DamagedError` if it finds damage.
            wait: seconds to wait while other threads or processes use the file.

        Raises:
            sqlite3.Error, OSError: the file is locked for too long (:func:`is_locked`) or unusable.
        """
        end = time.monotonic() + wait
        while True:
            try:
                return self._try(work, min(wait, STEP_SECONDS))
            except (OSError, sqlite3.Error) as error:
                if not is_locked(error) or time.monotonic() >= end:
                    raise

    def _try(self, work: Callable[[sqlite3.Connection], T], wait: float) -> T:
        if not _lock.acquire(timeout=wait):
            raise LockedError("the index is locked by another thread")
        try:
            try:
                return self._transact(work, wait)
            except DamagedError as error:
                damage = str(error)
            except Exception as error:  # damaged contents can cause any error
                if _is_outside(error):
                    raise
                damage = self._damage(wait)
            if damage is not None:
                self._remove()
            return self._transact(work, wait, damage)  # fails again if the cause was not damage
        finally:
            _lock.release()

    def _transact(self, work: Callable[[sqlite3.Connection], T], wait: float, damage: str | None = None) -> T:
        """Call ``work`` in one transaction. ``damage`` is the reason why the file was removed before."""
        self._require_plain_files()
        self._create()
        rows = None
        with closing(sqlite3.connect(self._path, timeout=wait, isolation_level=None)) as connection:
            if connection.execute("PRAGMA journal_mode").fetchone() == ("wal",):  # would seem locked if it is damaged
                raise DamagedError("it was not in the expected mode")
            for setting in ("trusted_schema = OFF", "synchronous = OFF", "journal_mode = TRUNCATE"):
                connection.execute(f"PRAGMA {setting}")
            connection.execute("BEGIN IMMEDIATE")
            try:
                if not self._has_tables(connection):
                    rows = self._fill(connection)
                result = work(connection)
                connection.execute("COMMIT")
            except BaseException:  # a query that is still referred to would keep the lock after closing
                connection.rollback()
                raise
        if damage is not None or rows:
            logger.warning(
                "%s was rebuilt from %d files, because %s", self._path, rows or 0, damage or "it was missing or empty"
            )
        return result

    def _has_tables(self, connection: sqlite3.Connection) -> bool:
        """Compare the tables with the expected ones. Create them if the file is empty, and return False then."""
        found = [sql for (sql,) in connection.execute("SELECT sql FROM sqlite_schema ORDER BY rowid").fetchall()]
        if found:
            if found != list(self._tables):
                raise DamagedError("its tables were not the expected ones")
            return True
        for statement in self._tables:  # the file is new, or its creator died before filling it
            connection.execute(statement)
        return False

    def _damage(self, wait: float) -> str | None:
        """Return what is wrong with the file, or None if it is sound."""

        def check_and_write(connection: sqlite3.Connection) -> None:
            self._check(connection)
            connection.execute("PRAGMA user_version = 1")  # a damaged header can make the file read-only

        try:
            self._transact(check_and_write, wait)
        except Exception as error:
            if _is_outside(error):
                raise
            return str(error) if isinstance(error, DamagedError) else f"it was damaged ({error})"
        return None

    def _require_plain_files(self) -> None:
        """Raise DamagedError if SQLite would follow a link, wait for a pipe, or touch files elsewhere."""
        for ending in _FILES:
            file = f"{self._path}{ending}"
            with suppress(FileNotFoundError):
                if not stat.S_ISREG(os.lstat(file).st_mode):
                    raise DamagedError(f"{os.path.basename(file)} was not a file")
        # A journal may name a file that SQLite deletes after a rollback. Ours never do.
        with suppress(FileNotFoundError), open(f"{self._path}-journal", "rb") as journal:
            journal.seek(-min(os.fstat(journal.fileno()).st_size, len(_JOURNAL_MAGIC)), os.SEEK_END)
            if journal.read() == _JOURNAL_MAGIC:
                raise DamagedError("its journal named a file elsewhere")

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

    def _remove(self) -> None:
        for ending in _FILES:
            file = Path(f"{self._path}{ending}")
            if file.is_dir() and not file.is_symlink():
                shutil.rmtree(file)
            else:
                file.unlink(missing_ok=True)


def is_locked(error: Exception) -> bool:
    """Return whether another process or thread held the file for too long."""
    return isinstance(error, LockedError) or _code(error) in _LOCKED


def _is_outside(error: Exception) -> bool:
    """Return whether the cause lies outside the file: a lock, a full disk, or an error of the system."""
    return isinstance(error, OSError) or _code(error) in (*_LOCKED, *_SYSTEM)


def _code(error: Exception) -> int:
    """Return SQLite's primary error code, without the extended code in its higher bits."""
    return getattr(error, "sqlite_errorcode", 0) & 0xFF
