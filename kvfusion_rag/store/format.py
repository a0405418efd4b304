"""One document's KV as the bytes of one file, and back. Knows no disk and no store.

A file is a safetensors file (keys, values, token ids) whose header is a function of what it should hold, but for a
checksum: so a reader that knows what it asks for compares the header byte for byte, and never parses what it found.
Data is laid out as in memory, (L, H_kv, T, d), so that some layers of it are read in one piece.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import xxhash

from ..model.kv import DocumentKV, KVShape

FORMAT_VERSION = 2
Codec = Literal["raw", "v8"]
CODECS: tuple[Codec, ...] = ("raw", "v8")
Buffer = memoryview | bytes | bytearray

_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
_INFINITY = {torch.float32: 0x7F80_0000, torch.bfloat16: 0x7F80, torch.float16: 0x7C00}  # its bits
_UNKNOWN = "0" * 32  # stands for the checksum in the header that is compared
_ALIGNMENT = 64  # bytes; of the data in the file


@dataclass(frozen=True, slots=True)
class Layout:
    """Where the parts of a document's file lie.

    Attributes:
        header: its bytes, with zeros for the checksum, which stands at ``checksum_at``.
        sizes: bytes of keys, values, scales (codec "v8") and token ids, in the order of the file.
    """

    header: bytes
    checksum_at: int
    sizes: tuple[int, int, int, int]

    @property
    def total(self) -> int:
        """Bytes of the file."""
        return len(self.header) + sum(self.sizes)


def layout(key: str, tokens: int, shape: KVShape, codec: Codec) -> Layout:
    """The layout of the file of a document of ``tokens`` tokens under ``key``."""
    grid = [shape.layers, shape.heads, tokens]
    full = shape.nbytes(tokens) // 2
    small = full // shape.dtype.itemsize
    values = ("I8", small) if codec == "v8" else (_NAMES[shape.dtype], full)
    scales = 4 * shape.layers * shape.heads * tokens if codec == "v8" else 0
    parts: list[tuple[str, str, list[int], int]] = [
        ("keys", _NAMES[shape.dtype], [*grid, shape.width], full),
        ("values", values[0], [*grid, shape.width], values[1]),
        ("scales", "F32", grid, scales),
        ("token_ids", "I32", [tokens], 4 * tokens),
    ]
    facts = {"format": f"kvfusion-document-kv/{FORMAT_VERSION}", "codec": codec, "key": key, "xxh3_128": _UNKNOWN}
    described: dict[str, object] = {"__metadata__": facts}
    begin = 0
    for name, dtype, dimensions, size in parts:
        if size:
            described[name] = {"dtype": dtype, "shape": dimensions, "data_offsets": [begin, begin + size]}
        begin += size
    text = json.dumps(described, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % _ALIGNMENT)
    header = len(text).to_bytes(8, "little") + text
    found = header.index(b'"xxh3_128":"') + len(b'"xxh3_128":"')
    return Layout(header, found, (parts[0][3], parts[1][3], parts[2][3], parts[3][3]))


def checksum(header: bytes, parts: Iterable[Buffer]) -> bytes:
    """xxh3-128 in hex over the header (with zeros for the checksum) and all data."""
    digest = xxhash.xxh3_128(header)
    for part in parts:
        digest.update(part)
    return digest.hexdigest().encode()


def encode(key: str, document: DocumentKV, codec: Codec) -> list[Buffer]:
    """The file of a document as buffers to be written one after the other.

    Args:
        document: on any device; keys and values are finite.
    """
    keys, values = document.keys.cpu().contiguous(), document.values.cpu().contiguous()
    plan = layout(key, document.num_tokens, KVShape.of(document), codec)
    data: list[Buffer] = [as_bytes(keys)]
    if codec == "v8":
        small, scales = compress(values)
        data += [as_bytes(small), as_bytes(scales)]
    else:
        data.append(as_bytes(values))
    data.append(token_bytes(document.token_ids))
    header = bytearray(plan.header)
    header[plan.checksum_at : plan.checksum_at + len(_UNKNOWN)] = checksum(plan.header, data)
    return [header, *data]


def compress(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Values (L, H_kv, T, d) as int8, and one float32 scale a token and head, (L, H_kv, T, 1)."""
    wide = values.float()
    scales = wide.abs().amax(dim=-1, keepdim=True) / 127
    small = (wide / scales.clamp(min=1e-30)).round().clamp(-127, 127)
    return small.to(torch.int8), scales


def expand(small: torch.Tensor, scales: torch.Tensor, into: torch.Tensor) -> None:
    """The inverse of :func:`compress`, up to its rounding, written to ``into``."""
    into.copy_(small.float().mul_(scales))


def scratch(document: DocumentKV) -> tuple[torch.Tensor, torch.Tensor]:
    """Room for the compressed values of ``document``, scales as (L, H_kv, T, 1)."""
    small = torch.empty(document.values.shape, dtype=torch.int8)
    return small, torch.empty((*document.values.shape[:3], 1), dtype=torch.float32)


def is_finite(*tensors: torch.Tensor) -> bool:
    """Whether every number is one: neither infinite nor NaN."""
    return all(
        are_finite(bits(tensor), tensor.dtype) if tensor.device.type == "cpu" else bool(torch.isfinite(tensor).all())
        for tensor in tensors
    )


def are_finite(numbers: np.ndarray, dtype: torch.dtype) -> bool:
    """Whether the numbers with these :func:`bits` are: neither infinite nor NaN.

    Those that are not are the largest of the positive and, seen as unsigned, of the negative ones. Nothing overflows
    here, as a sum may, and nothing is done by several threads, which would disturb those that read files.
    """
    if dtype == torch.int8:
        return True
    unsigned, infinity = numbers.view(f"u{numbers.itemsize}"), _INFINITY[dtype]
    return bool(numbers.max() < infinity) and bool(unsigned.max() < infinity + (1 << 8 * numbers.itemsize - 1))


def bits(tensor: torch.Tensor) -> np.ndarray:
    """A CPU tensor's numbers as signed integers of their width, without a copy."""
    return tensor.detach().view({1: torch.int8, 2: torch.int16, 4: torch.int32}[tensor.itemsize]).numpy()


def token_bytes(token_ids: Sequence[int]) -> bytes:
    return np.asarray(token_ids, dtype="<i4").tobytes()


def as_bytes(tensor: torch.Tensor) -> memoryview:
    """A contiguous CPU tensor's bytes, without a copy."""
    return tensor.detach().view(-1).view(torch.uint8).numpy().data.cast("B")
