"""The chunks of one index in a vector database, which several machines search while one of them updates it.

The record of a text has its places, so a search reads nothing else. The record of a file has its digest and its
places, and an update reads all of them. An update first writes each file's record without a digest, then the texts,
and at last the records with digests. So if it is interrupted, the next update does the same files again.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from ...errors import InvalidInputError, RetrievalError
from ...text.json_text import parse_json
from ..collection import Place, StoredChunk, StoredFile, text_key
from .database import Record, VectorDatabase

FIRST_COUNT = 32  # texts that a search asks for first; more are requested if files are left out
GROWTH = 8
_SETTINGS_ID = "0" * 32
_UNFINISHED = ""  # the digest of a file that is being written


class DatabaseCollection:
    """Files, their chunks and the vectors of these, in one collection of a vector database.

    Args:
        database: the database, which is closed with the collection.
        name: name of the collection.
        settings: stored with the collection and shown in error messages of indexes with other settings.
    """

    damage = None  # a database checks its own files
    is_shared = True

    def __init__(self, database: VectorDatabase, name: str, settings: Mapping[str, str | int]) -> None:
        self._database = database
        self._name = name
        self._settings = dict(settings)
        self.base = self._read_base()

    @property
    def location(self) -> str:
        """The URL of the index."""
        return self._database.location

    @property
    def files(self) -> dict[str, StoredFile]:
        """The stored files by name, as they were when they were first needed, and with this process's changes."""
        return self._state.files

    @cached_property
    def _state(self) -> _State:
        state = _State()
        for record in self._database.scan(self._name, "files"):
            if record.id != _SETTINGS_ID:
                state.add(self._file(record))
        return state

    def __len__(self) -> int:
        return sum(len(file.places) for file in self.files.values())

    def close(self) -> None:
        """Release the connection."""
        self._database.close()

    def keep_base(self, base: Path) -> None:
        """Store the folder to which the names of files are relative, so that every process uses the same.

        Raises:
            InvalidInputError: another folder is stored already.
        """
        if self.base is None:
            payload = json.dumps({"settings": self._settings, "base": str(base)})
            self._database.write(self._name, "files", [Record(_SETTINGS_ID, payload)])
            self.base = base
        elif self.base != base:
            raise InvalidInputError(
                f"base is {str(base)!r}, but the names in the index {self.location!r} are relative to "
                f"{str(self.base)!r}; use that folder, or an index with another name."
            )

    def places(self, key: bytes) -> list[Place]:
        """Return all places of a text, ordered by file and number."""
        return sorted(self._state.places.get(key, ()))

    def title(self, key: bytes) -> str | None:
        """Return the title with which a text was embedded, or None if the text is not stored.

        That is the title of the first file that contains it.
        """
        places = self.places(key)
        return self.files[places[0].file].title if places else None

    def text(self, key: bytes) -> str:
        """Return a stored text.

        Raises:
            RetrievalError: the text is missing, or is not what was written.
        """
        return self._texts([key])[key].text

    def read(self, places: Sequence[Place]) -> list[tuple[str, str]]:
        """Return the title of the file and the text of each place.

        Raises:
            RetrievalError: a text is missing, or is not what was written.
        """
        texts = self._texts(list({place.key for place in places}))
        return [(texts[place.key].titles.get(place.file, ""), texts[place.key].text) for place in places]

    def nearest(self, vector: np.ndarray) -> Iterator[tuple[float, list[Place]]]:
        """Yield the places of all texts with their cosine distances to ``vector`` (E,), nearest first."""
        seen: set[str] = set()
        count = FIRST_COUNT
        while True:
            found = self._database.nearest(self._name, vector, count)
            for distance, record in found:
                if record.id not in seen:
                    seen.add(record.id)
                    yield max(0.0, round(distance, 5)), self._text(record).places
            if len(found) < count:
                return
            count *= GROWTH

    def write(self, removed: Iterable[str], files: Sequence[StoredFile], chunks: Sequence[StoredChunk]) -> None:
        """Remove files, add others, and add the texts in them that are new or have another vector.

        Texts that are in no file any more are removed.
        """
        try:
            self._remove_interrupted()
            self._replace([self.files[name] for name in removed if name in self.files], files, chunks)
        except BaseException:
            del self._state  # what the database has now is not known
            raise

    def _remove_interrupted(self) -> None:
        """Remove the files whose writing was interrupted."""
        interrupted = self._state.interrupted
        self._write_texts({place.key for file in interrupted for place in file.places}, [])
        self._database.remove(self._name, "files", [_file_id(file.name) for file in interrupted])
        interrupted.clear()

    def _replace(self, old: Sequence[StoredFile], files: Sequence[StoredFile], chunks: Sequence[StoredChunk]) -> None:
        before = {file.name: file.places for file in old}
        self._write_files(
            [replace(file, digest=_UNFINISHED, places=(*before.get(file.name, ()), *file.places)) for file in files]
        )
        keys = {place.key for file in (*old, *files) for place in file.places}
        for file in old:
            self._state.remove(file)
        for file in files:
            self._state.add(file)
        self._write_texts(keys, chunks)
        self._write_files(files)
        gone = before.keys() - {file.name for file in files}
        self._database.remove(self._name, "files", [_file_id(name) for name in sorted(gone)])

    def other_settings(self) -> list[str]:
        """Return the chunk size and embedding model of the other collections of this index, in words."""
        prefix = self._name.rpartition("-")[0] + "-"
        names = [name for name in self._database.collections() if name.startswith(prefix) and name != self._name]
        found = [self._database.read(name, "files", [_SETTINGS_ID]) for name in sorted(names)]
        settings = [self._parsed(record)["settings"] for records in found for record in records]
        return [f"{one.get('chunk_tokens')} tokens, {one.get('embedding_model')!r}" for one in settings]

    def _write_files(self, files: Sequence[StoredFile]) -> None:
        self._database.write(self._name, "files", [Record(_file_id(file.name), _dump(file)) for file in files])

    def _write_texts(self, keys: set[bytes], chunks: Sequence[StoredChunk]) -> None:
        """Write the texts under ``keys`` with their places as they are now, and remove those without places."""
        new: dict[bytes, tuple[str, np.ndarray | None]] = {chunk.key: (chunk.text, chunk.vector) for chunk in chunks}
        places = {key: self.places(key) for key in keys | new.keys()}
        kept = {key for key, found in places.items() if found and key not in new}
        known = self._database.read(self._name, "texts", [key.hex() for key in sorted(kept)])
        for record in known:
            text = self._text(record)
            new[text.key] = (text.text, record.vector)
        missing = kept - new.keys()
        if missing:
            raise self._damaged("a text is missing")
        records = [
            Record(key.hex(), _Text(key, text, places[key], self._titles(places[key])).dump(), vector)
            for key, (text, vector) in new.items()
        ]
        self._database.write(self._name, "texts", records)
        self._database.remove(self._name, "texts", [key.hex() for key, found in places.items() if not found])

    def _titles(self, places: list[Place]) -> dict[str, str]:
        return {place.file: self.files[place.file].title for place in places}

    def _texts(self, keys: list[bytes]) -> dict[bytes, _Text]:
        records = self._database.read(self._name, "texts", [key.hex() for key in keys])
        found = {text.key: text for text in map(self._text, records)}
        if missing := [key for key in keys if key not in found]:
            raise self._damaged(f"{len(missing)} texts are missing")
        return found

    def _read_base(self) -> Path | None:
        for record in self._database.read(self._name, "files", [_SETTINGS_ID]):
            return Path(str(self._parsed(record).get("base")))
        return None

    def _text(self, record: Record) -> _Text:
        data = self._parsed(record)
        try:
            text = str(data["text"])
            key = text_key(text)
            if key.hex() != record.id:
                raise ValueError("another text is stored under its id")
            titles = {str(name): str(title) for name, title in data["titles"].items()}
            return _Text(key, text, sorted(_place(one, key) for one in data["places"]), titles)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise self._damaged(repr(error)) from error

    def _file(self, record: Record) -> StoredFile:
        data = self._parsed(record)
        try:
            places = tuple(_place(one, bytes.fromhex(one.pop("key"))) for one in data["places"])
            left_out = tuple(map(str, data["left_out"]))
            file = StoredFile(str(data["name"]), str(data["digest"]), str(data["title"]), left_out, places)
            if _file_id(file.name) != record.id or any(place.file != file.name for place in places):
                raise ValueError("another file is stored under its id")
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise self._damaged(repr(error)) from error
        return file

    def _parsed(self, record: Record) -> dict[str, Any]:
        try:
            data = parse_json(record.payload)
        except ValueError as error:
            raise self._damaged(str(error)) from error
        if not isinstance(data, dict):
            raise self._damaged("a record is not an object")
        return data

    def _damaged(self, cause: str) -> RetrievalError:
        return RetrievalError(
            f"the index {self.location!r} is damaged ({cause[:200]}); index its files again under another name."
        )


@dataclass(slots=True)
class _State:
    """The files of a collection, the places of each text in them, and the files whose writing was interrupted."""

    files: dict[str, StoredFile] = field(default_factory=dict)
    places: defaultdict[bytes, set[Place]] = field(default_factory=lambda: defaultdict(set))
    interrupted: list[StoredFile] = field(default_factory=list)

    def add(self, file: StoredFile) -> None:
        if file.digest == _UNFINISHED:
            self.interrupted.append(file)
            return
        self.files[file.name] = file
        for place in file.places:
            self.places[place.key].add(place)

    def remove(self, file: StoredFile) -> None:
        del self.files[file.name]
        for place in file.places:
            self.places[place.key].discard(place)


class _Text:
    """A distinct text, its places in order, and the titles of their files."""

    def __init__(self, key: bytes, text: str, places: list[Place], titles: Mapping[str, str]) -> None:
        self.key, self.text, self.places, self.titles = key, text, places, titles

    def dump(self) -> str:
        places = [_fields(place) for place in self.places]
        for fields in places:
            del fields["key"]
        return json.dumps({"text": self.text, "places": places, "titles": self.titles})


def _dump(file: StoredFile) -> str:
    data = asdict(replace(file, places=()))
    return json.dumps(data | {"places": [_fields(place) for place in file.places]})


def _fields(place: Place) -> dict[str, Any]:
    return asdict(place) | {"key": place.key.hex()}


def _place(fields: dict[str, Any], key: bytes) -> Place:
    place = Place(**fields, key=key)
    are_texts = isinstance(place.file, str) and isinstance(place.at, str)
    if not (are_texts and all(type(n) is int for n in (place.number, place.start, place.end))):
        raise TypeError(f"a place is {str(fields)[:100]}")
    return place


def _file_id(name: str) -> str:
    return xxhash.xxh3_128_hexdigest(name.encode("utf-8", "surrogatepass"))
