"""Brings a collection of chunks up to date: reads and splits files, embeds new texts, and shows the progress."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import xxhash
from tqdm import tqdm

from .collection import ChunkCollection, Place, StoredChunk, StoredFile, text_key
from .databases import DatabaseCollection
from .embedding import Embedder
from .loaders import LoadedText, SkippedFile, UnreadableFileError, printable_path, read_bytes, read_document
from .places import name_places
from .splitting import Chunk

CHUNKS_PER_STEP = 64  # embedded at once, between two steps of the progress bar
STEPS_PER_WRITE = 8


@dataclass(slots=True)
class FileChanges:
    """The result for each file. Files have their names in the collection."""

    added: list[str] = field(default_factory=list)
    changed: list[str] = field(default_factory=list)
    unchanged: list[str] = field(default_factory=list)
    skipped: list[SkippedFile] = field(default_factory=list)

    def present(self) -> set[str]:
        """Return the names of the files that are in the collection now."""
        return {*self.added, *self.changed, *self.unchanged}


class ChunkProgress:
    """A progress bar over chunks on stderr, shown after a second if stderr is a terminal.

    The number of chunks is known only when all files are split. Until then it is estimated from the bytes of the files
    that are left, so the bar has a time estimate from the first chunks on.
    """

    def __init__(self, shown: bool, total_bytes: int) -> None:
        self._bar = tqdm(
            desc="indexing", unit="chunk", delay=1, leave=False, disable=None if shown else True, total=None
        )
        self._bytes_left = total_bytes
        self._bytes_split = 0
        self._chunks = 0

    def skip(self, size: int) -> None:
        """Count a file of ``size`` bytes that needs no work."""
        self._bytes_left -= size

    def split(self, size: int, chunks: int) -> None:
        """Count a file of ``size`` bytes that was split into chunks."""
        self._bytes_left -= size
        self._bytes_split += size
        self._chunks += chunks
        rest = self._bytes_left * self._chunks / self._bytes_split
        self._bar.total = self._chunks + round(rest)
        self._bar.refresh()

    def written(self, chunks: int) -> None:
        """Count chunks that were embedded, or needed no embedding."""
        self._bar.update(chunks)

    def close(self) -> None:
        """Remove the bar."""
        self._bar.close()


class Updater:
    """Writes files into a collection. A text that several files contain is embedded once.

    It is embedded with the title of the first of these files, whatever the order in which they came.

    Args:
        split: splits the text of a file into chunks.
        name_of: returns the name of a file in the collection.
        max_file_bytes: size in bytes above which files are skipped.
        chunks_per_step: chunks that are embedded at once.
        progress: whether to show a progress bar.
        lock: held while files are written, but not while texts are embedded.
    """

    def __init__(
        self,
        collection: ChunkCollection | DatabaseCollection,
        embedder: Embedder,
        split: Callable[[LoadedText], list[Chunk]],
        name_of: Callable[[Path], str],
        *,
        max_file_bytes: int,
        chunks_per_step: int,
        progress: bool,
        lock: AbstractContextManager[object],
    ) -> None:
        self._collection = collection
        self._embedder = embedder
        self._split = split
        self._name_of = name_of
        self._max_file_bytes = max_file_bytes
        self._chunks_per_step = chunks_per_step
        self._shows_progress = progress
        self._lock = lock

    def update(self, paths: Sequence[Path]) -> FileChanges:
        """Read, split, embed and write the files that are new or have changed."""
        changes = FileChanges()
        sizes = {path: _size(path) for path in paths}
        progress = ChunkProgress(self._shows_progress, sum(sizes.values()))
        pending: list[tuple[StoredFile, list[Chunk]]] = []
        waiting = 0
        try:
            for path in paths:
                read = self._read(path, changes)
                if read is None:
                    progress.skip(sizes[path])
                    continue
                progress.split(sizes[path], len(read[1]))
                pending.append(read)
                waiting += len(read[1])
                if waiting >= STEPS_PER_WRITE * self._chunks_per_step:
                    self._write(pending, progress)
                    pending, waiting = [], 0
            self._write(pending, progress)
        finally:
            progress.close()
        return changes

    def remove(self, names: Iterable[str]) -> None:
        """Remove files from the collection."""
        self._replace(list(names), [], {}, lambda chunks: None)

    def _read(self, path: Path, changes: FileChanges) -> tuple[StoredFile, list[Chunk]] | None:
        """Read and split one file, and record the result. Return ``None`` if there is nothing to write."""
        name = self._name_of(path)
        old = self._collection.files.get(name)
        try:
            data = read_bytes(path, self._max_file_bytes)
            digest = xxhash.xxh3_128_hexdigest(data)
            if old is not None and old.digest == digest:
                changes.unchanged.append(name)
                return None
            loaded = read_document(path, data, max_bytes=self._max_file_bytes)
        except UnreadableFileError as error:
            changes.skipped.append(SkippedFile(printable_path(path), str(error)))
            return None
        chunks = self._split(loaded)
        names = name_places(loaded.text, loaded.marks, ((chunk.start, chunk.end) for chunk in chunks))
        places = tuple(
            Place(name, number, text_key(chunk.text), chunk.start, chunk.end, at)
            for number, (chunk, at) in enumerate(zip(chunks, names, strict=True), start=1)
        )
        (changes.added if old is None else changes.changed).append(name)
        return StoredFile(name, digest, loaded.title, loaded.left_out, places), chunks

    def _write(self, pending: list[tuple[StoredFile, list[Chunk]]], progress: ChunkProgress) -> None:
        files = [file for file, _ in pending]
        texts = {
            place.key: chunk.text for file, chunks in pending for place, chunk in zip(file.places, chunks, strict=True)
        }
        total = sum(len(file.places) for file in files)
        embedded = self._replace([file.name for file in files], files, texts, progress.written)
        progress.written(total - embedded)

    def _replace(
        self,
        removed: list[str],
        files: list[StoredFile],
        texts: Mapping[bytes, str],
        on_embedded: Callable[[int], object],
    ) -> int:
        """Replace files in one transaction. Return how many texts were embedded, and report each step of them."""
        wanted = self._titles_to_embed(removed, files)
        keys = list(wanted)
        all_texts = [texts[key] if key in texts else self._collection.text(key) for key in keys]
        chunks: list[StoredChunk] = []
        for start in range(0, len(keys), self._chunks_per_step):
            step = slice(start, start + self._chunks_per_step)
            # The title is embedded too, because later chunks often refer to the subject only as "it".
            vectors = self._embedder.embed_documents(
                [f"{wanted[key]}\n{text}" for key, text in zip(keys[step], all_texts[step], strict=True)]
            )
            chunks += [
                StoredChunk(key, wanted[key], text, np.asarray(vector, dtype=np.float32))
                for key, text, vector in zip(keys[step], all_texts[step], vectors, strict=True)
            ]
            on_embedded(len(vectors))
        with self._lock:
            self._collection.write(removed, files, chunks)
        return len(keys)

    def _titles_to_embed(self, removed: list[str], files: list[StoredFile]) -> dict[bytes, str]:
        """Return the texts that need a new vector, with the title of the first file that will contain each."""
        gone = set(removed)
        new: dict[bytes, list[Place]] = {}
        for file in files:
            for place in file.places:
                new.setdefault(place.key, []).append(place)
        titles = {file.name: file.title for file in files}
        lost = {
            place.key for name in gone & self._collection.files.keys() for place in self._collection.files[name].places
        }
        wanted: dict[bytes, str] = {}
        for key in dict.fromkeys((*new, *sorted(lost))):
            kept = [place for place in self._collection.places(key) if place.file not in gone]
            places = sorted((*kept, *new.get(key, ())))
            if not places:
                continue
            first = places[0].file
            title = titles[first] if first in titles else self._collection.files[first].title
            if self._collection.title(key) != title:
                wanted[key] = title
        return wanted


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:  # reading it will say why
        return 0
