"""Reads emails: sender, recipients, date and text, also of attached emails.

Of several versions of a text, the plain one is read. The parser looks at each line once for every open part, so mails
with many parts and many lines are rejected. Long headers are cut, because parsing their parameters is quadratic.
"""

from __future__ import annotations

import re
from email.errors import HeaderParseError
from email.header import decode_header
from email.message import Message
from email.parser import BytesParser
from email.policy import Compat32
from typing import Any

from .charsets import decode_text
from .page import page_text
from .reading import Reading, TextBuilder, UnreadableFileError, one_line, short_name

MAX_HEADER = 4_000  # characters
MAX_LISTED_NAMES = 3
# Lines of the mail times its multipart parts. An ordinary mail of 20 MB has about a million.
MAX_LINE_VISITS = 20_000_000
MAX_PARTS = 10_000

_HEADER_LINE = re.compile(rb"\A(?:From |[A-Za-z][A-Za-z0-9-]*[ \t]*:)")
_MULTIPART = re.compile(rb"multipart/", re.IGNORECASE)
_TEXTS = ("text", "multipart")  # a part that names no boundary is one text
_SHOWN_HEADERS = ("From", "To", "Cc", "Date")


class _ShortHeaders(Compat32):
    """The parser's policy, with headers that are cut before they are parsed."""

    def header_source_parse(self, sourcelines: list[str]) -> tuple[str, str]:
        name, _, value = sourcelines[0][:MAX_HEADER].partition(":")
        return name, "".join((value, *sourcelines[1:]))[:MAX_HEADER].strip()


def read_mail(data: bytes) -> Reading:
    """Return headers and text of a mail, titled by its subject.

    Raises:
        UnreadableFileError: it is not a mail, or would take too long to read.
    """
    if not _HEADER_LINE.match(data.lstrip()[:1000]):
        raise UnreadableFileError("not a mail: it does not begin with headers")
    if data.count(b"\n") * len(_MULTIPART.findall(data)) > MAX_LINE_VISITS:
        raise UnreadableFileError("has too many lines and nested parts")
    mail = BytesParser(policy=_ShortHeaders()).parsebytes(data.lstrip())  # pyright: ignore[reportArgumentType]
    contents = _Contents()
    contents.read(mail)
    return contents.builder.reading(header_text(mail, "Subject"), contents.left_out())


class _Contents:
    """The text of an email and of the emails attached to it."""

    def __init__(self) -> None:
        self.builder = TextBuilder()
        self._attached = -1  # mails that were read, without the first
        self._unread: list[str] = []
        self._notes: dict[str, None] = {}

    def read(self, mail: Message) -> None:
        """Read all parts in order, without recursion."""
        waiting: list[tuple[Any, bool]] = [(mail, True)]  # each part, and whether it is a whole email
        parts = 0
        while waiting:
            part, is_mail = waiting.pop()
            parts += 1
            if parts > MAX_PARTS:
                self._notes[f"parts from {parts:,} on"] = None
                return
            if is_mail:
                self._read_headers(part)
            if not part.is_multipart():
                self._read_leaf(part)
                continue
            children: list[Message] = part.get_payload()
            if part.get_content_subtype() == "alternative":
                children = _best(children)
            waiting += [(child, part.get_content_maintype() == "message") for child in reversed(children)]

    def left_out(self) -> tuple[str, ...]:
        """Return what the text lacks, in words."""
        if not self._unread:
            return tuple(self._notes)
        names = ", ".join(self._unread[:MAX_LISTED_NAMES])
        more = ", ..." if len(self._unread) > MAX_LISTED_NAMES else ""
        return (*self._notes, f"{len(self._unread):,} attachment{'s' * (len(self._unread) > 1)} ({names}{more})")

    def _read_headers(self, mail: Message) -> None:
        self._attached += 1
        self.builder.separate()
        if self._attached:
            self.builder.mark("attached mail", self._attached)
        shown = ("Subject", *_SHOWN_HEADERS) if self._attached else _SHOWN_HEADERS
        lines = [f"{name}: {value}" for name in shown if (value := header_text(mail, name))]
        self.builder.write("\n".join(lines))

    def _read_leaf(self, part: Message) -> None:
        kind = part.get_content_type()
        if part.get_content_maintype() not in _TEXTS or part.get_content_disposition() == "attachment":
            self._unread.append(short_name(part.get_filename() or kind))
            return
        content = part.get_payload(decode=True)
        if not isinstance(content, bytes) or not content:
            return
        decoded = decode_text(content, part.get_content_charset())
        self._notes |= dict.fromkeys(decoded.note())
        text = page_text(decoded.text)[0] if kind == "text/html" else decoded.text.strip()
        if text:
            self.builder.separate()
            self.builder.write(text)


def _best(versions: list[Message]) -> list[Message]:
    """Return the plain version of a text, or else the last version, which is the richest."""
    plain = [one for one in versions if one.get_content_type() == "text/plain"]
    return plain[:1] or versions[-1:]


def header_text(mail: Message, name: str) -> str:
    """Return a header with its encoded words decoded, in one line, or an empty text."""
    raw = next((value for key, value in mail.raw_items() if key.lower() == name.lower()), "")
    value = one_line(decode_text(raw.encode("ascii", "surrogateescape")).text) if raw else ""
    try:
        pieces = decode_header(value)
    except HeaderParseError:
        return value
    return one_line("".join(_decoded_word(*piece) for piece in pieces))


def _decoded_word(word: str | bytes, charset: str | None) -> str:
    if isinstance(word, str):
        return word
    return decode_text(word, charset).text if word else ""
