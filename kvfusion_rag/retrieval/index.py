"""The document index: it updates a collection of chunks from files, and searches it.

Each combination of settings (embedding model, chunk size, tokenizer) has its own collection in an index folder, so
indexes with different settings can share a folder without mixing.
"""

from __future__ import annotations

import json
import logging
import os
import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import xxhash

from ..errors import InvalidInputError, RetrievalError
from ..home import absolute
from ..option_names import check_option_names
from ..schema import Document
from .collection import ChunkCollection, Place
from .databases import DatabaseCollection, is_index_url, open_collection
from .embedding import Embedder
from .loaders import MAX_FILE_BYTES, SkippedFile, common_folder, find_files, printable_path
from .splitting import check_chunk_tokens, split_text
from .updating import CHUNKS_PER_STEP, Updater

logger = logging.getLogger(__name__)

FORMAT = 3  # increase it when chunks, ids, metadata or embedded texts change
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
    """The result of one update. Files have the names used in document ids.

    Attributes:
        skipped: files and folders that are not in the index, with the reason.
        chunks: number of chunks in the index.
        left_out: parts of files that are not in the index, such as images in base64.
        damage: why an existing index was discarded and built again; ``None`` if it was sound.
    """

    added: tuple[str, ...]
    changed: tuple[str, ...]
    removed: tuple[str, ...]
    unchanged: tuple[str, ...]
    skipped: tuple[SkippedFile, ...]
    chunks: int
    left_out: tuple[SkippedFile, ...] = ()
    damage: str | None = None

    @property
    def files(self) -> tuple[str, ...]:
        """All updated files that are now in the index."""
        return tuple(sorted((*self.added, *self.changed, *self.unchanged)))

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Return the report that :meth:`to_dict` returned as data, which may have been JSON meanwhile."""
        values: dict[str, Any] = {
            **data,
            **{name: tuple(data[name]) for name in ("added", "changed", "removed", "unchanged")},
            **{name: tuple(SkippedFile(**one) for one in data[name]) for name in ("skipped", "left_out")},
        }
        return cls(**values)


@dataclass(frozen=True, slots=True, order=True)
class _Hit:
    """A chunk that a search found. Equal distances are ordered by id."""

    distance: float
    id: str
    place: Place


class DocumentIndex:
    """A semantic index over chunks of files. Use it as a context manager, or call ``close``.

    Args:
        folder: folder of the index, or URL of one in a vector database that several machines share
            (``chroma://host:8000/name``, ``lance+s3://bucket/folder``); ``None`` keeps the index in memory, separate
            from all others.
        count_tokens: counts the tokens of a text for the model that will read the chunks.
        chunk_tokens: maximum tokens of a chunk.
        embedder: embeds texts as vectors.
        base: folder to which file names in ids are relative. By default the parent folder of the index, so that
            documents and index can be moved together; in memory and in a database the deepest folder that contains
            the first paths. A database keeps it.
        max_file_bytes: size in bytes above which files are skipped.
        chunks_per_step: chunks that are embedded at once. Eight times as many are kept in memory and written at once.
        progress: whether ``update`` shows chunks and remaining time on stderr if it takes more than a second.

    A damaged index is emptied with a warning, and the next update builds it again. Other threads may search while one
    updates, and find each file as it was before or is afterwards.

    Raises:
        RetrievalError: the folder is not an index, cannot be written, or is in use by another process.
        InvalidInputError: ``chunk_tokens`` is too small.
    """

    @check_option_names()
    def __init__(
        self,
        folder: str | Path | None = None,
        *,
        count_tokens: Callable[[str], int],
        chunk_tokens: int,
        embedder: Embedder,
        base: str | Path | None = None,
        max_file_bytes: int = MAX_FILE_BYTES,
        chunks_per_step: int = CHUNKS_PER_STEP,
        progress: bool = False,
    ) -> None:
        self.chunk_tokens = check_chunk_tokens(chunk_tokens)
        self._count_tokens = count_tokens
        self._embedder = embedder
        self._max_file_bytes = max_file_bytes
        self._chunks_per_step = chunks_per_step
        self._progress = progress
        self._lock = threading.RLock()  # held to write and to read, but not to embed
        self._collection, self.folder = self._open(folder)
        self._base = self._collection.base if base is None else absolute(base)
        self._damage = self._collection.damage
        if self._damage is not None:
            logger.warning(
                "the index %r was damaged (%s), and is empty until its files are indexed again.",
                self._collection.location,
                self._damage,
            )

    def _open(self, folder: str | Path | None) -> tuple[ChunkCollection | DatabaseCollection, Path | None]:
        """Open the collection of these settings. Return it and the index's folder, if it has one."""
        settings = {"embedding_model": self._embedder.name, "chunk_tokens": self.chunk_tokens}
        if isinstance(folder, str) and is_index_url(folder):
            return open_collection(folder, self._collection_name(), settings), None
        place = None if folder is None else absolute(folder)
        return ChunkCollection(place, self._collection_name(), settings), place

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def __len__(self) -> int:
        """Return the number of chunks."""
        return len(self._collection)

    def in_memory(self, base: str | Path) -> DocumentIndex:
        """Return an empty index in memory with the same settings, for the files in the folder ``base``."""
        return DocumentIndex(
            count_tokens=self._count_tokens,
            chunk_tokens=self.chunk_tokens,
            embedder=self._embedder,
            base=base,
            max_file_bytes=self._max_file_bytes,
        )

    def close(self) -> None:
        """Release the folder, or discard the index in memory. The index cannot be used afterwards."""
        self._collection.close()

    def files(self) -> tuple[str, ...]:
        """Return the sorted names of all files in the index."""
        with self._lock:
            return tuple(sorted(self._collection.files))

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
        self._collection.keep_base(self._base)
        updater = self._updater()
        done = updater.update(files)
        removed = self._deleted(roots, done.present())
        updater.remove(removed)
        report = IndexReport(
            tuple(done.added),
            tuple(done.changed),
            tuple(removed),
            tuple(done.unchanged),
            tuple(sorted((*skipped, *done.skipped), key=lambda one: one.path)),
            chunks=len(self),
            left_out=self._left_out(done.present()),
            damage=self._damage,
        )
        logger.info("indexed %d files: %d chunks", len(report.files), report.chunks)
        if not report.files:
            raise _nothing_indexed(roots, report.skipped)
        self._damage = None
        return report

    def remove(self, files: Collection[str]) -> None:
        """Remove files from the index. The files themselves remain, and the next update of their folder adds them."""
        self._updater().remove(files)

    def documents(self, *, files: Collection[str] | None = None) -> list[Document]:
        """Return all chunks, or those of some files, as :meth:`search` does, but without distance and score."""
        allowed = None if files is None else frozenset(files)
        with self._lock:
            stored = self._collection.files
            names = sorted(stored if allowed is None else allowed & stored.keys())
            return self._documents([(None, place) for name in names for place in stored[name].places])

    def search(self, question: str, top_k: int = 5, *, files: Collection[str] | None = None) -> list[Document]:
        """Return the chunks nearest to ``question``, nearest first.

        A text that several files contain is returned once, from the first of them. Only if there are fewer than
        ``top_k`` different texts, the list is filled up with the others.

        Args:
            question: any text.
            top_k: maximum number of chunks.
            files: names of the files to search, as in ``IndexReport.files``; ``None`` for all files.

        Returns:
            Documents with ``id`` = ``<file>#<chunk>``, the file's title, and metadata ``source`` (path), ``file``,
            ``chunk`` (from 1), ``start`` and ``end`` (characters of the file's text), ``place`` if the file has pages,
            rows, lines or the like ("page 12"), and ``distance`` (cosine). The ``score`` is the cosine similarity, 1
            minus the distance.

        Raises:
            RetrievalError: the index is empty.
            InvalidInputError: ``top_k`` is below 1 or the question is blank.
        """
        if top_k < 1:
            raise InvalidInputError(f"top_k is {top_k}, but it must be at least 1.")
        if not question.strip():
            raise InvalidInputError("the question is blank, but it must contain text.")
        vector = self._embedder.embed_question(question)
        with self._lock:
            return self._nearest(vector, top_k, None if files is None else frozenset(files))

    def _nearest(self, vector: np.ndarray, top_k: int, allowed: frozenset[str] | None) -> list[Document]:
        first: list[_Hit] = []
        copies: list[_Hit] = []
        for distance, places in self._collection.nearest(vector):
            if len(first) >= top_k and distance > first[-1].distance:
                break
            hits = [_Hit(distance, self._id(p), p) for p in places if allowed is None or p.file in allowed]
            first += hits[:1]
            copies += hits[1:]
        if not first and not len(self):
            raise self._empty_index()
        if len(first) < top_k:
            first += sorted(copies)[: top_k - len(first)]
        return self._documents([(hit.distance, hit.place) for hit in sorted(first)[:top_k]])

    def _updater(self) -> Updater:
        return Updater(
            self._collection,
            self._embedder,
            lambda loaded: split_text(loaded.text, loaded.kind, self.chunk_tokens, self._count_tokens),
            self._name,
            max_file_bytes=self._max_file_bytes,
            chunks_per_step=self._chunks_per_step,
            progress=self._progress,
            lock=self._lock,
        )

    def _deleted(self, paths: Sequence[str | Path], present: set[str]) -> list[str]:
        """Return the files in the index that were deleted or can no longer be read under ``paths``."""
        roots = [absolute(path) for path in paths]
        return [name for name in self.files() if name not in present and self._is_deleted(name, roots)]

    def _is_deleted(self, name: str, roots: list[Path]) -> bool:
        path = self._path(name)
        if any(path.is_relative_to(root) for root in roots):
            return True
        # Other machines that use a shared index may have files that this one lacks.
        return not self._collection.is_shared and not os.path.exists(path)

    def _left_out(self, names: set[str]) -> tuple[SkippedFile, ...]:
        files = [self._collection.files[name] for name in sorted(names)]
        return tuple(SkippedFile(str(self._path(file.name)), what) for file in files for what in file.left_out)

    @staticmethod
    def _id(place: Place) -> str:
        return f"{place.file}#{place.number}"

    def _documents(self, hits: Sequence[tuple[float | None, Place]]) -> list[Document]:
        """Return the documents at some places, with the distance of each, if it was searched."""
        texts = self._collection.read([place for _, place in hits])
        return [
            self._document(place, distance, title, text)
            for (distance, place), (title, text) in zip(hits, texts, strict=True)
        ]

    def _document(self, place: Place, distance: float | None, title: str, text: str) -> Document:
        metadata = {"file": place.file, "chunk": place.number, "start": place.start, "end": place.end}
        metadata |= {"place": place.at} if place.at else {}
        metadata |= {} if distance is None else {"distance": distance}
        return Document(
            text,
            id=self._id(place),
            title=title,
            metadata={"source": str(self._path(place.file)), **metadata},
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
        where = self._collection.location
        if self._damage is not None:
            return RetrievalError(
                f"the index {where!r} was damaged ({self._damage}), so it is empty; index its files again."
            )
        others = self._collection.other_settings()
        if not others:
            return RetrievalError(f"the index {where!r} is empty; index some files first.")
        return RetrievalError(
            f"the index {where!r} has no {settings} for this model's tokenizer, only: {'; '.join(others)}; "
            "index the files again with these settings."
        )


def _nothing_indexed(paths: Sequence[str | Path], skipped: Sequence[SkippedFile]) -> RetrievalError:
    where = ", ".join(repr(printable_path(Path(path))) for path in paths)
    if not skipped:
        return RetrievalError(f"there are no files to index in {where}.")
    first = skipped[0]
    return RetrievalError(
        f"no file in {where} can be indexed: {len(skipped)} skipped, the first {first.path!r} ({first.reason})."
    )
