"""The URLs of indexes: ``chroma://host:8000/name`` and ``lance+s3://bucket/folder``."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal, Self
from urllib.parse import SplitResult, urlsplit

from ...errors import InvalidInputError

CHROMA_PORT = 8000
DEFAULT_NAME = "kvfusion"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{1,63}")
_URL = re.compile(r"(chroma(\+https)?|lance\+[a-z0-9]+)://", re.ASCII)


@dataclass(frozen=True, slots=True)
class IndexUrl:
    """Where a shared index is.

    Attributes:
        text: the URL as it was given.
        kind: the database.
        address: the base URL of a server, or the place of the tables of Lance.
        name: what the names of all collections of this index begin with.
    """

    text: str
    kind: Literal["chroma", "lance"]
    address: str
    name: str = DEFAULT_NAME

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read a URL.

        Raises:
            InvalidInputError: it is not one of the two forms, or contains a password.
        """
        try:
            parts = urlsplit(text)
            port = parts.port
        except ValueError as error:
            raise _invalid(text, str(error)) from error
        if parts.username is not None or parts.password is not None:
            raise InvalidInputError(
                "the URL of the index contains a user or password, which commands and logs would show; set "
                "KVFUSION_INDEX_TOKEN (Chroma) or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY instead."
            )
        if parts.query or parts.fragment:
            raise _invalid(text, "it has a query or fragment")
        if parts.scheme.startswith("lance+"):
            return cls._lance(text, parts)
        if parts.scheme not in ("chroma", "chroma+https"):
            raise _invalid(text, f"its scheme is {parts.scheme!r}")
        if not parts.hostname:
            raise _invalid(text, "it has no host")
        name = parts.path.strip("/") or DEFAULT_NAME
        if not _NAME.fullmatch(name):
            raise _invalid(text, f"{name!r} is not a name of letters, digits, '-' and '_'")
        secure = parts.scheme.endswith("https")
        host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
        scheme, port = ("https", port or 443) if secure else ("http", port or CHROMA_PORT)
        return cls(text, "chroma", f"{scheme}://{host}:{port}", name)

    @classmethod
    def _lance(cls, text: str, parts: SplitResult) -> Self:
        if not parts.path.strip("/"):
            raise _invalid(text, "it has no folder")
        return cls(text, "lance", text.removeprefix("lance+"))


def is_index_url(text: str) -> bool:
    """Return whether ``text`` is a URL of an index, not a path. It may still be invalid."""
    return _URL.match(text) is not None


def _invalid(text: str, cause: str) -> InvalidInputError:
    return InvalidInputError(
        f"{text[:200]!r} is not the URL of an index ({cause}); use chroma://host:8000/name, "
        "chroma+https://host/name, lance+s3://bucket/folder or lance+file:///folder."
    )
