"""Reads e-books in the format EPUB: the chapters in the order of the book."""

from __future__ import annotations

from collections.abc import Mapping

from .archive import Archive, attribute, parse_xml, resolved
from .page import read_chapter
from .reading import Reading, TextBuilder, UnreadableFileError, one_line, short_name

CONTAINER_PART = "META-INF/container.xml"
ENCRYPTION_PART = "META-INF/encryption.xml"
_CHAPTER_TYPES = ("application/xhtml+xml", "text/html", "text/x-oeb1-document", "")


def read_book(data: bytes) -> Reading:
    """Return the text of all chapters, the book's title, and a mark of each chapter.

    Raises:
        UnreadableFileError: it is not a book, or its chapters are encrypted.
    """
    archive = Archive(data)
    if CONTAINER_PART not in archive:
        raise UnreadableFileError("not an EPUB book")
    packages: list[str] = []
    parse_xml(
        archive.read(CONTAINER_PART),
        lambda tag, attributes: packages.append(attribute(attributes, "full-path")) if tag == "rootfile" else None,
    )
    if not packages:
        raise UnreadableFileError("an EPUB book without a table of contents")
    title, chapters = _contents(archive, resolved("", packages[0]))
    encrypted = _encrypted_parts(archive)
    builder = TextBuilder()
    missing = locked = 0
    for number, name in enumerate(chapters, start=1):
        if name in encrypted:
            locked += 1
        elif name not in archive:
            missing += 1
        else:
            text, heading = read_chapter(archive.read(name))
            builder.separate()
            if heading:
                builder.mark("chapter", name=short_name(heading))
            else:
                builder.mark("part", number)
            builder.write(text)
    if locked:
        raise UnreadableFileError("copy-protected (DRM)")
    return builder.reading(title, (f"{missing:,} chapters that are missing",) if missing else ())


class _Package:
    """The tags of the list of contents: title, parts by id, and the ids in the order of the book."""

    def __init__(self) -> None:
        self.titles: list[str] = []
        self.items: dict[str, str] = {}
        self.order: list[str] = []
        self._open_title: list[str] | None = None

    def start(self, tag: str, attributes: Mapping[str, str]) -> None:
        if tag == "title":
            self._open_title = []
        elif tag == "item" and attribute(attributes, "media-type") in _CHAPTER_TYPES:
            self.items[attribute(attributes, "id")] = attribute(attributes, "href")
        elif tag == "itemref":
            self.order.append(attribute(attributes, "idref"))

    def end(self, tag: str) -> None:
        if tag == "title" and self._open_title is not None:
            self.titles.append(one_line("".join(self._open_title)))
            self._open_title = None

    def text(self, text: str) -> None:
        if self._open_title is not None:
            self._open_title.append(text)


def _contents(archive: Archive, name: str) -> tuple[str, list[str]]:
    """Return the title of the book, and the names of its chapters in order, each once."""
    package = _Package()
    parse_xml(archive.read(name), package.start, package.end, package.text)
    chapters = [resolved(name, package.items[one]) for one in package.order if one in package.items]
    return next(filter(None, package.titles), ""), list(dict.fromkeys(chapters))


def _encrypted_parts(archive: Archive) -> set[str]:
    """Return the names of the encrypted parts. Those of ordinary books are fonts."""
    parts: set[str] = set()
    if ENCRYPTION_PART in archive:
        parse_xml(
            archive.read(ENCRYPTION_PART),
            lambda tag, attributes: (
                parts.add(resolved("", attribute(attributes, "URI"))) if tag == "CipherReference" else None
            ),
        )
    return parts
