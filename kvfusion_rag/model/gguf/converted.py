"""Keeps converted GGUF files as model folders, so that each file is converted once on a machine.

A folder is found by the SHA-256 of the file. It is built beside its place, moved there once it is complete, and
checked against a list of its files on each use. One process converts a file while others wait. The cache is in
``KVFUSION_HOME``, or in the platform's cache folder; all of it may be deleted at any time.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import xxhash
from filelock import FileLock, Timeout

from ...errors import KVFusionError, ModelLoadError
from ...home import HOME_VARIABLE, home
from .header import GGUFHeader, read_header

logger = logging.getLogger(__name__)

FORMAT = "v1"  # raise it when the conversion or transformers' major version changes
MANIFEST = "manifest.json"
HEAD_BYTES = 8 << 20  # of each file, compared on each use: small files as a whole, the header of a large one
SPARE_BYTES = 128 << 20  # of disk, for tokenizer and configuration
RECENT_NS = 2_000_000_000  # a file that is younger may change again within one tick of its file system's clock

Facts = dict[str, Any]


def cache_folder() -> Path:
    """Folder of all converted files."""
    return home() / "gguf"


def converted_folder(file: Path) -> Path:
    """The model folder made from GGUF ``file``; converts the file unless this was done before.

    Raises:
        ModelLoadError: the file cannot be read or converted, or the cache cannot be written to.
    """
    place, facts = cache_folder(), _facts(file)
    digest = _remembered_digest(place, facts)
    if digest is None:
        read_header(file)  # refuses a bad file before gigabytes are read
        digest = _digest(file)
        _remember_digest(place, facts, digest)
    entry = place / f"{digest}-{FORMAT}"
    if _damage(entry) is not None:
        header = read_header(file)
        with _writing(file, place):
            place.mkdir(parents=True, exist_ok=True)
            with FileLock(_lock(entry)):
                _build(file, header, facts, entry)
    return entry


def _build(file: Path, header: GGUFHeader, facts: Facts, entry: Path) -> None:
    """Convert ``file`` into ``entry``, whose lock is held."""
    damage = _damage(entry)
    if damage is None:
        return  # another process was faster
    if entry.exists():
        logger.warning("the converted copy of %r is damaged (%s); converting it again", file.name, damage)
        shutil.rmtree(entry)
    _remove_leftovers(entry)
    from .convert import convert, storage_dtype

    needed = header.parameters * storage_dtype(header).itemsize + SPARE_BYTES
    free = shutil.disk_usage(entry.parent).free
    if free < needed:
        raise ModelLoadError(
            f"converting {file.name!r} needs {needed / 1e9:.1f} GB in {str(entry.parent)!r}, but {free / 1e9:.1f} GB "
            f"are free; free some, or set {HOME_VARIABLE} to a folder on another disk."
        )
    logger.warning("converting %r once; the result is kept in %s", file.name, entry.parent)
    folder = _temporary(entry)
    try:
        folder.mkdir()
        convert(file, header, folder)
        if _facts(file) != facts:
            raise ModelLoadError(f"{str(file)!r} changed while it was read; load it again.")
        _seal(folder)
        folder.replace(entry)
        _sync_folder(entry.parent)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _remove_leftovers(entry: Path) -> None:
    """Remove folders of conversions that were killed; the lock of ``entry`` is held."""
    for folder in entry.parent.glob("*.tmp"):
        owner = folder.with_suffix("")
        if owner == entry:
            shutil.rmtree(folder)
            continue
        with contextlib.suppress(Timeout), FileLock(_lock(owner), timeout=0):  # else it is being built
            shutil.rmtree(folder)


def _temporary(entry: Path) -> Path:
    return entry.with_suffix(".tmp")


def _lock(entry: Path) -> Path:
    return entry.with_suffix(".lock")


# Files of an entry


def _seal(folder: Path) -> None:
    """Write the list of all files, and wait until everything is on the disk."""
    files = {path.name: _describe(path) for path in sorted(folder.iterdir())}
    (folder / MANIFEST).write_text(json.dumps(files, indent=2), encoding="utf-8")
    for name in (*files, MANIFEST):
        shutil.copymode(folder / MANIFEST, folder / name)  # safetensors writes files for one user
        with (folder / name).open("rb+") as stream:
            os.fsync(stream.fileno())
    _sync_folder(folder)


def _describe(path: Path) -> Facts:
    stat = path.stat()
    return {"bytes": stat.st_size, "mtime_ns": stat.st_mtime_ns, "head": _checksum(path, HEAD_BYTES),
            "all": _checksum(path)}  # fmt: skip


def _damage(entry: Path) -> str | None:
    """Why an entry cannot be used, or ``None`` for one that is whole.

    Reads the beginning of each file, and a whole file only if its time of change is not the recorded one.
    """
    try:
        files = json.loads((entry / MANIFEST).read_text(encoding="utf-8"))
        return next(
            (f"{name} has changed" for name, facts in files.items() if not _is_whole(entry / name, facts)), None
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{type(error).__name__}: {error}"


def _is_whole(path: Path, facts: Facts) -> bool:
    stat = path.stat()
    if stat.st_size != facts["bytes"] or _checksum(path, HEAD_BYTES) != facts["head"]:
        return False
    if stat.st_mtime_ns == facts["mtime_ns"]:
        return True
    if _checksum(path) != facts["all"]:
        return False
    with contextlib.suppress(OSError):  # the cache was copied: be quick again next time
        os.utime(path, ns=(stat.st_atime_ns, facts["mtime_ns"]))
    return True


def _checksum(path: Path, most: int | None = None) -> str:
    """xxh3-128 in hex of the first ``most`` bytes, by default of all."""
    digest = xxhash.xxh3_128()
    left = path.stat().st_size if most is None else most
    with path.open("rb") as stream:
        while left > 0 and (part := stream.read(min(left, HEAD_BYTES))):
            digest.update(part)
            left -= len(part)
    return digest.hexdigest()


def _sync_folder(folder: Path) -> None:
    with contextlib.suppress(OSError):  # Windows cannot
        number = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(number)
        finally:
            os.close(number)


# Digests of GGUF files


def _facts(file: Path) -> Facts:
    """What changes when a file does."""
    try:
        stat = file.stat()
    except OSError as error:
        raise ModelLoadError(f"{str(file)!r} cannot be read: {error.strerror or error}.") from error
    return {"path": str(file.resolve()), "bytes": stat.st_size, "mtime_ns": stat.st_mtime_ns,
            "ctime_ns": stat.st_ctime_ns}  # fmt: skip


def _digest(file: Path) -> str:
    try:
        with file.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise ModelLoadError(f"{str(file)!r} cannot be read: {error.strerror or error}.") from error


def _remembered_digest(place: Path, facts: Facts) -> str | None:
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        known = json.loads(_memory(place, facts).read_text(encoding="utf-8"))
        if known["file"] == facts:
            return known["sha256"]
    return None


def _remember_digest(place: Path, facts: Facts, digest: str) -> None:
    """Save the time of reading the file at its next use, if the cache can be written to."""
    if time.time_ns() - max(facts["mtime_ns"], facts["ctime_ns"]) < RECENT_NS:
        return
    with contextlib.suppress(OSError):
        path = _memory(place, facts)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"file": facts, "sha256": digest}), encoding="utf-8")


def _memory(place: Path, facts: Facts) -> Path:
    return place / "digests" / f"{xxhash.xxh3_128_hexdigest(facts['path'].encode())}.json"


@contextmanager
def _writing(file: Path, place: Path) -> Iterator[None]:
    """Turn errors of writing into the cache, which come from several libraries, into ModelLoadError."""
    try:
        yield
    except KVFusionError:
        raise
    except Exception as error:
        cause = " ".join(str(error).split())[:300]
        raise ModelLoadError(
            f"the converted {file.name!r} cannot be written to {str(place)!r}: {cause}; free space there, or set "
            f"{HOME_VARIABLE} to another folder."
        ) from error
