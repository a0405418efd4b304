"""Files of documents: a read returns what was written, or a miss with its reason."""

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from stores import DTYPES, SHAPE, SIZE, files_of, ids_of, key_of, kv_of, put, read, same

from kvfusion_rag import DiskStore
from kvfusion_rag.model.kv import KVShape
from kvfusion_rag.store import CODECS, Miss
from kvfusion_rag.store.format import encode, is_finite


@pytest.fixture
def store(tmp_path) -> DiskStore:
    return DiskStore(tmp_path / "store")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_read_returns_what_was_written(store, dtype):
    shape = KVShape(2, 3, 8, 12, dtype)
    for number, tokens in ((1, 1), (2, 5), (3, 33)):
        assert store.put(key_of(number, tokens), kv_of(number, tokens, shape))
        for reader in (store, DiskStore(store.path)):
            miss, document = read(reader, number, tokens, shape)
            assert miss is None and same(document, kv_of(number, tokens, shape))


def test_read_writes_straight_into_slots_of_a_larger_buffer(store):
    put(store, 1)
    keys, values = (torch.full((2, 4, 3, 20, width), 7.0) for width in (8, 12))
    slots = type(kv_of(1))(keys[:, 1, :, 6:11], values[:, 1, :, 6:11], ids_of(1))
    assert store.get(key_of(1), SHAPE, slots) is None
    assert same(slots, kv_of(1))
    for buffer in (keys, values):
        buffer[:, 1, :, 6:11] = 7.0
        assert (buffer == 7.0).all()


@settings(max_examples=25)
@given(
    st.integers(1, 5), st.integers(1, 3), st.integers(1, 9), st.sampled_from(DTYPES), st.sampled_from(CODECS),
    st.integers(1, 2000), st.integers(0, 2**20),
)  # fmt: skip
def test_pieces_of_any_size_give_the_document_and_detect_a_flipped_bit(
    tmp_path_factory, layers, heads, tokens, dtype, codec, piece, offset
):
    shape = KVShape(layers, heads, 8, 12, dtype)
    store = DiskStore(tmp_path_factory.mktemp("store") / "s", codec=codec)
    store.put(key_of(1, tokens), kv_of(1, tokens, shape))
    expected = read(store, 1, tokens, shape)[1]
    buffers = [torch.full((layers, heads, tokens + 2, width), 7.0, dtype=dtype) for width in (8, 12)]
    slots = type(expected)(*(buffer[:, :, 1:-1] for buffer in buffers), ids_of(1, tokens))
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("kvfusion_rag.store.format._PIECE_BYTES", piece)
        assert store.get(key_of(1, tokens), shape, slots) is None and same(slots, expected)
        assert all((buffer[:, :, [0, -1]] == 7.0).all() for buffer in buffers)
        (file,) = files_of(store)
        content = bytearray(file.read_bytes())
        content[offset % len(content)] ^= 1
        file.write_bytes(content)
        assert store.get(key_of(1, tokens), shape, slots) is not None


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("number", range(3))
def test_v8_keeps_keys_and_rounds_values_by_at_most_half_a_step(tmp_path, number, dtype):
    shape = KVShape(2, 3, 8, 12, dtype)
    store = DiskStore(tmp_path / "s", codec="v8")
    document = kv_of(number, 4, shape)
    store.put(key_of(number, 4), document)
    miss, found = read(store, number, 4, shape)
    assert miss is None and torch.equal(found.keys, document.keys)
    step = document.values.float().abs().amax(dim=-1, keepdim=True) / 127
    rounding = torch.finfo(dtype).eps * document.values.float().abs()
    assert ((found.values.float() - document.values.float()).abs() <= step * 0.501 + rounding).all()
    assert files_of(store)[0].stat().st_size < len(b"".join(encode(key_of(number, 4), document, "raw")))


def test_file_is_a_safetensors_file(store):
    put(store, 1)
    (file,) = files_of(store)
    with safe_open(file, "pt") as tensors:
        assert torch.equal(tensors.get_tensor("keys"), kv_of(1).keys)
        assert torch.equal(tensors.get_tensor("values"), kv_of(1).values)
        assert tuple(tensors.get_tensor("token_ids").tolist()) == ids_of(1)
        assert tensors.metadata()["key"] == key_of(1)


def damage(kind: str, data: bytes, rng: random.Random) -> bytes:
    offset = rng.randrange(len(data))
    return {
        "truncated": data[:offset],
        "empty": b"",
        "longer": data + b"\0",
        "zero tail": data[: len(data) // 2] + bytes(len(data) - len(data) // 2),
        "flipped": data[:offset] + bytes([data[offset] ^ 1 << rng.randrange(8)]) + data[offset + 1 :],
    }[kind]


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("kind", ["truncated", "empty", "longer", "zero tail", "flipped"])
def test_damaged_file_is_a_miss_and_is_removed_with_one_warning(tmp_path, caplog, kind, codec):
    store = DiskStore(tmp_path / "store", codec=codec)
    for number in range(8):
        put(store, number)
        (file,) = files_of(store)
        file.write_bytes(damage(kind, file.read_bytes(), random.Random(number)))
        expected = {"flipped": {Miss.CHECKSUM, Miss.HEADER}, "zero tail": {Miss.CHECKSUM}}
        assert read(store, number)[0] in expected.get(kind, {Miss.TRUNCATED})
        assert not file.exists() and read(store, number)[0] is Miss.ABSENT and not store.totals()
    assert 1 <= len([r for r in caplog.records if "damaged" in r.message]) <= 2  # one per reason


@pytest.mark.parametrize("codec", CODECS)
def test_no_flipped_bit_is_ever_read(tmp_path, codec):
    """One flipped bit in every byte of a small file."""
    shape, store = KVShape(1, 1, 4, 4, torch.float32), DiskStore(tmp_path / "store", codec=codec)
    store.put(key_of(1, 2), kv_of(1, 2, shape))
    (file,) = files_of(store)
    data = file.read_bytes()
    store.close()
    reader = DiskStore(store.path, codec=codec, read_only=True)
    for offset in range(len(data)):
        file.write_bytes(data[:offset] + bytes([data[offset] ^ 1 << offset % 8]) + data[offset + 1 :])
        assert read(reader, 1, 2, shape)[0] is not None, offset
    file.write_bytes(data)
    assert read(reader, 1, 2, shape)[0] is None


@settings(max_examples=25)
@given(st.binary(max_size=400))
def test_arbitrary_bytes_are_a_miss(tmp_path_factory, data):
    store = DiskStore(tmp_path_factory.mktemp("store") / "s")
    put(store, 1)
    (file,) = files_of(store)
    file.write_bytes(data)
    assert read(store, 1)[0] is Miss.TRUNCATED
    file.write_bytes((data * (SIZE // max(len(data), 1) + 1))[:SIZE])
    assert read(store, 1)[0] is not None
    file.write_bytes(data)
    assert store.verify().broken == 1


def test_file_of_another_document_model_or_shape_is_a_miss(store):
    """Each file has a correct checksum, but the wrong name."""
    put(store, 1)
    (file,) = files_of(store)
    for other in (
        encode(key_of(2), kv_of(2), "raw"),
        encode(key_of(1, model="another"), kv_of(1), "raw"),
        encode(key_of(1), kv_of(1, shape=KVShape(2, 3, 8, 12, torch.bfloat16)), "raw"),
    ):
        file.write_bytes(b"".join(other))
        assert read(store, 1)[0] in (Miss.HEADER, Miss.TRUNCATED)
    wrong_ids = type(kv_of(1))(kv_of(1).keys, kv_of(1).values, ids_of(9))
    file.write_bytes(b"".join(encode(key_of(1), wrong_ids, "raw")))
    assert read(store, 1)[0] is Miss.TOKENS


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_nan_and_infinity_are_neither_written_nor_read(store, number):
    document = kv_of(1)
    document.values[0, 0, 0, 0] = number
    assert not store.put(key_of(1), document) and not files_of(store)
    put(store, 1)
    (file,) = files_of(store)
    file.write_bytes(b"".join(encode(key_of(1), document, "raw")))  # with a correct checksum
    assert read(store, 1)[0] is Miss.NUMBERS


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_largest_finite_numbers_are_stored(tmp_path, dtype, codec):
    store, shape = DiskStore(tmp_path / "s", codec=codec), KVShape(2, 3, 8, 12, dtype)
    document = kv_of(1, shape=shape)
    document.keys.fill_(torch.finfo(dtype).max)
    assert store.put(key_of(1), document)
    miss, found = read(store, 1, shape=shape)
    assert miss is None and torch.equal(found.keys, document.keys)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_is_finite_agrees_with_torch_for_every_number(dtype):
    """Every 16-bit number. For float32, all upper halves with the smallest and largest lower halves."""
    upper = torch.arange(-(2**15), 2**15, dtype=torch.int32)
    if dtype == torch.float32:
        numbers = torch.cat([(upper << 16) + lower for lower in (0, 1, 2**16 - 1)]).view(dtype)
    else:
        numbers = upper.to(torch.int16).view(dtype)
    finite = torch.isfinite(numbers)
    assert is_finite(numbers[finite])
    assert not any(is_finite(number) for number in numbers[~finite][:, None])


def test_checksum_covers_the_key_in_the_header():
    one, other = (b"".join(encode(key_of(1, model=model), kv_of(1), "raw")) for model in ("a", "b"))
    begin = one.index(b'"xxh3_128":"') + 12
    assert one[begin : begin + 32] != other[begin : begin + 32]
