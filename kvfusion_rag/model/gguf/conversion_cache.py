"""Keeps converted GGUF files as model folders, so that each file is converted once per machine.

The SHA-256 of the file names the folder. A folder without weights is for engines that read the file themselves. A
folder is built beside its final place, moved there when complete, and checked against a manifest at each use. One
process converts a file while others wait. The cache is in ``KVFUSION_HOME`` or the platform's cache folder. All of it
may be deleted at any time.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import shutil
import time
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import xxhash
from filelock import FileLock, Timeout

from ...errors import KVFusionError, ModelLoadError
from ...home import HOME_VARIABLE, home
from ...text.json_text import parse_json
from .header import GGUFHeader, read_header

logger = logging.getLogger(__name__)

FORMAT = "v1"  # raise it when the conversion or transformers' major version changes
MANIFEST = "manifest.json"
HEAD_BYTES = 8 << 20  # compared at each use: all of a small file, and the header of a large one
SPARE_BYTES = 128 << 20  # disk space for tokenizer and configuration
RECENT_NS = 2_000_000_000  # a file changed since then may change again within one tick of its file system's clock

Facts = dict[str, Any]


def gguf_digest(file: Path) -> str:
    """Return the SHA-256 of a GGUF file as hex digits. It is computed once for each file.

    Raises:
        ModelLoadError: the file cannot be read, or is no GGUF file.
    """
    cache, facts = home() / "gguf", _file_facts(file)
    digest = _remembered_digest(cache, facts)
    if digest is None:
        read_header(file)  # rejects a bad file before gigabytes are read
        digest = _sha256(file)
        _remember_digest(cache, facts, digest)
    return digest


def converted_folder(file: Path, *, weights: bool = True) -> Path:
    """Return the model folder of GGUF ``file``, and convert the file if that has not been done yet.

    Args:
        weights: convert the weights too; otherwise the folder has only configuration and tokenizer.

    Raises:
        ModelLoadError: the file cannot be read or converted, or the cache cannot be written to.
    """
    cache, facts = home() / "gguf", _file_facts(file)
    entry = cache / f"{gguf_digest(file)}-{FORMAT}{'' if weights else '-text'}"
    if _damage(entry) is not None:
        header = read_header(file)
        with _cache_write_errors(file, cache):
            cache.mkdir(parents=True, exist_ok=True)
            with FileLock(entry.with_suffix(".lock")):
                _build(file, header, facts, entry, weights=weights)
    return entry


def _build(file: Path, header: GGUFHeader, facts: Facts, entry: Path, *, weights: bool) -> None:
    """Convert ``file`` into ``entry``. The caller holds the lock of ``entry``."""
    damage = _damage(entry)
    if damage is None:
        return  # another process was faster
    if entry.exists():
        logger.warning("the converted copy of %r is damaged (%s); converting it again", file.name, damage)
        shutil.rmtree(entry)
    _remove_leftovers(entry)
    from .convert import convert, storage_dtype

    needed = SPARE_BYTES + (header.parameters * storage_dtype(header).itemsize if weights else 0)
    free = shutil.disk_usage(entry.parent).free
    if free < needed:
        raise ModelLoadError(
            f"converting {file.name!r} needs {needed / 1e9:.1f} GB in {str(entry.parent)!r}, but {free / 1e9:.1f} GB "
            f"are free; free some space, or set {HOME_VARIABLE} to a folder on another disk."
        )
    part = "" if weights else "the tokenizer of "
    logger.warning("converting %s%r once; the result is kept in %s", part, file.name, entry.parent)
    folder = entry.with_suffix(".tmp")
    try:
        folder.mkdir()
        convert(file, header, folder, weights=weights)
        if _file_facts(file) != facts:
            raise ModelLoadError(f"{str(file)!r} changed while it was read; load it again.")
        _seal(folder)
        folder.replace(entry)
        _sync_folder(entry.parent)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _remove_leftovers(entry: Path) -> None:
    """Remove the folders of conversions that were killed. The caller holds the lock of ``entry``."""
    for folder in entry.parent.glob("*.tmp"):
        if folder == entry.with_suffix(".tmp"):
            shutil.rmtree(folder)
            continue
        with contextlib.suppress(Timeout), FileLock(folder.with_suffix(".lock"), timeout=0):  # locked: in progress
            shutil.rmtree(folder)


# Files of an entry


def _seal(folder: Path) -> None:
    """Write the manifest of all files, and wait until everything is on the disk."""
    files = {path.name: _describe(path) for path in sorted(folder.iterdir())}
    (folder / MANIFEST).write_text(json.dumps(files, indent=2), encoding="utf-8")
    for name in (*files, MANIFEST):
        shutil.copymode(folder / MANIFEST, folder / name)  # safetensors creates files that only their owner can read
        with (folder / name).open("rb+") as stream:
            os.fsync(stream.fileno())
    _sync_folder(folder)


def _describe(path: Path) -> Facts:
    stat = path.stat()
    return {"bytes": stat.st_size, "mtime_ns": stat.st_mtime_ns, "head": _checksum(path, HEAD_BYTES),
            "all": _checksum(path)}  # fmt: skip


def _damage(entry: Path) -> str | None:
    """Return why an entry cannot be used, or None if it is intact.

    Only the head of each file is read, unless its modification time differs from the manifest.
    """
    try:
        files = parse_json((entry / MANIFEST).read_text(encoding="utf-8"))
        damaged = (name for name, facts in files.items() if not _is_intact(entry / name, facts))
        return next((f"{name} has changed" for name in damaged), None)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{type(error).__name__}: {error}"


def _is_intact(path: Path, facts: Facts) -> bool:
    stat = path.stat()
    if stat.st_size != facts["bytes"] or _checksum(path, HEAD_BYTES) != facts["head"]:
        return False
    if stat.st_mtime_ns == facts["mtime_ns"]:
        return True
    if _checksum(path) != facts["all"]:
        return False
    with contextlib.suppress(OSError):  # a copied cache: restore the time, so that the next check is quick
        os.utime(path, ns=(stat.st_atime_ns, facts["mtime_ns"]))
    return True


def _checksum(path: Path, most: int | None = None) -> str:
    """Return the hexadecimal xxh3-128 of the first ``most`` bytes of a file, or of the whole file."""
    with path.open("rb") as stream:
        if most is not None:
            return xxhash.xxh3_128_hexdigest(stream.read(most))
        return hashlib.file_digest(stream, xxhash.xxh3_128).hexdigest()  # pyright: ignore[reportArgumentType]


def _sync_folder(folder: Path) -> None:
    with contextlib.suppress(OSError):  # impossible on Windows
        number = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(number)
        finally:
            os.close(number)


# Digests of GGUF files


def _file_facts(file: Path) -> Facts:
    """Return the properties of a file that change when its content does."""
    with _read_errors(file):
        stat = file.stat()
    return {"path": str(file.resolve()), "bytes": stat.st_size, "mtime_ns": stat.st_mtime_ns,
            "ctime_ns": stat.st_ctime_ns}  # fmt: skip


def _sha256(file: Path) -> str:
    with _read_errors(file), file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _remembered_digest(cache: Path, facts: Facts) -> str | None:
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        record = parse_json(_digest_file(cache, facts).read_text(encoding="utf-8"))
        if record["file"] == facts:
            return record["sha256"]
    return None


def _remember_digest(cache: Path, facts: Facts, digest: str) -> None:
    """Store a digest, so that the next use does not read the whole file. A cache that is not writable is ignored."""
    if time.time_ns() - max(facts["mtime_ns"], facts["ctime_ns"]) < RECENT_NS:
        return
    with contextlib.suppress(OSError):
        path = _digest_file(cache, facts)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"file": facts, "sha256": digest}), encoding="utf-8")


def _digest_file(cache: Path, facts: Facts) -> Path:
    return cache / "digests" / f"{xxhash.xxh3_128_hexdigest(facts['path'].encode())}.json"


# Errors


@contextmanager
def _read_errors(file: Path) -> Generator[None, None, None]:
    try:
        yield
    except OSError as error:
        raise ModelLoadError(f"{str(file)!r} cannot be read: {error.strerror or error}.") from error


@contextmanager
def _cache_write_errors(file: Path, cache: Path) -> Generator[None, None, None]:
    """Turn errors of writing to the cache, which several libraries raise, into ModelLoadError."""
    try:
        yield
    except KVFusionError:
        raise
    except Exception as error:
        cause = " ".join(str(error).split())[:300]
        raise ModelLoadError(
            f"the converted {file.name!r} cannot be written to {str(cache)!r}: {cause}; free space there, or set "
            f"{HOME_VARIABLE} to another folder."
        ) from error
