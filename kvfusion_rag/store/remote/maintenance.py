"""Maintenance of a remote store: removing, checking and counting files, and the records beside them.

Unlike an answer, maintenance raises an error if the store fails.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeVar

from ...errors import StoreError
from ..format import CODECS, SUFFIX
from ..keys import paths_of_documents, require_namespace_key
from ..size_limits import add_up
from .folder import ALL_FILES, RemoteFolder
from .uploads import call

R = TypeVar("R")

STALLED_SECONDS = 30.0  # longest wait for one step


class Maintenance:
    """The half of a remote store that raises StoreError if the store fails, does not answer, or is read-only and would
    have to be changed."""

    url: str
    read_only: bool
    _folder: RemoteFolder

    def forget(self, *keys: str) -> int:
        """Remove the documents of ``keys`` under every model. Return the number of removed files.

        Raises:
            InvalidInputError: ``keys`` contains an invalid document key.
        """
        return sum(self._remove(f"{codec}/{path}*") for path in paths_of_documents(keys) for codec in CODECS)

    def clear(self, namespace: str | None = None) -> int:
        """Remove all documents of a namespace, or all documents. Return the number of removed files.

        Raises:
            InvalidInputError: ``namespace`` is not a namespace key.
        """
        if namespace is not None:
            require_namespace_key(namespace)
        return self._remove(f"*/{namespace or '*'}/*/*{SUFFIX}*")

    def verify(self) -> tuple[int, int]:
        """Download and check every file, and remove damaged ones. Return the numbers of intact and damaged files."""
        counts = [0, 0]
        for path in self._maintain(self._folder.list, ALL_FILES):
            is_damaged = self._maintain(self._folder.is_damaged, path)
            if is_damaged is not None:
                counts[is_damaged] += 1
            if is_damaged and not self.read_only:
                self._maintain(self._folder.remove, path)
        return counts[0], counts[1]

    def write_record(self, name: str, data: bytes) -> None:
        """Write a small file beside the documents, which no cap counts.

        Raises:
            StoreError: the store is read-only, fails or does not answer.
        """
        self._require_writable()
        self._maintain(lambda path: self._folder.write(path, data), self._folder.path(name))

    def remove_records(self, names: Iterable[str]) -> None:
        """Remove records.

        Raises:
            StoreError: the store is read-only, fails or does not answer.
        """
        self._require_writable()
        for name in names:
            self._maintain(self._folder.remove, self._folder.path(name))

    def records(self, beginning: str) -> list[tuple[str, bytes]]:
        """Return name and contents of the records whose names begin with a folder.

        Raises:
            StoreError: the store fails or does not answer.
        """
        names = self._maintain(self._folder.records, beginning)
        return [(name, self._maintain(self._folder.read_record, name)) for name in names]

    def totals(self) -> dict[str, tuple[int, int]]:
        """Return bytes and number of documents by namespace key."""
        files = self._maintain(self._folder.list, ALL_FILES)
        return add_up((path.split("/")[-3], facts["size"]) for path, facts in files.items())

    def _remove(self, ending: str) -> int:
        """Remove files, including temporary ones. Return the number of documents."""
        self._require_writable()
        paths = self._maintain(self._folder.list, ending)
        for path in paths:
            self._maintain(self._folder.remove, path)
        return sum(path.endswith(SUFFIX) for path in paths)

    def _require_writable(self) -> None:
        if self.read_only:
            raise StoreError(f"the remote store {self.url!r} was opened with read_only=True; nothing can be changed.")

    def _maintain(self, step: Callable[[str], R], argument: str) -> R:
        """Return the result of one step of maintenance.

        Raises:
            StoreError: the step fails or takes too long.
        """
        try:
            return call(lambda: step(argument), STALLED_SECONDS)
        except TimeoutError as error:
            raise StoreError(
                f"the remote store {self.url!r} has not answered for {STALLED_SECONDS:g} s; check whether it can be "
                "reached, and try again."
            ) from error
        except Exception as error:  # every file system has its own errors
            raise StoreError(f"the remote store {self.url!r} fails ({type(error).__name__}: {error}).") from error
