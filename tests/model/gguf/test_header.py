"""Headers of GGUF files: truncated and hostile files are rejected quickly and with little memory."""

import struct
import tracemalloc

import pytest
from tiny_gguf import ARCHITECTURE, field, header, tensor, text

from kvfusion_rag import ModelLoadError
from kvfusion_rag.model.gguf.conversion_cache import converted_folder
from kvfusion_rag.model.gguf.header import MAX_ARRAY_ITEMS, MAX_ITEM_BYTES, MAX_TENSORS, read_header


def test_truncated_files_are_rejected(file, tmp_path):
    data = file.read_bytes()
    path = tmp_path / "cut.gguf"
    for end in [*range(0, 300, 7), *range(300, len(data), 9973), len(data) - 1]:
        path.write_bytes(data[:end])
        with pytest.raises(ModelLoadError, match=r"'cut.gguf' is (not a GGUF file|incomplete)"):
            read_header(path)
    path.write_bytes(data)
    assert read_header(path).parameters > 0


def number(size: str, value: int) -> bytes:
    return struct.pack(size, value)


def array(kind: int, count: int) -> bytes:
    return field("k", 9, struct.pack("<IQ", kind, count))


def with_fields(*fields: bytes) -> bytes:
    return header(ARCHITECTURE, *fields)


def with_tensors(*tensors: bytes, data: bytes = b"") -> bytes:
    return header(ARCHITECTURE, tensors=tensors, data=data)


HOSTILE = {
    "empty": (b"", "is not a GGUF file"),
    "foreign": (b"PK\x03\x04" + b"\0" * 100, "is not a GGUF file"),
    "old version": (header(version=1), "GGUF version 1"),
    "big-endian": (header(version=3 << 24), "GGUF version 50331648"),
    "tensor count": (header(ARCHITECTURE, counts=(1 << 63, 1)), f"at most {MAX_TENSORS} can be read"),
    "field count": (header(ARCHITECTURE, counts=(0, 1 << 63)), "is incomplete|is damaged"),
    "key length": (header(number("<Q", 1 << 60)), "is damaged: a metadata key has"),
    "text length": (header(field("k", 8, number("<Q", 1 << 50))), "is damaged: k has"),
    "text beyond the end": (header(field("k", 8, number("<Q", 1 << 20))), "is incomplete"),
    "text that is not UTF-8": (header(field("k", 8, text(b"\xff"))), "is not UTF-8"),
    "type": (header(field("k", 99, b"")), "unknown type 99"),
    "array length": (header(array(0, 1 << 60)), f"more than {MAX_ARRAY_ITEMS} items"),
    "array beyond the end": (header(array(0, 1 << 20)), "is incomplete"),
    "array of arrays": (header(array(9, 1)), "array of type 9"),
    "item length": (
        header(array(8, 1) + text(b"x" * (MAX_ITEM_BYTES + 1))), f"at most {MAX_ITEM_BYTES} can be read"
    ),
    "no architecture": (header(field("k", 0, b"\1")), "does not name its architecture"),
    "layers": (with_fields(field("llama.block_count", 4, number("<I", 1 << 31))), "has a block_count of 2147483648"),
    "part": (with_fields(field("split.count", 2, number("<H", 3))), "is one of 3 parts.*--merge"),
    "adapter": (with_fields(field("general.type", 8, text("adapter"))), "is a LoRA adapter.*peft's format"),
    "projector": (with_fields(field("general.type", 8, text("mmproj"))), "only the image part.*its text model"),
    "older projector": (header(field("general.architecture", 8, text("clip"))), "only the image part.*its text model"),
    "vocabulary": (header(ARCHITECTURE), "has no weights, only a vocabulary"),
    "Git LFS pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "is a Git LFS pointer"),
    "alignment": (with_fields(field("general.alignment", 4, number("<I", 3))), "has an alignment of 3"),
    "alignment of zero": (with_fields(field("general.alignment", 4, number("<I", 0))), "has an alignment of 0"),
    "alignment as text": (with_fields(field("general.alignment", 8, text("32"))), "not a 32-bit number"),
    "dimensions": (with_tensors(tensor("t", (1,) * 9)), "has 9 dimensions"),
    "shape of zero": (with_tensors(tensor("t", (0,))), "not whole blocks"),
    "part of a block": (with_tensors(tensor("t", (33,), 8), data=b"x" * 99), "not whole blocks"),
    "huge shape": (with_tensors(tensor("t", (1 << 62, 1 << 62))), "is incomplete: tensor 't'"),
    "format": (with_tensors(tensor("t", (4,), 999)), "in the unknown format 999"),
    "offset": (with_tensors(tensor("t", (4,), offset=1 << 62), data=b"x" * 16), "is incomplete: tensor 't'"),
    "unaligned": (with_tensors(tensor("t", (4,), offset=8), data=b"x" * 64), "or is not aligned"),
    "overlap": (
        with_tensors(tensor("t", (16,)), tensor("u", (8,), offset=32), data=b"x" * 64), "overlaps another"
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_headers_are_rejected_in_little_memory(case, names, tmp_path):
    data, message = HOSTILE[case]
    path = tmp_path / "bad.gguf"
    path.write_bytes(data)
    tracemalloc.start()
    try:
        with pytest.raises(ModelLoadError, match=f"^'bad.gguf' .*({message})"):
            converted_folder(path)
        assert tracemalloc.get_traced_memory()[1] < 32 << 20
    finally:
        tracemalloc.stop()
    assert names() == []


def test_long_header_is_rejected(monkeypatch, file):
    monkeypatch.setattr("kvfusion_rag.model.gguf.header.MAX_HEADER_BYTES", 1000)
    with pytest.raises(ModelLoadError, match="has a header of more than"):
        read_header(file)
