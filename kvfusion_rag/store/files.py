"""Reading, writing and checking the file of one document: system calls over what ``format.py`` lays out."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path, PurePath
from typing import BinaryIO

import numpy as np
import xxhash

from ..model.kv import DocumentKV
from .format import Buffer, Codec, Layout, are_finite, bits, expand, is_finite, scratch, token_bytes

SUFFIX = ".safetensors"
_MOST_BUFFERS = 1024  # of one writev
_PIECE = 2 << 20  # bytes that are read and checked together: they stay in the processor's cache
_LONGEST_HEADER = 1 << 16  # bytes


class Miss(StrEnum):
    """Why a document was not found."""

    ABSENT = "absent"
    TRUNCATED = "truncated"  # or longer than it should be
    HEADER = "header"  # of another document, model or format
    CHECKSUM = "checksum"
    TOKENS = "tokens"
    NUMBERS = "numbers"  # infinite or not a number
    UNREADABLE = "unreadable"  # the system's error
    LATE = "late"  # a remote store took too long
    PAUSED = "paused"  # a remote store is left alone for a while, after a fault
    SLOWER = "slower"  # than computing it again


def read_file(place: int, plan: Layout, into: DocumentKV, codec: Codec) -> Miss | None:
    """Read the file that is open at ``place`` into ``into`` and check it.

    It goes piece by piece, so that what was read is still in the processor's cache when it is checked and put into
    place, and by numpy alone: a call of torch on a piece would cost as much as the work itself. A piece is one buffer
    even where its place is not: Python's lock is let go for large buffers alone, so heads one by one would keep the
    other threads that read from working.
    """
    if os.fstat(place).st_size != plan.total:
        return Miss.TRUNCATED
    header, end = bytearray(len(plan.header)), plan.checksum_at + 32
    if not _read(place, header, 0):
        return Miss.TRUNCATED
    written = bytes(header[plan.checksum_at : end])
    header[plan.checksum_at : end] = plan.header[plan.checksum_at : end]
    if header != plan.header:
        return Miss.HEADER
    small = scratch(into) if codec == "v8" else None
    digest, offset, finite = xxhash.xxh3_128(header), len(header), True
    room: np.ndarray | None = None  # for keys and values, which have one shape
    for tensor in (into.keys, *((into.values,) if small is None else small)):
        numbers = bits(tensor)
        layers = max(1, _PIECE * len(numbers) // numbers.nbytes)  # of a piece
        if not numbers.flags.c_contiguous and room is None:
            room = np.empty((min(layers, len(numbers)), *numbers.shape[1:]), numbers.dtype)
        for first in range(0, len(numbers), layers):
            part = numbers[first : first + layers]
            piece = part if room is None or numbers.flags.c_contiguous else room[: len(part)]
            data = piece.data.cast("B")
            if not _read(place, data, offset):
                return Miss.TRUNCATED
            digest.update(data)
            finite = finite and are_finite(piece, tensor.dtype)
            if piece is not part:
                part[...] = piece
            offset += part.nbytes
    ids = bytearray(plan.sizes[3])
    if not _read(place, ids, offset):
        return Miss.TRUNCATED
    digest.update(ids)
    if digest.hexdigest().encode() != written:
        return Miss.CHECKSUM
    if ids != token_bytes(into.token_ids):
        return Miss.TOKENS
    if small is not None:
        expand(small[0], small[1], into.values)
        finite = finite and is_finite(into.values)
    return None if finite else Miss.NUMBERS


def _read(place: int, buffer: Buffer, offset: int) -> bool:
    """Fill ``buffer`` from ``offset`` of the file on; whether there was enough."""
    todo = memoryview(buffer)
    while len(todo):
        count = os.preadv(place, [todo], offset)
        if count == 0:
            return False
        offset, todo = offset + count, todo[count:]
    return True


def write_all(place: int, buffers: Sequence[Buffer]) -> None:
    """Write all buffers one after the other."""
    todo = [memoryview(part).cast("B") for part in buffers if len(part)]
    while todo:
        count = os.writev(place, todo[:_MOST_BUFFERS])
        if count == 0:
            raise OSError(errno.EIO, "nothing could be written")
        todo = _after(todo, count)


def _after(buffers: Sequence[memoryview], count: int) -> list[memoryview]:
    """What is left of ``buffers`` behind the first ``count`` bytes."""
    for number, part in enumerate(buffers):
        if count < len(part):
            return [part[count:], *buffers[number + 1 :]]
        count -= len(part)
    return []


def check_alone(file: Path) -> Miss | None:
    """Whether a file is whole and stands under its own name, without a model to compare it with.

    Raises:
        FileNotFoundError: it has left meanwhile.
    """
    try:
        with file.open("rb") as stream:
            return check_stream(stream, file)
    except FileNotFoundError:
        raise
    except OSError:
        return Miss.UNREADABLE


def check_stream(stream: BinaryIO, file: PurePath) -> Miss | None:
    """As :func:`check_alone`, of the bytes of ``file``."""
    try:
        length = int.from_bytes(stream.read(8), "little")
        if not 2 <= length <= _LONGEST_HEADER:
            return Miss.HEADER
        header = bytearray(length.to_bytes(8, "little") + stream.read(length))
        facts = json.loads(header[8:])["__metadata__"]
        if facts["key"] != f"{file.parts[-3]}-{file.name.removesuffix(SUFFIX)}":
            return Miss.HEADER
        place = header.index(f'"xxh3_128":"{facts["xxh3_128"]}"'.encode()) + len('"xxh3_128":"')
        header[place : place + 32] = b"0" * 32
        digest = xxhash.xxh3_128(header)
        while part := stream.read(1 << 20):
            digest.update(part)
        return None if digest.hexdigest() == facts["xxh3_128"] else Miss.CHECKSUM
    except (ValueError, KeyError, TypeError, RecursionError):  # no JSON, or not ours
        return Miss.HEADER
