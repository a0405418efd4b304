"""The document index: it updates a collection of chunks from files, and searches it.

Each combination of settings (embedding model, chunk size, tokenizer) has its own collection in an index folder, so
indexes with different settings can share a folder without mixing.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

import xxhash
from tqdm import tqdm

from ..errors import InvalidInputError, RetrievalError
from ..schema import Document
from .chroma import ChunkCollection, Row, StoredFile
from .embedding import Embedder
from .loaders import (
    MAX_FILE_BYTES,
    SkippedFile,
    UnreadableFileError,
    common_folder,
    find_files,
    printable_path,
    read_bytes,
    read_document,
)
from .splitting import Chunk, check_chunk_tokens, split_text

FORMAT = 1  # increase it when chunks, ids, metadata or embedded texts change
CHUNKS_PER_WRITE = 512
SEARCH_MARGIN = 10  # extra results, so that equal distances around the last result are ordered by id
# Tokenizers that give the same lengths for all of these texts are assumed to split texts in the same way.
TOKENIZER_PROBES = (
    "The lighthouse keeper wrote 1,874 letters, and nobody ever answered them.",
    "Antidisestablishmentarianism; hippopotomonstrosesquippedaliophobia!",
    "L'été dernier, les élèves étaient à Besançon. Größenmaßstäbe überprüfen.",
    "Маяк был построен на скале. 灯塔建在岩石上。 등대는 바위 위에 있다. المنارة على الصخرة.",
    "def f(x): return {'a': x ** 2, 'b': [1.5e-3, 0xFF]}  # 🙂👩‍🚀",
    "    indented\n\n\n\ttabs and  spaces   ",
)


@dataclass(frozen=True, slots=True)
class IndexReport:
    """The result of one update. Files have the names used in document ids. ``chunks`` is the size of the index."""

    added: tuple[str, ...]
    changed: tuple[str, ...]
    removed: tuple[str, ...]
    unchanged: tuple[str, ...]
    skipped: tuple[SkippedFile, ...]
    chunks: int

    @property
    def files(self) -> tuple[str, ...]:
        """All updated files that are now in the index."""
        return tuple(sorted((*self.added, *self.changed, *self.unchanged)))

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class _SplitFile:
    """One file split into chunks that are not embedded yet."""

    name: str
    digest: str
    title: str
    chunks: list[Chunk]


@dataclass(slots=True)
class _Progress:
    """The state of an update. ``pending`` files are split but not written."""

    added: list[str] = field(default_factory=list)
    changed: list[str] = field(default_factory=list)
    unchanged: list[str] = field(default_factory=list)
    skipped: list[SkippedFile] = field(default_factory=list)
    pending: list[_SplitFile] = field(default_factory=list)


class DocumentIndex:
    """A semantic index over chunks of files. Use it as a context manager, or call ``close``.

    Args:
        folder: folder of the index; ``None`` keeps the index in memory, separate from all others.
        count_tokens: counts the tokens of a text for the model that will read the chunks.
        chunk_tokens: maximum tokens of a chunk.
        embedder: embeds texts as vectors.
        base: folder to which file names in ids are relative. By default the parent folder of the index, so that
            documents and index can be moved together; in memory the deepest folder that contains the first paths.
        max_file_bytes: size in bytes above which files are skipped.
        progress: whether ``update`` shows a progress bar on stderr if it takes more than a second.

    Raises:
        RetrievalError: the folder is not an index, cannot be written, or is in use by another process.
        InvalidInputError: ``chunk_tokens`` is too small.
        MissingDependencyError: chromadb is not installed.
    """

    def __init__(
        self,
        folder: str | Path | None = None,
        *,
        count_tokens: Callable[[str], int],
        chunk_tokens: int,
        embedder: Embedder,
        base: str | Path | None = None,
        max_file_bytes: int = MAX_FILE_BYTES,
        progress: bool = False,
    ) -> None:
        self.folder = None if folder is None else Path(folder).expanduser().resolve()
        self.chunk_tokens = check_chunk_tokens(chunk_tokens)
        self._count_tokens = count_tokens
        self._embedder = embedder
        self._max_file_bytes = max_file_bytes
        self._progress = progress
        if base is None and self.folder is not None:
            base = self.folder.parent
        self._base = None if base is None else Path(base).expanduser().resolve()
        settings = {"embedding_model": embedder.name, "chunk_tokens": chunk_tokens}
        self._collection = ChunkCollection(self.folder, self._collection_name(), settings)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def __len__(self) -> int:
        """Return the number of chunks."""
        return len(self._collection)

    def close(self) -> None:
        """Release the folder, or discard the index in memory. The index cannot be used afterwards."""
        self._collection.close()

    def files(self) -> tuple[str, ...]:
        """Return the sorted names of all files in the index."""
        return tuple(sorted(self._collection.stored_files()))

    def update(self, paths: str | Path | Sequence[str | Path]) -> IndexReport:
        """Update the index from files and folders, including subfolders.

        Only new and changed files are split and embedded. Files that were deleted, or that can no longer be read under
        ``paths``, are removed from the index. Files outside of ``paths`` remain unchanged.

        Raises:
            RetrievalError: a path does not exist, or no file under ``paths`` could be indexed.
        """
        roots = [paths] if isinstance(paths, str | Path) else list(paths)
        if not roots:
            raise InvalidInputError("paths is empty, but it must contain at least one file or folder.")
        files, skipped = find_files(roots, exclude=self.folder)
        if self._base is None:
            self._base = common_folder(roots)
        stored = self._collection.stored_files()
        done = _Progress(skipped=skipped)
        for path in tqdm(
            files, desc="indexing", unit="file", delay=1, leave=False, disable=None if self._progress else True
        ):
            self._take(path, stored, done)
            if sum(len(file.chunks) for file in done.pending) >= CHUNKS_PER_WRITE:
                self._write(done.pending, stored)
        self._write(done.pending, stored)
        removed = self._remove_deleted(roots, stored, {*done.added, *done.changed, *done.unchanged})
        report = IndexReport(
            tuple(done.added),
            tuple(done.changed),
            tuple(removed),
            tuple(done.unchanged),
            tuple(done.skipped),
            chunks=len(self),
        )
        if not report.files:
            raise _nothing_indexed(roots, done.skipped)
        return report

    def documents(self, *, files: Collection[str] | None = None) -> list[Document]:
        """Return all chunks, or those of some files, as :meth:`search` does, but without distance and score."""
        allowed = None if files is None else frozenset(files)
        rows = self._collection.rows()
        return [self._document(row, None) for row in rows if allowed is None or row.metadata["file"] in allowed]

    def search(self, question: str, top_k: int = 5, *, files: Collection[str] | None = None) -> list[Document]:
        """Return the chunks nearest to ``question``, nearest first.

        Args:
            question: any text.
            top_k: maximum number of chunks.
            files: names of the files to search, as in ``IndexReport.files``; ``None`` for all files.

        Returns:
            Documents with ``id`` = ``<file>#<chunk>``, the file's title, and metadata ``source`` (path), ``file``,
            ``chunk`` (from 1), ``start`` and ``end`` (characters of the file's text) and ``distance`` (cosine). The
            ``score`` is the cosine similarity, 1 minus the distance.

        Raises:
            RetrievalError: the index is empty.
            InvalidInputError: ``top_k`` is below 1 or the question is blank.
        """
        if top_k < 1:
            raise InvalidInputError(f"top_k is {top_k}, but it must be at least 1.")
        if not question.strip():
            raise InvalidInputError("the question is blank, but it must contain text.")
        total = len(self)
        if total == 0:
            raise self._empty_index()
        vector = self._embedder.embed_question(question)
        count = min(top_k + SEARCH_MARGIN, total)
        allowed = None if files is None else frozenset(files)
        while True:
            hits = self._collection.nearest(vector, count)
            allowed_hits = [hit for hit in hits if allowed is None or hit[0].metadata["file"] in allowed]
            if len(allowed_hits) >= top_k or count == total:
                return [self._document(row, distance) for row, distance in allowed_hits[:top_k]]
            count = min(count * 4, total)

    def _take(self, path: Path, stored: dict[str, StoredFile], done: _Progress) -> None:
        """Read one file and record it as unchanged, skipped or pending."""
        name = self._name(path)
        old = stored.get(name)
        try:
            data = read_bytes(path, self._max_file_bytes)
            digest = xxhash.xxh3_128_hexdigest(data)
            if old is not None and old.complete and old.digest == digest:
                done.unchanged.append(name)
                return
            loaded = read_document(path, data)
        except UnreadableFileError as error:
            done.skipped.append(SkippedFile(printable_path(path), str(error)))
            return
        chunks = split_text(loaded.text, loaded.kind, self.chunk_tokens, self._count_tokens)
        done.pending.append(_SplitFile(name, digest, loaded.title, chunks))
        (done.added if old is None else done.changed).append(name)

    def _write(self, pending: list[_SplitFile], stored: dict[str, StoredFile]) -> None:
        """Embed and write the pending files, delete their old chunks, and clear the list."""
        if not pending:
            return
        rows = [row for file in pending for row in _rows(file)]
        # The title is embedded too, because later chunks often refer to the subject only as "it".
        vectors = self._embedder.embed_documents([f"{row.metadata['title']}\n{row.text}" for row in rows])
        new_ids = {row.id for row in rows}
        old_ids = [i for file in pending if file.name in stored for i in stored[file.name].ids]
        self._collection.write(rows, vectors)
        self._collection.delete([i for i in old_ids if i not in new_ids])
        pending.clear()

    def _remove_deleted(
        self, paths: Sequence[str | Path], stored: dict[str, StoredFile], present: set[str]
    ) -> list[str]:
        """Remove files that were deleted or can no longer be read under ``paths``, and return their names."""
        roots = [Path(path).expanduser().resolve() for path in paths]
        deleted = [name for name in sorted(stored) if name not in present and self._is_deleted(name, roots)]
        self._collection.delete([chunk_id for name in deleted for chunk_id in stored[name].ids])
        return deleted

    def _is_deleted(self, name: str, roots: list[Path]) -> bool:
        path = self._path(name)
        return not os.path.exists(path) or any(path.is_relative_to(root) for root in roots)

    def _document(self, row: Row, distance: float | None) -> Document:
        metadata = {key: row.metadata[key] for key in ("file", "chunk", "start", "end")}
        metadata |= {} if distance is None else {"distance": distance}
        return Document(
            row.text,
            id=row.id,
            title=str(row.metadata["title"]),
            metadata={"source": str(self._path(row.metadata["file"])), **metadata},
            score=None if distance is None else round(1 - distance, 5),
        )

    def _name(self, path: Path) -> str:
        """Return the name of a file in ids: its path relative to the base, with ``/`` on every system."""
        assert self._base is not None
        try:
            return Path(os.path.relpath(path, self._base)).as_posix()
        except ValueError:  # on another drive
            return path.as_posix()

    def _path(self, name: str) -> Path:
        return Path(os.path.normpath((self._base or Path()) / name))

    def _collection_name(self) -> str:
        """Return a name that differs for settings whose chunks or vectors must not be mixed."""
        settings = {
            "format": FORMAT,
            "chunk_tokens": self.chunk_tokens,
            "tokenizer": [self._count_tokens(probe) for probe in TOKENIZER_PROBES],
            "embedder": self._embedder.fingerprint,
        }
        return f"kvfusion-{xxhash.xxh3_128_hexdigest(json.dumps(settings).encode())}"

    def _empty_index(self) -> RetrievalError:
        settings = f"chunks of {self.chunk_tokens} tokens and the embedding model {self._embedder.name!r}"
        others = [] if self.folder is None else self._collection.other_settings()
        if not others:
            return RetrievalError(f"the index {str(self.folder or 'in memory')!r} is empty; index some files first.")
        stored = "; ".join(f"{o['chunk_tokens']} tokens, {o['embedding_model']!r}" for o in others)
        return RetrievalError(
            f"the index {str(self.folder)!r} has no {settings} for this model's tokenizer, only: {stored}; index the "
            "files again with these settings."
        )


def _rows(file: _SplitFile) -> list[Row]:
    common = {"file": file.name, "digest": file.digest, "title": file.title, "chunks": len(file.chunks)}
    return [
        Row(f"{file.name}#{n}", chunk.text, {**common, "chunk": n, "start": chunk.start, "end": chunk.end})
        for n, chunk in enumerate(file.chunks, start=1)
    ]


def _nothing_indexed(paths: Sequence[str | Path], skipped: list[SkippedFile]) -> RetrievalError:
    where = ", ".join(repr(printable_path(Path(path))) for path in paths)
    if not skipped:
        return RetrievalError(f"there are no files to index in {where}.")
    first = skipped[0]
    return RetrievalError(
        f"no file in {where} can be indexed: {len(skipped)} skipped, the first {first.path!r} ({first.reason})."
    )
