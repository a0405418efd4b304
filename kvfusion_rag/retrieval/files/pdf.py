"""Reads the text of PDF files with pypdf.

A small PDF can demand any amount of work: pages may share one long content, and forms may contain each other. So the
drawing operations that are read are limited by the size of the file.
"""

from __future__ import annotations

import io
from typing import Any

from pypdf import PageObject, PdfReader

from .reading import Reading, TextBuilder

# Compressed books have about one operation for four bytes.
OPERATIONS = 10_000
OPERATIONS_PER_BYTE = 1
CONTENT_BYTES = 4 * 2**20  # unpacked content of pages
CONTENT_BYTES_PER_BYTE = 50


class _TooMuchWorkError(Exception):
    """A page needs more work than the size of the file allows."""


class _Limits:
    """The work that is left for one file."""

    def __init__(self, size: int) -> None:
        self._operations = OPERATIONS + OPERATIONS_PER_BYTE * size
        self._content_bytes = CONTENT_BYTES + CONTENT_BYTES_PER_BYTE * size

    def count_operation(self, operator: object, operands: list[Any], *matrices: object) -> None:
        """Count one drawing operation, as often as pypdf reads it. The arguments are those of pypdf's visitor."""
        self._operations -= 1 + sum(len(operand) for operand in operands if isinstance(operand, list | str)) // 50
        self.check()

    def count_content(self, page: PageObject) -> None:
        """Count the unpacked content of a page, before pypdf parses it."""
        content = page.get_contents()
        self._content_bytes -= 0 if content is None else len(content.get_data())
        self.check()

    def check(self) -> None:
        if self._operations < 0 or self._content_bytes < 0:
            raise _TooMuchWorkError


def read_pdf(data: bytes) -> Reading:
    """Return the text of all pages with a blank line between them, the title in the metadata, and marks of the pages.

    Raises:
        Exception: any exception of pypdf, or a ValueError if the file needs a password.
    """
    reader = PdfReader(io.BytesIO(data))
    if reader.is_encrypted and not reader.decrypt(""):
        raise ValueError("protected by a password")
    limits = _Limits(len(data))
    builder = TextBuilder()
    missing: tuple[str, ...] = ()
    for number, page in enumerate(reader.pages, start=1):
        try:
            limits.count_content(page)
            text = page.extract_text(visitor_operand_before=limits.count_operation).strip()
            limits.check()  # pypdf ignores errors inside forms
        except _TooMuchWorkError:
            missing = (f"pages from {number} on, which need too much work for the size of the file",)
            break
        if text:
            builder.separate()
            builder.mark("page", number)
            builder.write(text)
    title = (reader.metadata.title if reader.metadata else None) or ""
    return builder.reading(title, missing)
