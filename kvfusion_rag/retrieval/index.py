"""An index over documents: files in, the chunks nearest to a question out.

Brings a collection of chunks in line with files, touching only what changed, and searches it. Knows files,
chunks and vectors; does not know the generator, and prints nothing but an optional progress bar.

In an index folder every combination of settings (embedding model, chunk size, tokenizer) has a collection of
its own, so indexes with other settings live side by side and never answer for one another.
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
from .chroma import ChunkCollection, HeldFile, Row
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

FORMAT = 1  # raise it when chunks, ids, metadata or embedded texts change their meaning
CHUNKS_PER_WRITE = 512
# More than asked for is fetched, so that equal distances at the border are put in order by id.
SEARCH_MARGIN = 10
# Two tokenizers that agree on the length of all of these are taken to cut texts alike.
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
    """What one update did. Files are named as in document ids; ``chunks`` counts all chunks held afterwards."""

    added: tuple[str, ...]
    changed: tuple[str, ...]
    removed: tuple[str, ...]
    unchanged: tuple[str, ...]
    skipped: tuple[SkippedFile, ...]
    chunks: int

    @property
    def files(self) -> tuple[str, ...]:
        """Every file that the update named and the index now holds."""
        return tuple(sorted((*self.added, *self.changed, *self.unchanged)))

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class _Cut:
    """One file cut into chunks, not yet embedded."""

    name: str
    digest: str
    title: str
    chunks: list[Chunk]


@dataclass(slots=True)
class _Progress:
    """What an update has found so far."""

    added: list[str] = field(default_factory=list)
    changed: list[str] = field(default_factory=list)
    unchanged: list[str] = field(default_factory=list)
    skipped: list[SkippedFile] = field(default_factory=list)
    waiting: list[_Cut] = field(default_factory=list)


class DocumentIndex:
    """Chunks of files, found by meaning. Use it as a context manager, or call ``close``.

    Args:
        folder: where the index lives; ``None`` keeps it in memory, apart from every other one.
        count_tokens: tokens of a text, as the model that will read the chunks counts them.
        chunk_tokens: most tokens of a chunk.
        embedder: the source of vectors.
        base: folder that file names in ids are relative to. By default the folder around the index, so that
            documents and index can be moved together; in memory the deepest one that holds the first paths.
        max_file_bytes: larger files are skipped.
        progress: whether ``update`` draws a bar on stderr when it takes longer than a second.

    Raises:
        RetrievalError: the folder is no index, cannot be written, or is in use by another process.
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
        """Number of chunks."""
        return len(self._collection)

    def close(self) -> None:
        """Give the folder free, or forget what was in memory. The index cannot be used afterwards."""
        self._collection.close()

    def files(self) -> tuple[str, ...]:
        """Names of all files held, sorted."""
        return tuple(sorted(self._collection.held_files()))

    def update(self, paths: str | Path | Sequence[str | Path]) -> IndexReport:
        """Bring the index in line with ``paths``: files, or folders with all that is in them.

        Only new and changed files are cut and embedded. Files that are gone from disk, or that can no longer be
        read under ``paths``, leave the index; files elsewhere stay in it untouched.

        Raises:
            RetrievalError: a path does not exist, or not one file under ``paths`` could be indexed.
        """
        named = [paths] if isinstance(paths, str | Path) else list(paths)
        if not named:
            raise InvalidInputError("no path was named, but at least one file or folder is needed to index.")
        found, skipped = find_files(named, exclude=self.folder)
        if self._base is None:
            self._base = common_folder(named)
        held = self._collection.held_files()
        done = _Progress(skipped=skipped)
        for path in tqdm(
            found, desc="indexing", unit="file", delay=1, leave=False, disable=None if self._progress else True
        ):
            self._take(path, held, done)
            if sum(len(cut.chunks) for cut in done.waiting) >= CHUNKS_PER_WRITE:
                self._write(done.waiting, held)
        self._write(done.waiting, held)
        removed = self._remove_gone(named, held, {*done.added, *done.changed, *done.unchanged})
        report = IndexReport(
            tuple(done.added),
            tuple(done.changed),
            tuple(removed),
            tuple(done.unchanged),
            tuple(done.skipped),
            chunks=len(self),
        )
        if not report.files:
            raise _nothing_indexed(named, done.skipped)
        return report

    def documents(self, *, files: Collection[str] | None = None) -> list[Document]:
        """All chunks, or those of some files, as :meth:`search` would give them (without distance and score)."""
        allowed = None if files is None else frozenset(files)
        rows = self._collection.rows()
        return [self._document(row, None) for row in rows if allowed is None or row.metadata["file"] in allowed]

    def search(self, question: str, top_k: int = 5, *, files: Collection[str] | None = None) -> list[Document]:
        """The chunks nearest to ``question``, nearest first; fewer where the index holds fewer.

        Args:
            question: any text.
            top_k: number of chunks wanted.
            files: names (as in ``IndexReport.files``) that may be searched; ``None`` for all.

        Returns:
            Documents with ``id`` = ``<file>#<chunk>``, the file's title, and metadata ``source`` (path), ``file``,
            ``chunk`` (from 1), ``start`` and ``end`` (characters of the file's text) and ``distance`` (cosine). The
            ``score`` is the cosine similarity, 1 minus the distance.

        Raises:
            RetrievalError: the index holds nothing.
            InvalidInputError: ``top_k`` is below 1 or the question is blank.
        """
        if top_k < 1:
            raise InvalidInputError(f"top_k is {top_k}, but at least 1 document has to be asked for.")
        if not question.strip():
            raise InvalidInputError("the question is blank, so nothing can be searched for.")
        total = len(self)
        if total == 0:
            raise self._nothing_held()
        vector = self._embedder.embed_question(question)
        wanted = min(top_k + SEARCH_MARGIN, total)
        allowed = None if files is None else frozenset(files)
        while True:
            hits = self._collection.nearest(vector, wanted)
            kept = [hit for hit in hits if allowed is None or hit[0].metadata["file"] in allowed]
            if len(kept) >= top_k or wanted == total:
                return [self._document(row, distance) for row, distance in kept[:top_k]]
            wanted = min(wanted * 4, total)

    def _take(self, path: Path, held: dict[str, HeldFile], done: _Progress) -> None:
        """Sort one file into unchanged, skipped or waiting to be written."""
        name = self._name(path)
        old = held.get(name)
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
        done.waiting.append(_Cut(name, digest, loaded.title, chunks))
        (done.added if old is None else done.changed).append(name)

    def _write(self, waiting: list[_Cut], held: dict[str, HeldFile]) -> None:
        """Embed and store the waiting files in place of their former chunks, and empty the list."""
        if not waiting:
            return
        rows = [row for cut in waiting for row in _rows(cut)]
        # The title goes into the vector, because later chunks often call the subject "it".
        vectors = self._embedder.embed_documents([f"{row.metadata['title']}\n{row.text}" for row in rows])
        kept = {row.id for row in rows}
        former = [i for cut in waiting if cut.name in held for i in held[cut.name].ids]
        self._collection.write(rows, vectors)
        self._collection.delete([i for i in former if i not in kept])
        waiting.clear()

    def _remove_gone(self, named: Sequence[str | Path], held: dict[str, HeldFile], present: set[str]) -> list[str]:
        roots = [Path(path).expanduser().resolve() for path in named]
        gone = [name for name in sorted(held) if name not in present and self._is_gone(name, roots)]
        self._collection.delete([chunk_id for name in gone for chunk_id in held[name].ids])
        return gone

    def _is_gone(self, name: str, roots: list[Path]) -> bool:
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
        """Name of a file in ids: its path relative to the base, with ``/`` on every system."""
        assert self._base is not None
        try:
            return Path(os.path.relpath(path, self._base)).as_posix()
        except ValueError:  # on another drive
            return path.as_posix()

    def _path(self, name: str) -> Path:
        return Path(os.path.normpath((self._base or Path()) / name))

    def _collection_name(self) -> str:
        """Differs for settings whose chunks or vectors must not be mixed."""
        settings = {
            "format": FORMAT,
            "chunk_tokens": self.chunk_tokens,
            "tokenizer": [self._count_tokens(probe) for probe in TOKENIZER_PROBES],
            "embedder": self._embedder.fingerprint,
        }
        return f"kvfusion-{xxhash.xxh3_128_hexdigest(json.dumps(settings).encode())}"

    def _nothing_held(self) -> RetrievalError:
        wanted = f"chunks of {self.chunk_tokens} tokens and the embedding model {self._embedder.name!r}"
        others = [] if self.folder is None else self._collection.other_settings()
        if not others:
            return RetrievalError(f"the index {str(self.folder or 'in memory')!r} is empty; index some files first.")
        held = "; ".join(f"{o['chunk_tokens']} tokens, {o['embedding_model']!r}" for o in others)
        return RetrievalError(
            f"the index {str(self.folder)!r} holds nothing made for this model with {wanted}, only: {held}; index the "
            "files once more for this model and chunk size."
        )


def _rows(cut: _Cut) -> list[Row]:
    return [
        Row(
            id=f"{cut.name}#{number}",
            text=chunk.text,
            metadata={
                "file": cut.name,
                "digest": cut.digest,
                "title": cut.title,
                "chunk": number,
                "chunks": len(cut.chunks),
                "start": chunk.start,
                "end": chunk.end,
            },
        )
        for number, chunk in enumerate(cut.chunks, start=1)
    ]


def _nothing_indexed(named: Sequence[str | Path], skipped: list[SkippedFile]) -> RetrievalError:
    where = ", ".join(repr(printable_path(Path(path))) for path in named)
    if not skipped:
        return RetrievalError(f"there is no file to index in {where}.")
    first = skipped[0]
    return RetrievalError(
        f"nothing in {where} can be indexed: {len(skipped)} skipped, the first {first.path!r} ({first.reason})."
    )
