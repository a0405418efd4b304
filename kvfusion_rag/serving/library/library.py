"""The files that a server answers from, and the documents in them that are nearest to a question."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass

from ...errors import InvalidInputError
from ...retrieval import DocumentIndex
from ...schema import Document
from .uploads import Uploads, UploadSpace

DEFAULT_TOP_K = 5
MAX_SEARCHED_CHARACTERS = 4000  # models embed a few hundred tokens, and tokenizing a whole body would hold up others


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
        uploads: the files that tenants upload. By default they may not.
        top_k: number of documents that are found for a question that does not set it.
        questions: example questions, for the page.
    """

    def __init__(
        self,
        index: DocumentIndex,
        *,
        files: Sequence[str] | None = None,
        uploads: UploadSpace | None = None,
        top_k: int = DEFAULT_TOP_K,
        questions: Sequence[str] = (),
    ) -> None:
        self._index, self._uploads = index, uploads
        self._files = index.files() if files is None else tuple(files)
        self._lock = threading.Lock()
        self.top_k, self.questions = top_k, tuple(questions)

    @property
    def max_uploads(self) -> int:
        """Number of files that a tenant may upload."""
        return self._uploads.max_files if self._uploads else 0

    def files(self, namespace: str) -> list[LibraryFile]:
        """Return the files that a tenant's questions search: those that it uploaded, and the server's own."""
        uploaded = self._uploads.of(namespace).files() if self._uploads else ()
        return [*(LibraryFile(name, True) for name in uploaded), *map(LibraryFile, self._files)]

    def search(self, namespace: str, question: str, top_k: int | None = None) -> list[Document]:
        """Return the documents nearest to the beginning of ``question``, nearest first. A text is returned once.

        Args:
            namespace: the tenant whose uploaded files are searched, too.
            top_k: maximum number of documents, by default that of the library.
        """
        most = self.top_k if top_k is None else top_k
        question = question.strip()[:MAX_SEARCHED_CHARACTERS]
        found = self._uploads.of(namespace).search(question, most) if self._uploads else []
        with self._lock:
            found += self._index.search(question, most, files=self._files) if self._files else []
        found.sort(key=lambda document: -(document.score or 0.0))  # stable: equal ones stay in order
        first: dict[str, Document] = {}
        for document in found:
            first.setdefault(document.text, document)
        return list(first.values())[:most]

    def uploads_of(self, namespace: str) -> Uploads:
        """Return the uploaded files of a tenant.

        Raises:
            InvalidInputError: this library has none.
        """
        if self._uploads is None:
            raise InvalidInputError("this server accepts no files; start it with --max-uploads above 0.")
        return self._uploads.of(namespace)
