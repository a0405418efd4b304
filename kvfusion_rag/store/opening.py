"""Opens the store that a user names: "memory", a folder, a URL, a tier, or a store that is open already."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import InvalidInputError
from ..home import home
from .disk import DiskStore
from .documents import DocumentStore
from .format import Codec
from .memory import MemoryStore
from .remote import RemoteStore

Place = DocumentStore | MemoryStore | DiskStore | str | os.PathLike[str] | None


def as_store(place: Place) -> DocumentStore:
    """Return a document store for ``place``: "memory" (1 GiB), a folder, a URL, a tier, a store, or None for no store.

    Raises:
        InvalidInputError: ``place`` is none of these.
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
    **options: Any,
) -> DocumentStore:
    """Open the store in a folder or behind a URL, with a memory tier in front.

    Args:
        place: a folder, or an fsspec URL (``s3://bucket/folder``), which gets a local disk tier in front.
        memory: the memory tier (default: 1 GiB).
        local: folder of the local disk tier of a URL (default: a folder of its own in ``KVFUSION_HOME``).
        remote: options of :class:`RemoteStore` for a URL: max_bytes, wait, and what fsspec takes (credentials). They
            override ``read_only`` and ``codec``.
        read_only: never write to the folder or the URL. The local disk tier of a URL is still written.
        codec: codec of all files.
        options: passed to :class:`DiskStore`.

    Raises:
        InvalidInputError: an option is not allowed.
        StoreError: a tier cannot be opened.
    """
    memory = MemoryStore() if memory is None else memory
    text = os.fspath(place)
    if "://" not in text:
        if remote is not None:
            raise InvalidInputError(
                f"remote is given, but {text!r} is a folder; use it only with a URL such as s3://bucket/folder."
            )
        return DocumentStore(memory, DiskStore(text, codec=codec, read_only=read_only, **options))
    remote_options: dict[str, Any] = {"codec": codec, "read_only": read_only, **(remote or {})}
    tier = RemoteStore(text, **remote_options)
    return DocumentStore(memory, DiskStore(local or _cache_folder(text), codec=codec, **options), tier)


def _cache_folder(url: str) -> Path:
    return home() / "store" / hashlib.sha256(url.encode()).hexdigest()[:16]
