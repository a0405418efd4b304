"""Where the socket of a server is, and whether only the user can have created it."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ... import __version__
from ...home import absolute, expanded, home
from ..options import index_name

FOLDER = "servers"
# Options that change an answer or where documents are kept, and that a request does not contain.
_NAMES = (
    "chunk_tokens", "gguf_file", "device", "dtype", "engine", "gpu_layers", "cache_type", "namespace", "store_codec",
    "key_kind", "store_max_bytes", "max_reasoning_tokens", "min_support",
)  # fmt: skip
_MODELS = ("model", "adapter", "decoder", "embedding_model")


def socket_place(args: argparse.Namespace, index: Path | str | None) -> Path:
    """Return the socket of a server with the settings of ``args``, the same for ``serve`` and ``ask``.

    Args:
        index: folder or URL of the index that is searched, or None for one in memory.
    """
    settings: dict[str, Any] = {
        "version": __version__,
        "docs": sorted({str(absolute(path)) for path in args.docs}),
        "index": None if index is None else index_name(index),
        "store": _without_link(args.store),
        **{name: getattr(args, name) for name in _NAMES},
        **{name: _state(getattr(args, name)) for name in _MODELS},
    }
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode("utf-8", "surrogatepass")).hexdigest()
    return home() / FOLDER / f"{digest[:32]}.sock"


def is_private(path: Path) -> bool:
    """Return whether ``path`` is a socket of this user in a folder of this user, and nobody else can use either."""
    return _is_own(path.parent, stat.S_ISDIR) and _is_own(path, stat.S_ISSOCK)


def is_private_folder(folder: Path) -> bool:
    """Return whether ``folder`` is a folder of this user that nobody else can use."""
    return _is_own(folder, stat.S_ISDIR)


def _is_own(path: Path, is_kind: Callable[[int], bool]) -> bool:
    try:
        found = path.lstat()
    except OSError:
        return False
    return is_kind(found.st_mode) and found.st_uid == os.geteuid() and not found.st_mode & 0o077


def _state(name: str | None) -> str | list[tuple[str, int, int]] | None:
    """Return the name of a model on a hub, or the files of a local one, which change when it is trained again."""
    if name is None or not os.path.exists(expanded(name)):
        return name
    path = absolute(name)
    files = [path] if path.is_file() else sorted(file for depth in ("*", "*/*") for file in path.glob(depth))
    found = [(str(file), file.stat()) for file in files if file.is_file()]
    return [(file, state.st_size, state.st_mtime_ns) for file, state in found]


def _without_link(place: str | None) -> str | None:
    return place if place is None or "://" in place else str(absolute(place))
