"""Decodes the bytes of text files and web pages, whatever their encoding.

Valid UTF-8 is trusted first, because other text is almost never valid UTF-8. Then come the declared encoding, read as
browsers read it ("iso-8859-1" means windows-1252), and statistics of the bytes. A few wrong bytes do not change the
encoding of a whole file. Time grows linearly with the size.
"""

from __future__ import annotations

import codecs
import re
from dataclasses import dataclass

from turbohtml.detect import detect  # also registers the codecs whatwg-*

# A declared encoding is wrong if more than this share of the bytes outside ASCII cannot be decoded with it.
WRONG_SHARE = 0.1
# Text of unknown encoding is binary if more than this share of its bytes is outside ASCII.
BINARY_SHARE = 0.2
DECLARATION_BYTES = 16_384  # beginning of a page that is searched for a declaration

_MARKS = ((codecs.BOM_UTF8, "utf-8-sig"), (codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16"))
_ASCII = bytes(range(128))
_COMMENT = re.compile(rb"<!--.*?(?:-->|\Z)", re.DOTALL)
_DECLARATION = re.compile(
    rb"<meta\b[^>]{0,500}?charset\s{0,9}=\s{0,9}[\"']?\s{0,9}([\w:.-]{1,40})"
    rb"|<\?xml\b[^>]{0,200}?encoding\s{0,9}=\s{0,9}[\"']([\w:.-]{1,40})",
    re.IGNORECASE,
)


@dataclass(frozen=True, slots=True)
class DecodedText:
    """A decoded text.

    Attributes:
        invalid: number of bytes that could not be decoded and became U+FFFD.
        known: False if nothing in the bytes suggests the encoding.
    """

    text: str
    encoding: str
    invalid: int = 0
    known: bool = True

    def note(self) -> tuple[str, ...]:
        """Return what is missing in the text, in words; empty if nothing is."""
        return (f"{self.invalid:,} bytes that are not {self.encoding}",) if self.invalid else ()


def has_mark(data: bytes) -> bool:
    """Return whether the bytes begin with a byte order mark of UTF-8 or UTF-16."""
    return data.startswith(tuple(mark for mark, _ in _MARKS))


def decode_page(data: bytes) -> DecodedText:
    """Decode a web page. Its declaration of an encoding counts only if it fits the bytes."""
    match = _DECLARATION.search(_COMMENT.sub(b"", data[:DECLARATION_BYTES]))
    label = (match[1] or match[2]).decode("ascii", "replace") if match else None
    return decode_text(data, label)


def decode_text(data: bytes, declared: str | None = None) -> DecodedText:
    """Decode bytes with a byte order mark, as UTF-8, with the ``declared`` encoding, or with the most likely one."""
    for mark, encoding in _MARKS:
        if data.startswith(mark):
            text = data.decode(encoding, errors="replace")
            return DecodedText(text, encoding.removesuffix("-sig").upper(), _invalid(text, data))
    if data.isascii():
        escapes = b"\x1b$" in data or b"\x1b(" in data  # ISO-2022-JP is ASCII with escape sequences
        return _as_detected(data, 0) if escapes else DecodedText(data.decode("ascii"), "ASCII")
    utf8 = _as_utf8(data)
    if utf8 is not None:
        return utf8
    outside_ascii = len(data.translate(None, _ASCII))
    stated = _as_declared(data, declared) if declared else None
    if stated is not None and stated.invalid <= WRONG_SHARE * outside_ascii:
        return stated
    likely = _as_detected(data, outside_ascii)
    return stated if stated is not None and stated.invalid <= likely.invalid else likely


def _as_utf8(data: bytes) -> DecodedText | None:
    """Return the text if the bytes are UTF-8, apart from fewer wrong bytes than characters outside ASCII."""
    text = data.decode("utf-8", errors="replace")
    invalid = _invalid(text, data)
    characters = len(text) - len(text.encode("ascii", "ignore")) - invalid
    return DecodedText(text, "UTF-8", invalid) if characters >= invalid else None


def _as_declared(data: bytes, label: str) -> DecodedText | None:
    name = label.lower()
    if name.startswith(("utf-16", "utf-32", "x-user-defined")):  # bytes that begin like a page cannot be these
        return None
    try:
        text = data.decode(f"whatwg-{name}", errors="replace")
    except (LookupError, ValueError):  # ValueError: a null character in the name
        return None
    # Browsers read windows-1252 without gaps: unused bytes become control characters, which no page contains.
    controls = sum(text.count(chr(code)) for code in range(0x80, 0xA0))
    return DecodedText(text, label, _invalid(text, data) + controls)


def _as_detected(data: bytes, outside_ascii: int) -> DecodedText:
    match = detect(_DECLARATION.sub(b"", data))  # a declaration would be trusted
    assert match.codec is not None  # only of empty bytes
    text = data.decode(match.codec, errors="replace")
    known = match.confidence > 0 or outside_ascii <= BINARY_SHARE * len(data)
    return DecodedText(text, str(match.encoding), _invalid(text, data), known)


def _invalid(text: str, data: bytes) -> int:
    """Return how many U+FFFD of ``text`` stand for bytes that could not be decoded."""
    return max(0, text.count("\ufffd") - data.count(b"\xef\xbf\xbd"))
