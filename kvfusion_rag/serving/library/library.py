"""The files that a server answers from, and the documents in them that are nearest to a question."""

from __future__ import annotations

import threading
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from ...errors import InvalidInputError, RetrievalError
from ...retrieval import DocumentIndex, IndexReport
from ...schema import Document
from .uploads import Uploads, UploadSpace

DEFAULT_TOP_K = 5
MAX_SEARCHED_CHARACTERS = (
    4000  # models embed a few hundred tokens, and tokenizing a whole body would delay other requests
)


@dataclass(frozen=True, slots=True)
class LibraryFile:
    """A file that is searched. ``uploaded`` files belong to one tenant, who may remove them."""

    name: str
    uploaded: bool = False


class Library:
    """The files of a server. All tenants search the same index, and each one its own uploaded files too.

    Args:
        index: an index with the server's own files. The library does not close it.
        files: names of the files in ``index`` that are searched; ``None`` for all of them.
        docs: files and folders that :meth:`update` reads again. By default none.
        uploads: the files that tenants upload. By default, uploads are not allowed.
        top_k: number of documents that are found for a question that does not set it.
        questions: example questions, for the page.

    Attributes:
        is_watched: whether somebody calls :meth:`update` after changes, so that clients look for new files.
    """

    def __init__(
        self,
        index: DocumentIndex,
        *,
        files: Sequence[str] | None = None,
        docs: Sequence[str | Path] = (),
        uploads: UploadSpace | None = None,
        top_k: int = DEFAULT_TOP_K,
        questions: Sequence[str] = (),
    ) -> None:
        self._index, self._uploads = index, uploads
        self._searched = None if files is None else tuple(files)
        self._docs = tuple(docs)
        self._updating = threading.Lock()
        self.top_k, self.questions = top_k, tuple(questions)
        self.is_watched = False

    @property
    def max_uploads(self) -> int:
        """Number of files that a tenant may upload."""
        return self._uploads.max_files if self._uploads else 0

    def files(self, namespace: str) -> list[LibraryFile]:
        """Return the files that a tenant's questions search: those that it uploaded, and the server's own."""
        uploaded = self._uploads.of(namespace).files() if self._uploads else ()
        return [*(LibraryFile(name, True) for name in uploaded), *map(LibraryFile, self._own_files())]

    def documents(self, files: Collection[str]) -> list[Document]:
        """Return all chunks of some of the server's own files."""
        return self._index.documents(files=files)

    def update(self) -> IndexReport | None:
        """Read new and changed files of ``docs``, and drop removed ones. Questions are answered meanwhile.

        Returns:
            What was done; None if there are no ``docs``.

        Raises:
            RetrievalError: no file can be read any more, or the index cannot be written.
        """
        if not self._docs:
            return None
        with self._updating:
            try:
                report = self._index.update(self._docs)
            except RetrievalError:
                present = set(self._index.files())
                self._searched = tuple(name for name in self._own_files() if name in present)
                raise
            self._searched = report.files
        return report

    def search(self, namespace: str, question: str, top_k: int | None = None) -> list[Document]:
        """Return the documents nearest to the beginning of ``question``, nearest first. A text is returned once.

        Args:
            namespace: the tenant whose uploaded files are searched, too.
            top_k: maximum number of documents, by default that of the library.
        """
        most = self.top_k if top_k is None else top_k
        question = question.strip()[:MAX_SEARCHED_CHARACTERS]
        found = self._uploads.of(namespace).search(question, most) if self._uploads else []
        if self._own_files():
            found += self.search_own(question, most)
        found.sort(key=lambda document: -(document.score or 0.0))  # stable: equal ones stay in order
        first: dict[str, Document] = {}
        for document in found:
            first.setdefault(document.text, document)
        return list(first.values())[:most]

    def search_own(self, question: str, top_k: int) -> list[Document]:
        """Return the documents nearest to ``question`` in the server's own files, as ``DocumentIndex.search`` does."""
        return self._index.search(question, top_k, files=self._searched)

    def uploads_of(self, namespace: str) -> Uploads:
        """Return the uploaded files of a tenant.

        Raises:
            InvalidInputError: this library has none.
        """
        if self._uploads is None:
            raise InvalidInputError("this server accepts no files; start it with --max-uploads above 0.")
        return self._uploads.of(namespace)

    def _own_files(self) -> tuple[str, ...]:
        return self._index.files() if self._searched is None else self._searched
