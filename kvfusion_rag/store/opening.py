"""A document store of what a caller names: memory, a folder, a URL, a tier, a store, or nothing."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import InvalidInputError
from .disk import DiskStore
from .documents import DocumentStore
from .format import Codec
from .memory import MemoryStore
from .policy import Loading
from .remote import RemoteStore

Place = DocumentStore | MemoryStore | DiskStore | str | os.PathLike[str] | None


def as_store(place: Place) -> DocumentStore:
    """A document store of what a caller names: "memory" (1 GiB of it), a folder or URL, a tier, a store, or nothing.

    Raises:
        InvalidInputError: it is none of these.
        StoreError: it cannot be opened.
    """
    match place:
        case DocumentStore():
            return place
        case None:
            return DocumentStore()
        case "memory" | MemoryStore():
            return DocumentStore(MemoryStore() if place == "memory" else place)
        case DiskStore():
            return DocumentStore(MemoryStore(), place)
        case str() | os.PathLike():
            return open_store(place)
    raise InvalidInputError(
        f"store is {place!r}, but it must be 'memory', a folder, a URL, a MemoryStore, DiskStore or DocumentStore, or "
        "None."
    )


def open_store(
    place: str | os.PathLike[str],
    *,
    memory: MemoryStore | None = None,
    local: str | os.PathLike[str] | None = None,
    remote: Mapping[str, Any] | None = None,
    read_only: bool = False,
    codec: Codec = "raw",
    load: Loading = "auto",
    **options: Any,
) -> DocumentStore:
    """The store in a folder or behind a URL, with a memory tier in front.

    Args:
        place: a folder, or an fsspec URL (``s3://bucket/folder``) with a local disk tier in front.
        memory: by default one of 1 GiB.
        local: folder of that local disk tier; by default one of its own in the user's cache folder.
        remote: options of :class:`RemoteStore` behind a URL: max_bytes, wait, and what fsspec takes (credentials);
            they go before ``read_only`` and ``codec``.
        read_only: never write to the folder or the URL; the local disk tier in front of a URL is written to.
        codec: of the files of both.
        load: whether files are read, as :class:`DocumentStore` says.
        options: of :class:`DiskStore`.

    Raises:
        StoreError, InvalidInputError: as the tiers.
    """
    memory = MemoryStore() if memory is None else memory
    text = os.fspath(place)
    if "://" not in text:
        if remote is not None:
            raise InvalidInputError(
                f"remote is given, but {text!r} is a folder; a URL such as s3://bucket/folder is not."
            )
        return DocumentStore(memory, DiskStore(text, codec=codec, read_only=read_only, **options), load=load)
    tier = RemoteStore(text, **{"codec": codec, "read_only": read_only, **(remote or {})})
    return DocumentStore(memory, DiskStore(local or _cache_folder(text), codec=codec, **options), tier, load=load)


def _cache_folder(url: str) -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "kvfusion" / "store" / hashlib.sha256(url.encode()).hexdigest()[:16]
