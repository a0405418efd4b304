"""The file format of one document KV: name, layout, encoding, reading and checking.

A file is a safetensors file with keys, values and token ids. Apart from a checksum and the digest of the environment
that computed it, its header is a function of the key and the shape, so a reader compares the header byte for byte and
never parses it. Tensors are stored as they lie in memory, (L, H_kv, T, d), so that several layers can be read at once.
"""

from __future__ import annotations

import errno
import json
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import BinaryIO, Literal

import numpy as np
import torch
import xxhash

from ..errors import InvalidInputError
from ..model.kv import DocumentKV, KVShape
from ..text.json_text import parse_json
from .keys import PATH_PATTERN, path_of
from .metrics import Miss

FORMAT_VERSION = 4
SUFFIX = ".safetensors"
Codec = Literal["raw", "v8"]
CODECS: tuple[Codec, ...] = ("raw", "v8")
Buffer = memoryview | bytes | bytearray
Accepts = Callable[[str], bool]  # whether a KV from the environment with this digest may be used

_FILE_NAME = re.compile(rf"v{FORMAT_VERSION}-(?:{'|'.join(CODECS)})/{PATH_PATTERN}{re.escape(SUFFIX)}")
_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.uint8: "U8"}
_INFINITY = {torch.float32: 0x7F80_0000, torch.bfloat16: 0x7F80, torch.float16: 0x7C00}  # bit patterns
NO_ENVIRONMENT = "0" * 16  # digest of an unknown environment
_CHECKSUM_FIELD = b'"xxh3_128":"'
_CHECKSUM_BYTES = 32  # hex digits
_ENVIRONMENT_FIELD = b'"environment":"'
_ENVIRONMENT_BYTES = len(NO_ENVIRONMENT)
_ENVIRONMENT = re.compile(rb"[0-9a-f]{16}")
_ALIGNMENT = 64  # in bytes, of the tensor data in the file
_MAX_HEADER_BYTES = 1 << 16
_PIECE_BYTES = 2 << 20  # read and checked at a time, so that the data is still in the processor's cache
_MAX_BUFFERS = 1024  # limit of one writev call


@dataclass(frozen=True, slots=True)
class Layout:
    """Positions and sizes of the parts of a document's file.

    Attributes:
        header: bytes of the header, with zeros as the checksum and as the environment's digest.
        checksum_at, environment_at: slices of the header with these two.
        sizes: bytes of keys, values, scales (codec "v8" only) and token ids, in file order.
    """

    header: bytes
    checksum_at: slice
    environment_at: slice
    sizes: tuple[int, int, int, int]

    @property
    def total(self) -> int:
        """Size of the file in bytes."""
        return len(self.header) + sum(self.sizes)


def require_codec(codec: object) -> None:
    """Raise InvalidInputError if ``codec`` is unknown."""
    if codec not in CODECS:
        raise InvalidInputError(f"codec is {codec!r}, but it must be one of {list(CODECS)}.")


def file_name(key: str, codec: Codec) -> str:
    """Return the name of a document's file, which is its path below the folder of a store.

    Raises:
        InvalidInputError: ``key`` is not a document key.
    """
    return f"v{FORMAT_VERSION}-{codec}/{path_of(key)}{SUFFIX}"


def namespace_of(name: object) -> str | None:
    """Return the namespace key in the name of a document's file, or None if :func:`file_name` returns no such name.

    Names from an index or a listing are checked with this before they become paths.
    """
    found = _FILE_NAME.fullmatch(name) if isinstance(name, str) else None
    return None if found is None else found["namespace"]


def layout(key: str, tokens: int, shape: KVShape, codec: Codec) -> Layout:
    """Return the layout of the file of a document with ``tokens`` tokens."""
    grid = [shape.layers, shape.heads, tokens]
    value_bytes = shape.value_bytes(tokens)
    values = ("I8", value_bytes // shape.dtype.itemsize) if codec == "v8" else (_NAMES[shape.dtype], value_bytes)
    scale_bytes = 4 * shape.layers * shape.heads * tokens if codec == "v8" else 0
    parts: list[tuple[str, str, list[int], int]] = [
        ("keys", _NAMES[shape.dtype], [*grid, shape.key_width], shape.key_bytes(tokens)),
        ("values", values[0], [*grid, shape.value_width], values[1]),
        ("scales", "F32", grid, scale_bytes),
        ("token_ids", "I32", [tokens], 4 * tokens),
    ]
    checksum = "0" * _CHECKSUM_BYTES
    facts = {"format": f"kvfusion-document-kv/{FORMAT_VERSION}", "codec": codec, "key": key,
             "environment": NO_ENVIRONMENT, "xxh3_128": checksum}  # fmt: skip
    described: dict[str, object] = {"__metadata__": facts}
    begin = 0
    for name, dtype, dimensions, size in parts:
        if size:
            described[name] = {"dtype": dtype, "shape": dimensions, "data_offsets": [begin, begin + size]}
        begin += size
    text = json.dumps(described, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % _ALIGNMENT)
    header = len(text).to_bytes(8, "little") + text
    sizes = (parts[0][3], parts[1][3], parts[2][3], parts[3][3])
    checksum_at = _behind(header, _CHECKSUM_FIELD, _CHECKSUM_BYTES)
    return Layout(header, checksum_at, _behind(header, _ENVIRONMENT_FIELD, _ENVIRONMENT_BYTES), sizes)


def _behind(header: bytes | bytearray, field: bytes, length: int) -> slice:
    """Return the slice of the ``length`` bytes behind ``field``."""
    begin = header.index(field) + len(field)
    return slice(begin, begin + length)


def encode(key: str, document: DocumentKV, codec: Codec, environment: str = NO_ENVIRONMENT) -> list[Buffer]:
    """Return the contents of a document's file as buffers to be written one after another.

    Args:
        key: store key of the document.
        document: keys and values, all finite, on any device.
        codec: form of the values.
        environment: digest of the environment that computed the document, 16 hex digits.
    """
    keys, values = document.keys.cpu().contiguous(), document.values.cpu().contiguous()
    plan = layout(key, document.num_tokens, KVShape.of(document), codec)
    tensors = [keys, *(compress(values) if codec == "v8" else [values])]
    data: list[Buffer] = [*map(_as_bytes, tensors), _token_bytes(document.token_ids)]
    header = bytearray(plan.header)
    header[plan.environment_at] = environment.encode()
    digest = xxhash.xxh3_128(header)
    for part in data:
        digest.update(part)
    header[plan.checksum_at] = digest.hexdigest().encode()
    return [header, *data]


def compress(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return values (L, H_kv, T, d) as int8, and float32 scales (L, H_kv, T, 1), one per token and head."""
    wide = values.float()
    scales = wide.abs().amax(dim=-1, keepdim=True) / 127
    small = (wide / scales.clamp(min=1e-30)).round().clamp(-127, 127)
    return small.to(torch.int8), scales


def expand(small: torch.Tensor, scales: torch.Tensor, into: torch.Tensor) -> None:
    """Write the values that :func:`compress` has rounded to ``into``."""
    into.copy_(small.float().mul_(scales))


def is_finite(*tensors: torch.Tensor) -> bool:
    """Return whether the tensors contain neither infinities nor NaNs."""
    return all(
        _are_finite(_bits(tensor), tensor.dtype) if tensor.device.type == "cpu" else bool(torch.isfinite(tensor).all())
        for tensor in tensors
    )


def read_file(
    descriptor: int, plan: Layout, into: DocumentKV, codec: Codec, accepts: Accepts | None = None
) -> Miss | None:
    """Read an open file into ``into`` and check it. Return None if it is correct.

    If ``accepts`` is given, the file is read only if it accepts the digest of the environment that computed it.

    The file is read in pieces that are checked while they are in the processor's cache. Only numpy is used, because
    a call of torch costs as much as the work on one piece. Each piece is read into one buffer even if its destination
    is not contiguous: Python releases its lock only for large buffers, and other threads read at the same time.
    """
    if os.fstat(descriptor).st_size != plan.total:
        return Miss.TRUNCATED
    header = bytearray(len(plan.header))
    if not _fill(descriptor, header, 0):
        return Miss.TRUNCATED
    checksum, environment = bytes(header[plan.checksum_at]), bytes(header[plan.environment_at])
    header[plan.checksum_at] = plan.header[plan.checksum_at]
    digest = xxhash.xxh3_128(header)
    header[plan.environment_at] = plan.header[plan.environment_at]
    if bytes(header) != plan.header or not _ENVIRONMENT.fullmatch(environment):
        return Miss.HEADER
    if accepts is not None and not accepts(environment.decode()):
        return Miss.ENVIRONMENT
    compressed = _compressed_like(into.values) if codec == "v8" else None
    offset, finite = len(header), True
    scratch: np.ndarray | None = None
    for tensor in (into.keys, *((into.values,) if compressed is None else compressed)):
        numbers = _bits(tensor)
        layers = max(1, _PIECE_BYTES * len(numbers) // numbers.nbytes)  # per piece
        if not numbers.flags.c_contiguous and (scratch is None or scratch.shape[1:] != numbers.shape[1:]):
            scratch = np.empty((min(layers, len(numbers)), *numbers.shape[1:]), numbers.dtype)
        for first in range(0, len(numbers), layers):
            part = numbers[first : first + layers]
            piece = part if scratch is None or numbers.flags.c_contiguous else scratch[: len(part)]
            data = piece.data.cast("B")
            if not _fill(descriptor, data, offset):
                return Miss.TRUNCATED
            digest.update(data)
            finite = finite and _are_finite(piece, tensor.dtype)
            if piece is not part:
                part[...] = piece
            offset += part.nbytes
    ids = bytearray(plan.sizes[3])
    if not _fill(descriptor, ids, offset):
        return Miss.TRUNCATED
    digest.update(ids)
    if digest.hexdigest().encode() != checksum:
        return Miss.CHECKSUM
    if bytes(ids) != _token_bytes(into.token_ids):
        return Miss.TOKENS
    if compressed is not None:
        expand(*compressed, into.values)
        finite = finite and is_finite(into.values)
    return None if finite else Miss.NUMBERS


def write_all(descriptor: int, buffers: Sequence[Buffer]) -> None:
    """Write all buffers one after another."""
    left = [memoryview(part).cast("B") for part in buffers if len(part)]
    while left:
        count = os.writev(descriptor, left[:_MAX_BUFFERS])
        if count == 0:
            raise OSError(errno.EIO, "nothing could be written")
        while left and count >= len(left[0]):
            count -= len(left.pop(0))
        if left:
            left[0] = left[0][count:]


def check(stream: BinaryIO, size: int | None, path: PurePath) -> Miss | None:
    """Check a file's size and checksum, and that its key is that of ``path``. Return None if they are correct.

    If its header names another size, only the header is read.

    Args:
        stream: the open file.
        size: its size in bytes, or None if it is unknown.
        path: its path, of which the last three parts count.
    """
    try:
        length = int.from_bytes(stream.read(8), "little")
        if not 2 <= length <= _MAX_HEADER_BYTES:
            return Miss.HEADER
        header = bytearray(length.to_bytes(8, "little") + stream.read(length))
        described = parse_json(bytes(header[8:]))
        facts = described.pop("__metadata__")
        if facts["key"] != f"{path.parts[-3]}-{path.name.removesuffix(SUFFIX)}":
            return Miss.HEADER
        if size is not None and size != len(header) + max(part["data_offsets"][1] for part in described.values()):
            return Miss.TRUNCATED
        checksum_at = _behind(header, _CHECKSUM_FIELD, _CHECKSUM_BYTES)
        if header[checksum_at] != facts["xxh3_128"].encode():
            return Miss.HEADER
    except (ValueError, KeyError, TypeError, AttributeError, IndexError):
        return Miss.HEADER  # not JSON, or not one of our headers
    header[checksum_at] = b"0" * _CHECKSUM_BYTES
    digest = xxhash.xxh3_128(header)
    while part := stream.read(1 << 20):
        digest.update(part)
    return None if digest.hexdigest() == facts["xxh3_128"] else Miss.CHECKSUM


def _fill(descriptor: int, buffer: Buffer, offset: int) -> bool:
    """Fill ``buffer`` from ``offset`` of the file. Return False if the file ends earlier."""
    left = memoryview(buffer)
    while len(left):
        count = os.preadv(descriptor, [left], offset)
        if count == 0:
            return False
        offset, left = offset + count, left[count:]
    return True


def _compressed_like(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return uninitialized int8 values (L, H_kv, T, d) and scales (L, H_kv, T, 1)."""
    return torch.empty(values.shape, dtype=torch.int8), torch.empty((*values.shape[:3], 1), dtype=torch.float32)


def _are_finite(numbers: np.ndarray, dtype: torch.dtype) -> bool:
    """Return whether the numbers with these bits are neither infinite nor NaN.

    Infinities and NaNs are the largest signed integers among positive numbers, and the largest unsigned integers
    among negative ones. Unlike a sum this cannot overflow, and it starts no threads that would slow down readers.
    """
    if dtype in (torch.int8, torch.uint8):
        return True
    unsigned, infinity = numbers.view(f"u{numbers.itemsize}"), _INFINITY[dtype]
    return bool(numbers.max() < infinity) and bool(unsigned.max() < infinity + (1 << 8 * numbers.itemsize - 1))


def _bits(tensor: torch.Tensor) -> np.ndarray:
    """View the numbers of a CPU tensor as signed integers of the same width."""
    return tensor.detach().view({1: torch.int8, 2: torch.int16, 4: torch.int32}[tensor.itemsize]).numpy()


def _token_bytes(token_ids: Sequence[int]) -> bytes:
    return np.asarray(token_ids, dtype="<i4").tobytes()


def _as_bytes(tensor: torch.Tensor) -> memoryview:
    """View the bytes of a contiguous CPU tensor."""
    return tensor.detach().view(-1).view(torch.uint8).numpy().data.cast("B")
