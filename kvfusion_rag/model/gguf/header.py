"""Reads the header of a GGUF file, and rejects a file that cannot be converted in bounded time and memory.

A GGUF file consists of a magic number, counts, metadata, a table of tensors and their data. The file itself gives each
count and length. Other readers trust these numbers, so they are checked here first. Imports neither torch nor
transformers. Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import math
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...errors import ModelLoadError

MAGIC = b"GGUF"
LFS_POINTER = b"version https://git-lfs.github.com/spec/"  # stands in for a large file that was not downloaded
VERSIONS = (2, 3)
MAX_HEADER_BYTES = 64 << 20
MAX_ARRAY_ITEMS = 1 << 22  # in all arrays together; Gemma 3 has 1.3 million (vocabulary, scores, types and merges)
MAX_ITEM_BYTES = 4096  # in one string of an array, such as a token
MAX_NAME_BYTES = 1024
MAX_TENSORS = 1 << 16
MAX_DIMENSIONS = 4
MAX_COUNTS = {"block_count": 1024, "expert_count": 4096}  # transformers builds an object for each

_STRING, _ARRAY = 8, 9
_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
_UINT32 = 4


@dataclass(frozen=True, slots=True)
class GGUFHeader:
    """The contents of a header.

    Attributes:
        metadata: keys and values. An array is represented by its number of items.
        parameters: number of parameters in all tensors together.
    """

    metadata: dict[str, Any]
    parameters: int

    def token_id(self, name: str) -> int | None:
        """Return the id of the special token ``name``, such as "eot"."""
        value = self.metadata.get(f"tokenizer.ggml.{name}_token_id")
        return value if isinstance(value, int) else None


def read_header(file: Path) -> GGUFHeader:
    """Read and check the header of ``file``.

    Raises:
        ModelLoadError: the file cannot be read, is not a GGUF file, is incomplete, is one of several parts, or has a
            number that no real model has.
    """
    try:
        with file.open("rb") as stream:
            start = stream.read(len(LFS_POINTER))
            if start == LFS_POINTER:
                raise ModelLoadError(
                    f"{file.name!r} is a Git LFS pointer, not the file itself; run 'git lfs pull' in its folder, or "
                    "download the file."
                )
            if not start.startswith(MAGIC):
                raise ModelLoadError(f"{file.name!r} is not a GGUF file: it does not start with the bytes 'GGUF'.")
            with mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return _Parser(file.name, data).header()
    except OSError as error:
        raise ModelLoadError(f"{str(file)!r} cannot be read: {error.strerror or error}.") from error


class _Parser:
    """Reads one field after another. Each read checks that the file is long enough."""

    def __init__(self, name: str, data: mmap.mmap) -> None:
        self.name = name
        self.data = data
        self.at = len(MAGIC)
        self.end = min(len(data), MAX_HEADER_BYTES)
        self.items_left = MAX_ARRAY_ITEMS

    def header(self) -> GGUFHeader:
        version = self._number("<I")
        if version not in VERSIONS:
            known = " and ".join(map(str, VERSIONS))
            raise self._error(f"has GGUF version {version}, but only versions {known} (little-endian) can be read")
        tensor_count, field_count = self._number("<Q"), self._number("<Q")
        if tensor_count > MAX_TENSORS:
            raise self._error(f"claims to contain {tensor_count} tensors, but at most {MAX_TENSORS} can be read")
        metadata: dict[str, Any] = {}
        types: dict[str, int] = {}
        for _ in range(field_count):  # each field takes up bytes, so a false count cannot read beyond the header
            key = self._text(MAX_NAME_BYTES, "a metadata key")
            types[key] = self._number("<I")
            metadata[key] = self._value(key, types[key])
        self._check_metadata(metadata)
        if types.get("general.alignment", _UINT32) != _UINT32:
            raise self._error("has a general.alignment that is not a 32-bit number")
        parameters = self._check_tensors(tensor_count, metadata.get("general.alignment", 32))
        if tensor_count == 0:
            raise self._error("has no weights, only a vocabulary; name the GGUF file of a whole model")
        return GGUFHeader(metadata, parameters)

    def _check_metadata(self, metadata: dict[str, Any]) -> None:
        parts = metadata.get("split.count", 1)
        if parts != 1:
            raise self._error(f"is one of {parts!r:.50} parts of a model; join them with llama-gguf-split --merge")
        if metadata.get("general.type") == "adapter":
            raise self._error(
                "is a LoRA adapter (general.type is 'adapter'), not a model; adapters are read in peft's format, from "
                "the folder that adapter= names"
            )
        if metadata.get("general.type") == "mmproj" or metadata.get("general.architecture") == "clip":
            raise self._error(
                "has only the image part of a multimodal model (mmproj); name the GGUF file of its text model"
            )
        if not isinstance(metadata.get("general.architecture"), str):
            raise self._error("does not name its architecture (general.architecture)")
        for name, most in MAX_COUNTS.items():
            value = metadata.get(f"{metadata['general.architecture']}.{name}", 0)
            if not isinstance(value, int) or not 0 <= value <= most:
                raise self._error(f"has a {name} of {value!r:.50}, but it must be a number up to {most}")

    def _check_tensors(self, count: int, alignment: int) -> int:
        """Check that all tensors are inside the file and do not overlap, and return the number of parameters."""
        if alignment < 1 or alignment & (alignment - 1):
            raise self._error(f"has an alignment of {alignment}, but it must be a power of two")
        blocks = _block_sizes()
        tensors = [self._tensor(blocks) for _ in range(count)]
        start = -(-self.at // alignment) * alignment
        previous_end = start
        for offset, size, name in sorted((offset, size, name) for name, offset, size, _ in tensors):
            begin, end = start + offset, start + offset + size
            if end > len(self.data):
                raise self._error(
                    f"is incomplete: tensor {name!r} ends at byte {end}, but the file has {len(self.data)}; "
                    "download the file again"
                )
            if offset % alignment or begin < previous_end:
                raise self._error(f"is damaged: tensor {name!r} overlaps another or is not aligned")
            previous_end = end
        return sum(numbers for *_, numbers in tensors)

    def _tensor(self, blocks: dict[int, tuple[int, int]]) -> tuple[str, int, int, int]:
        """Return the name, offset, bytes and number of parameters of the next tensor in the table."""
        name = self._text(MAX_NAME_BYTES, "a tensor's name")
        dimensions = self._number("<I")
        if not 1 <= dimensions <= MAX_DIMENSIONS:
            raise self._error(f"is damaged: tensor {name!r} has {dimensions} dimensions")
        shape = [self._number("<Q") for _ in range(dimensions)]  # fastest axis first
        kind, offset = self._number("<I"), self._number("<Q")
        if kind not in blocks:
            raise self._error(f"contains tensor {name!r} in the unknown format {kind}")
        block, block_bytes = blocks[kind]
        numbers = math.prod(shape)
        if not numbers or shape[0] % block:
            raise self._error(f"is damaged: tensor {name!r} has the shape {shape}, which is not whole blocks")
        return name, offset, numbers // block * block_bytes, numbers

    def _value(self, key: str, kind: int) -> Any:
        if kind in _SCALARS:
            return self._number(_SCALARS[kind])
        if kind == _STRING:
            return self._text(MAX_HEADER_BYTES, key)
        if kind != _ARRAY:
            raise self._error(f"is damaged: {key!r} has the unknown type {kind}")
        item_kind, count = self._number("<I"), self._number("<Q")
        if count > self.items_left:
            raise self._error(f"claims more than {MAX_ARRAY_ITEMS} items in its metadata arrays ({key!r})")
        self.items_left -= count
        if item_kind in _SCALARS:
            self._take(count * struct.calcsize(_SCALARS[item_kind]))
        elif item_kind == _STRING:
            for _ in range(count):
                self._text(MAX_ITEM_BYTES, key)
        else:
            raise self._error(f"is damaged: {key!r} is an array of type {item_kind}, which cannot be read")
        return count

    def _number(self, form: str) -> Any:
        return struct.unpack_from(form, self.data, self._take(struct.calcsize(form)))[0]

    def _text(self, longest: int, what: str) -> str:
        length = self._number("<Q")
        if length > longest:
            raise self._error(f"is damaged: {what} has {length} bytes, but at most {longest} can be read")
        start = self._take(length)
        try:
            return self.data[start : start + length].decode()
        except UnicodeDecodeError as error:
            raise self._error(f"is damaged: {what} is not UTF-8") from error

    def _take(self, size: int) -> int:
        """Skip ``size`` bytes and return their offset."""
        start = self.at
        if start + size > self.end:
            if self.end < len(self.data):
                raise self._error(f"has a header of more than {MAX_HEADER_BYTES >> 20} MiB, which is not read")
            raise self._error("is incomplete: it ends within its header; download the file again")
        self.at += size
        return start

    def _error(self, reason: str) -> ModelLoadError:
        return ModelLoadError(f"{self.name!r} {reason}.")


def _block_sizes() -> dict[int, tuple[int, int]]:
    """Return the number of parameters and of bytes per block, for each tensor format."""
    try:
        from gguf import GGML_QUANT_SIZES
    except ImportError as error:
        raise ModelLoadError(
            "GGUF files need the package gguf, which is not installed; run: pip install gguf."
        ) from error
    return {int(kind): sizes for kind, sizes in GGML_QUANT_SIZES.items()}
