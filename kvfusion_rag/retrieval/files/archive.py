"""Unpacks zip and gzip files, and parses the XML in them, within limits.

What a file may unpack to is limited by its size. The declared sizes of a zip file are not trusted: no more than the
limit is ever unpacked. XML with a DOCTYPE is rejected, because only that can define entities.
"""

from __future__ import annotations

import gzip
import io
import posixpath
import zipfile
from collections.abc import Callable, Mapping
from urllib.parse import unquote
from xml.parsers import expat

from .reading import UnreadableFileError

MAX_PARTS = 10_000
MAX_UNPACKED_BYTES = 64 * 2**20
UNPACKED_BYTES = 4 * 2**20
UNPACKED_BYTES_PER_BYTE = 100  # text in XML is compressed to a tenth or twentieth

_ENTRY = b"PK\x01\x02"
_OLD_OFFICE_FILE = b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1"
_ENCRYPTED = 0x1


def unpacked_limit(data: bytes, most: int = MAX_UNPACKED_BYTES) -> int:
    """Return how many bytes a packed file may unpack to."""
    return min(most, UNPACKED_BYTES + UNPACKED_BYTES_PER_BYTE * len(data))


def gunzip(data: bytes, max_bytes: int) -> bytes:
    """Return the content of a gzip file.

    Raises:
        UnreadableFileError: it is larger than the limit, empty, truncated or damaged.
    """
    limit = unpacked_limit(data, max_bytes)
    try:
        with gzip.GzipFile(fileobj=io.BytesIO(data)) as file:
            content = file.read(limit + 1)
    except EOFError as error:
        raise UnreadableFileError("truncated: it ends within its compressed data") from error
    if len(content) > limit:
        raise UnreadableFileError(f"unpacks to more than the limit of {limit / 2**20:.4g} MiB")
    if not content:
        raise UnreadableFileError("empty")
    return content


class Archive:
    """A zip file whose parts are unpacked within a limit for all of them together.

    Raises:
        UnreadableFileError: it is not a zip file, or has too many parts.
    """

    def __init__(self, data: bytes) -> None:
        if data.startswith(_OLD_OFFICE_FILE):
            raise UnreadableFileError("an Office file that is protected by a password, or in an old format")
        if data.count(_ENTRY) > MAX_PARTS:
            raise UnreadableFileError(f"has more than {MAX_PARTS:,} parts")
        try:
            self._zip = zipfile.ZipFile(io.BytesIO(data))
        except zipfile.BadZipFile as error:
            raise UnreadableFileError("damaged or truncated: it is not a complete zip file") from error
        self._limit = self._left = unpacked_limit(data)
        self._names = {name.lstrip("/"): name for name in self._zip.namelist()}

    def __contains__(self, name: str) -> bool:
        return name in self._names

    def read(self, name: str) -> bytes:
        """Return one part.

        Raises:
            UnreadableFileError: it is missing, encrypted or damaged, or the parts are larger than the limit.
        """
        if name not in self._names:
            raise UnreadableFileError(f"its part {name[:100]!r} is missing")
        info = self._zip.getinfo(self._names[name])
        if info.flag_bits & _ENCRYPTED:
            raise UnreadableFileError("protected by a password")
        if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):  # others cannot be bounded
            raise UnreadableFileError(f"its part {name[:100]!r} is compressed with an unsupported method")
        self._left -= info.file_size
        if self._left < 0:
            raise UnreadableFileError(f"unpacks to more than the limit of {self._limit / 2**20:.4g} MiB")
        try:
            with self._zip.open(info) as file:
                return file.read(info.file_size)  # without a number, a part with a false size is unpacked whole
        except (zipfile.BadZipFile, EOFError) as error:
            raise UnreadableFileError(f"its part {name[:100]!r} is damaged or has a false size") from error

    def relations(self, name: str) -> dict[str, str]:
        """Return the names of the parts to which a part of an Office file refers, by their ids."""
        folder, file = posixpath.split(name)
        relations_name = f"{folder}/_rels/{file}.rels"
        targets: dict[str, str] = {}

        def start(tag: str, attributes: Mapping[str, str]) -> None:
            if tag == "Relationship" and attributes.get("TargetMode") != "External":
                targets[attributes.get("Id", "")] = resolved(name, attributes.get("Target", ""))

        if relations_name in self:
            parse_xml(self.read(relations_name), start)
        return targets


def resolved(base: str, reference: str) -> str:
    """Return the name of the part to which the part ``base`` refers."""
    path = unquote(reference.partition("#")[0])
    return posixpath.normpath(posixpath.join("/", posixpath.dirname(base), path)).lstrip("/")


def parse_xml(
    data: bytes,
    start: Callable[[str, Mapping[str, str]], object],
    end: Callable[[str], object] | None = None,
    text: Callable[[str], object] | None = None,
) -> None:
    """Parse XML, and call the functions for each start tag, end tag and text. Tags come without their prefix.

    Namespaces are not resolved, because their names may be long, and each tag would repeat them.

    Raises:
        UnreadableFileError: it is not XML, or has a DOCTYPE.
    """
    parser = expat.ParserCreate()
    parser.buffer_text = True
    parser.StartElementHandler = lambda name, attributes: start(local(name), attributes)
    if end is not None:
        parser.EndElementHandler = lambda name: end(local(name))
    if text is not None:
        parser.CharacterDataHandler = text
    parser.StartDoctypeDeclHandler = _refuse_document_type
    try:
        parser.Parse(data, True)
    except expat.ExpatError as error:
        raise UnreadableFileError(f"its XML is damaged: {error}") from error


def local(name: str) -> str:
    """Return the name of a tag or attribute without its prefix."""
    return name.rpartition(":")[2]


def attribute(attributes: Mapping[str, str], name: str) -> str:
    """Return the value of an attribute with or without a prefix, or an empty text."""
    if name in attributes:
        return attributes[name]
    return next((value for key, value in attributes.items() if local(key) == name), "")


def relation_id(attributes: Mapping[str, str]) -> str:
    """Return the id of a relation, which has a prefix, unlike an element's own id."""
    return next((value for key, value in attributes.items() if key.endswith(":id")), "")


def _refuse_document_type(*names: object) -> None:
    raise UnreadableFileError("its XML has a DOCTYPE, which Office files and books do not need")
