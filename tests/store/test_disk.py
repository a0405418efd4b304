"""The disk tier: what is read is what was written, or a miss with its reason."""

import errno
import gc
import json
import multiprocessing
import os
import random
import signal
import sqlite3
import stat
import subprocess
import sys
import threading
import time
import weakref
from contextlib import closing
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from stores import SHAPE, files_of, ids_of, key_of, kv_of, read, same

from kvfusion_rag import DiskStore, InvalidInputError, StoreError
from kvfusion_rag.model.kv import KVShape
from kvfusion_rag.store import Miss, VerifyReport, namespace_key
from kvfusion_rag.store.folder import DEAD_SECONDS, ORPHANED_SECONDS
from kvfusion_rag.store.format import CODECS, checksum, encode, is_finite, layout
from kvfusion_rag.store.index import QUARANTINED

ROOT = Path(__file__).parent.parent.parent
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture
def store(tmp_path) -> DiskStore:
    return DiskStore(tmp_path / "store")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_c2_what_is_read_is_what_was_written(store, dtype):
    shape = KVShape(2, 3, 8, dtype)
    for number, tokens in ((1, 1), (2, 5), (3, 33)):
        assert store.put(key_of(number, tokens), kv_of(number, tokens, shape))
        miss, found = read(store, number, tokens, shape)
        assert miss is None and same(found, kv_of(number, tokens, shape))
        again = DiskStore(store.path)
        assert read(again, number, tokens, shape)[0] is None


def test_it_is_read_straight_into_slots_of_a_larger_buffer(store):
    store.put(key_of(1), kv_of(1))
    buffer = torch.full((2, 4, 3, 20, 8), 7.0)
    into = SHAPE.empty(ids_of(1))
    views = type(into)(buffer[:, 1, :, 6:11], buffer[:, 3, :, 6:11], ids_of(1))
    assert store.get(key_of(1), SHAPE, views) is None
    assert same(views, kv_of(1))
    buffer[:, 1, :, 6:11], buffer[:, 3, :, 6:11] = 7.0, 7.0
    assert (buffer == 7.0).all()


@settings(deadline=None, max_examples=60)
@given(
    st.integers(1, 5), st.integers(1, 3), st.integers(1, 9), st.sampled_from(DTYPES), st.sampled_from(CODECS),
    st.integers(1, 2000), st.integers(0, 2**20),
)  # fmt: skip
def test_however_large_its_pieces_are_a_document_is_read_whole_or_not_at_all(
    tmp_path_factory, layers, heads, tokens, dtype, codec, piece, spot
):
    shape = KVShape(layers, heads, 8, dtype)
    store = DiskStore(tmp_path_factory.mktemp("store") / "s", codec=codec)
    store.put(key_of(1, tokens), kv_of(1, tokens, shape))
    expected = read(store, 1, tokens, shape)[1]
    buffer = torch.full((2, layers, heads, tokens + 2, 8), 7.0, dtype=dtype)
    slots = type(expected)(buffer[0, :, :, 1:-1], buffer[1, :, :, 1:-1], ids_of(1, tokens))
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("kvfusion_rag.store.files._PIECE", piece)
        assert store.get(key_of(1, tokens), shape, slots) is None and same(slots, expected)
        assert (buffer[:, :, :, [0, -1]] == 7.0).all()
        (file,) = files_of(store)
        content = bytearray(file.read_bytes())
        content[spot % len(content)] ^= 1
        file.write_bytes(content)
        assert store.get(key_of(1, tokens), shape, slots) is not None


@given(st.integers(0, 2**20), st.sampled_from(DTYPES))
@settings(deadline=None, max_examples=30)
def test_v8_keeps_keys_and_rounds_values_by_less_than_half_a_step(tmp_path_factory, seed, dtype):
    shape = KVShape(2, 3, 8, dtype)
    store = DiskStore(tmp_path_factory.mktemp("store") / "s", codec="v8")
    document = kv_of(seed, 4, shape)
    store.put(key_of(seed, 4), document)
    miss, found = read(store, seed, 4, shape)
    assert miss is None and torch.equal(found.keys, document.keys)
    step = document.values.float().abs().amax(dim=-1, keepdim=True) / 127
    rounding = torch.finfo(dtype).eps * document.values.float().abs()
    assert ((found.values.float() - document.values.float()).abs() <= step * 0.501 + rounding).all()
    assert files_of(store)[0].stat().st_size < len(b"".join(encode(key_of(seed, 4), document, "raw")))


def test_a_file_is_a_safetensors_file(store):
    store.put(key_of(1), kv_of(1))
    (file,) = files_of(store)
    with safe_open(file, "pt") as found:
        assert torch.equal(found.get_tensor("keys"), kv_of(1).keys)
        assert torch.equal(found.get_tensor("values"), kv_of(1).values)
        assert tuple(found.get_tensor("token_ids").tolist()) == ids_of(1)
        assert found.metadata()["key"] == key_of(1)


# F2: damaged files


def damage(how: str, data: bytes, rng: random.Random) -> bytes:
    place = rng.randrange(len(data))
    return {
        "truncated": data[:place],
        "empty": b"",
        "longer": data + b"\0",
        "zero tail": data[: len(data) // 2] + bytes(len(data) - len(data) // 2),
        "flipped": data[:place] + bytes([data[place] ^ 1 << rng.randrange(8)]) + data[place + 1 :],
    }[how]


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("how", ["truncated", "empty", "longer", "zero tail", "flipped"])
def test_f2_a_damaged_file_is_a_miss_put_aside_and_said_once(tmp_path, caplog, how, codec):
    store = DiskStore(tmp_path / "store", codec=codec)
    for number in range(8):
        store.put(key_of(number), kv_of(number))
        (file,) = files_of(store)
        file.write_bytes(damage(how, file.read_bytes(), random.Random(number)))
        miss, _ = read(store, number)
        expected = {"flipped": {Miss.CHECKSUM, Miss.HEADER}, "zero tail": {Miss.CHECKSUM}}
        assert miss in expected.get(how, {Miss.TRUNCATED})
        assert not file.exists() and read(store, number)[0] is Miss.ABSENT
        assert sum(count for _, count in store.totals().values()) == 0
    assert len(list((store.path / "quarantine").iterdir())) == QUARANTINED
    assert 1 <= len([r for r in caplog.records if "broken" in r.message]) <= 2  # one for each reason


@pytest.mark.parametrize("codec", CODECS)
def test_f2_no_flipped_bit_is_ever_read(tmp_path, codec):
    """Every byte of a small file, one bit each."""
    shape, store = KVShape(1, 1, 4, torch.float32), DiskStore(tmp_path / "store", codec=codec)
    store.put(key_of(1, 2), kv_of(1, 2, shape))
    (file,) = files_of(store)
    data = file.read_bytes()
    for place in range(len(data)):
        file.write_bytes(data[:place] + bytes([data[place] ^ 1 << place % 8]) + data[place + 1 :])
        assert read(store, 1, 2, shape)[0] is not None, place
    file.write_bytes(data)
    assert read(store, 1, 2, shape)[0] is None


@given(st.binary(max_size=400))
@settings(deadline=None)
def test_f2_arbitrary_bytes_are_a_miss(tmp_path_factory, data):
    store = DiskStore(tmp_path_factory.mktemp("store") / "s")
    store.put(key_of(1), kv_of(1))
    (file,) = files_of(store)
    file.write_bytes(data)
    assert read(store, 1)[0] is Miss.TRUNCATED
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes((data * (file_size() // max(len(data), 1) + 1))[: file_size()])
    assert read(store, 1)[0] is not None
    file.write_bytes(data)
    assert store.verify().broken == 1


def file_size() -> int:
    return layout(key_of(1), 5, SHAPE, "raw").total


def test_f4_another_document_model_or_shape_under_this_name_is_a_miss(store):
    """A file with a right checksum of its own, in a place that is not its."""
    store.put(key_of(1), kv_of(1))
    (file,) = files_of(store)
    for other in (
        encode(key_of(2), kv_of(2), "raw"),
        encode(key_of(1, model="another"), kv_of(1), "raw"),
        encode(key_of(1), kv_of(1, shape=KVShape(2, 3, 8, torch.bfloat16)), "raw"),
    ):
        file.write_bytes(b"".join(other))
        assert read(store, 1)[0] in (Miss.HEADER, Miss.TRUNCATED)
    wrong_ids = type(kv_of(1))(kv_of(1).keys, kv_of(1).values, ids_of(9))
    file.write_bytes(b"".join(encode(key_of(1), wrong_ids, "raw")))
    assert read(store, 1)[0] is Miss.TOKENS


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_numbers_that_are_none_are_neither_written_nor_read(store, number):
    broken = kv_of(1)
    broken.values[0, 0, 0, 0] = number
    assert not store.put(key_of(1), broken) and not files_of(store)
    store.put(key_of(1), kv_of(1))
    (file,) = files_of(store)
    file.write_bytes(b"".join(encode(key_of(1), broken, "raw")))  # with a right checksum
    assert read(store, 1)[0] is Miss.NUMBERS


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_largest_numbers_are_stored_as_any_others(tmp_path, dtype, codec):
    store, shape = DiskStore(tmp_path / "s", codec=codec), KVShape(2, 3, 8, dtype)
    document = kv_of(1, shape=shape)
    document.keys.fill_(torch.finfo(dtype).max)
    assert store.put(key_of(1), document)
    miss, found = read(store, 1, shape=shape)
    assert miss is None and torch.equal(found.keys, document.keys)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_infinite_is_what_torch_says_it_is_for_every_number(dtype):
    """All numbers of 16 bits; of 32, those with all of these as their upper half and the ends of the lower one."""
    upper = torch.arange(-(2**15), 2**15, dtype=torch.int32)
    if dtype == torch.float32:
        numbers = torch.cat([(upper << 16) + lower for lower in (0, 1, 2**16 - 1)]).view(dtype)
    else:
        numbers = upper.to(torch.int16).view(dtype)
    for number, expected in zip(numbers[:, None], torch.isfinite(numbers).tolist(), strict=True):
        assert is_finite(number) == expected, number


def test_f6_a_document_that_leaves_while_it_is_read_is_read_to_its_end(store, monkeypatch):
    store.put(key_of(1), kv_of(1))
    whole = os.preadv

    def leaving(place, buffers, offset):
        store.clear()
        return whole(place, buffers, offset)

    monkeypatch.setattr(os, "preadv", leaving)
    miss, found = read(store, 1)
    assert miss is None and same(found, kv_of(1)) and not files_of(store)


def test_a_file_that_vanished_is_absent_and_comes_again(store):
    store.put(key_of(1), kv_of(1))
    files_of(store)[0].unlink()
    assert read(store, 1)[0] is Miss.ABSENT
    assert store.put(key_of(1), kv_of(1)) and read(store, 1)[0] is None
    assert [count for _, count in store.totals().values()] == [1]


# Caps


@given(st.lists(st.tuples(st.integers(0, 9), st.booleans()), max_size=30), st.integers(1, 6))
@settings(deadline=None, max_examples=40)
def test_files_stay_under_the_cap_and_the_longest_unused_leave_first(tmp_path_factory, uses, cap):
    size = file_size()
    store = DiskStore(tmp_path_factory.mktemp("store") / "s", max_bytes=cap * size)
    expected: list[int] = []  # longest unused first
    for number, is_put in uses:
        if is_put and number not in expected:
            store.put(key_of(number), kv_of(number))
            expected = [*expected, number][-cap:]
        else:
            found = read(store, number)[0] is None
            assert found == (number in expected)
            if found:
                expected = [*[n for n in expected if n != number], number]
        assert {f.stat().st_size for f in files_of(store)} <= {size}
        assert len(files_of(store)) == len(expected) <= cap
    assert store.verify().whole == len(expected)


def test_t3_one_tenant_cannot_make_anothers_files_leave(tmp_path):
    store = DiskStore(tmp_path / "s", max_bytes=8 * file_size(), namespace_bytes=4 * file_size())
    for number in range(4):
        store.put(key_of(number, namespace="b"), kv_of(number))
    for number in range(30):
        store.put(key_of(number, namespace="a"), kv_of(number))
    assert all(read(store, n, namespace="b")[0] is None for n in range(4))
    assert sorted(count for _, count in store.totals().values()) == [4, 4]


def test_a_document_larger_than_the_cap_is_rejected(tmp_path):
    store = DiskStore(tmp_path / "s", max_bytes=file_size())
    store.put(key_of(1), kv_of(1))
    assert not store.put(key_of(2, 50), kv_of(2, 50))
    assert store.rejected == 1 and read(store, 1)[0] is None


# F1, F3: faults while writing

SYSTEM_CALLS = ("open", "fchmod", "writev", "close", "replace", "mkdir", "fsync")


@pytest.mark.parametrize("error", ["ENOSPC", "EIO", "EROFS", "EACCES"])
def test_f3_a_disk_that_fails_costs_a_warning_and_no_answer(tmp_path, monkeypatch, caplog, error):
    import errno

    store = DiskStore(tmp_path / "store")
    store.put(key_of(0), kv_of(0))

    def failing(*_, **__):
        raise OSError(getattr(errno, error), os.strerror(getattr(errno, error)))

    monkeypatch.setattr(os, "writev", failing)
    assert not store.put(key_of(1), kv_of(1)) and not store.put(key_of(2), kv_of(2))
    assert len([r for r in caplog.records if "cannot be stored" in r.message]) == 1
    assert not list((store.path / "tmp").iterdir()) and read(store, 0)[0] is None
    assert [count for _, count in store.totals().values()] == [1]
    monkeypatch.undo()
    assert not store.put(key_of(1), kv_of(1))  # left alone for a while
    store._paused_until = 0.0
    assert store.put(key_of(1), kv_of(1)) and read(store, 1)[0] is None


def test_f3_unreadable_files_are_misses(store, monkeypatch, caplog):
    store.put(key_of(1), kv_of(1))

    def failing(*_):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "preadv", failing)
    assert read(store, 1)[0] is read(store, 1)[0] is Miss.UNREADABLE
    assert len([r for r in caplog.records if "cannot be read" in r.message]) == 1


KILLED = """
import os, sys
sys.path[:0] = sys.argv[3:]
import torch
torch.set_num_threads(1)
from stores import key_of, kv_of
from kvfusion_rag import DiskStore
name, count, folder = sys.argv[1].split(":")[0], int(sys.argv[1].split(":")[1]), sys.argv[2]
store = DiskStore(folder, fsync=True, max_bytes=3 * 1500)
real, left = getattr(os, name), count
def dying(*arguments, **options):
    global left
    left -= 1
    if left == 0:
        os.kill(os.getpid(), 9)
    return real(*arguments, **options)
setattr(os, name, dying)
for number in range(4):
    store.put(key_of(number), kv_of(number))
print("survived")
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", SYSTEM_CALLS)
def test_f1_a_process_killed_at_any_system_call_of_a_put_leaves_whole_files_or_none(tmp_path, name):
    script = tmp_path / "script.py"
    script.write_text(KILLED)
    paths = [str(ROOT), str(ROOT / "tests" / "helpers")]
    for count in range(1, 40):
        folder = tmp_path / f"store{count}"
        command = [sys.executable, str(script), f"{name}:{count}", str(folder), *paths]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
        for left in folder.glob("tmp/*"):
            os.utime(left, (time.time() - 2 * DEAD_SECONDS,) * 2)
        store = DiskStore(folder, max_bytes=3 * 1500)
        report = store.verify()
        assert report.broken == 0
        assert all(miss in (None, Miss.ABSENT) for miss in (read(store, n)[0] for n in range(4)))
        assert not list((store.path / "tmp").iterdir())
        assert sum(size for size, _ in store.totals().values()) <= 3 * 1500
        assert store.put(key_of(9), kv_of(9)) and read(store, 9)[0] is None
        if "survived" in done.stdout:
            return
        assert done.returncode == -9, done.stderr
    raise AssertionError(f"{name} is called more often than this test counts")


def test_f1_what_a_dead_process_left_is_swept_and_what_a_living_one_writes_is_not(tmp_path):
    import socket

    store = DiskStore(tmp_path / "store")
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    host, temporary = socket.gethostname(), store.path / "tmp"
    names = {f"{host}~{dead.pid}~1~1": False, f"{host}~{os.getpid()}~1~1": True, "elsewhere~1~1~1": True}
    old = temporary / "elsewhere~1~1~2"
    for name in (*names, old.name):
        (temporary / name).write_bytes(b"x")
    for name in names:
        os.utime(temporary / name, (time.time() - 2 * DEAD_SECONDS,) * 2)
    os.utime(old, (time.time() - 2 * ORPHANED_SECONDS,) * 2)
    DiskStore(store.path)
    assert {name: (temporary / name).exists() for name in names} == names and not old.exists()


# F5: many processes

MANY = """
import sys
sys.path[:0] = sys.argv[4:]
import random, time, torch
torch.set_num_threads(1)
from stores import key_of, kv_of, read, same
from kvfusion_rag import DiskStore
folder, seed, seconds = sys.argv[1], int(sys.argv[2]), float(sys.argv[3])
store, rng, end = DiskStore(folder, max_bytes=6 * 1500), random.Random(seed), time.monotonic() + seconds
hits = 0
while time.monotonic() < end:
    number = rng.randrange(12)
    miss, found = read(store, number)
    if miss is None:
        hits += 1
        assert same(found, kv_of(number)), "wrong bytes"
    else:
        assert miss == "absent", miss
        store.put(key_of(number), kv_of(number))
    if rng.random() < 0.02:
        store.forget(key_of(number))
store.close()
print(hits)
"""


def run_many(tmp_path: Path, processes: int, seconds: float) -> DiskStore:
    script = tmp_path / "script.py"
    script.write_text(MANY)
    paths = [str(ROOT), str(ROOT / "tests" / "helpers")]
    command = [sys.executable, str(script), str(tmp_path / "store")]
    running = [
        subprocess.Popen([*command, str(seed), str(seconds), *paths], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        for seed in range(processes)
    ]
    for process in running:
        out, err = process.communicate(timeout=seconds + 120)
        assert process.returncode == 0, err.decode()[-2000:]
        assert int(out) > 0
    return DiskStore(tmp_path / "store", max_bytes=6 * 1500)


def test_f5_processes_share_keys_and_a_cap(tmp_path):
    store = run_many(tmp_path, 3, 2.0)
    report = store.verify()
    assert report.broken == 0 and 0 < sum(f.stat().st_size for f in files_of(store)) <= 6 * 1500


@pytest.mark.slow
def test_f5_eight_processes_share_keys_and_a_cap_for_a_minute(tmp_path):
    store = run_many(tmp_path, 8, 60.0)
    report = store.verify()
    assert report.broken == report.uncounted == 0
    assert 0 < sum(f.stat().st_size for f in files_of(store)) <= 6 * 1500


# F11 and opening


def test_f11_a_clock_that_jumps_changes_nothing(tmp_path, monkeypatch):
    store = DiskStore(tmp_path / "s", max_bytes=2 * file_size())
    store.put(key_of(1), kv_of(1))
    monkeypatch.setattr(time, "time", lambda: 0.0)
    store.put(key_of(2), kv_of(2))
    monkeypatch.setattr(time, "time", lambda: 1e12)
    store.put(key_of(3), kv_of(3))
    assert [read(store, n)[0] for n in (1, 2, 3)] == [Miss.ABSENT, None, None]


def test_f11_a_folder_with_letters_of_all_kinds(tmp_path):
    store = DiskStore(tmp_path / "магазин 店 ü")
    assert store.put(key_of(1), kv_of(1)) and read(store, 1)[0] is None


def test_a_damaged_index_is_built_anew(store):
    for number in range(3):
        store.put(key_of(number), kv_of(number))
    store.close()
    for junk in (b"", b"not a database, certainly", os.urandom(5000)):
        (store.path / "index.sqlite").write_bytes(junk)
        for suffix in ("-wal", "-shm"):
            (store.path / f"index.sqlite{suffix}").unlink(missing_ok=True)
        again = DiskStore(store.path)
        assert [count for _, count in again.totals().values()] == [3]
        assert read(again, 1)[0] is None
        again.close()


def test_verify_counts_and_mends(store):
    for number in range(4):
        store.put(key_of(number), kv_of(number))
    first, second, third, _ = files_of(store)
    data = bytearray(first.read_bytes())
    data[-1] ^= 1
    first.write_bytes(data)
    second.unlink()
    moved = third.with_name("0" * 32 + third.name[32:])
    third.rename(moved)
    report = store.verify()
    assert (report.whole, report.broken, report.missing) == (1, 2, 2)
    assert [count for _, count in store.totals().values()] == [1]
    assert store.verify() == type(report)(1, 0, 0, 0)


def test_forgetting_a_document_removes_it_under_every_model_and_codec(tmp_path):
    stores = [DiskStore(tmp_path / "s", codec=codec) for codec in CODECS]
    for store in stores:
        for model in ("one", "two"):
            for number in (1, 2):
                store.put(key_of(number, model=model), kv_of(number))
    assert stores[0].forget(key_of(1, model="third")) == 4
    assert len(list((tmp_path / "s").glob("v*/*/*/*.safetensors"))) == 4
    assert read(stores[1], 1, model="two")[0] is Miss.ABSENT and read(stores[1], 2, model="two")[0] is None


def test_clearing_a_namespace_leaves_the_others(store):
    for namespace in ("a", "b"):
        store.put(key_of(1, namespace=namespace), kv_of(1))
    assert store.clear(key_of(1, namespace="a")[:32]) == 1
    assert read(store, 1, namespace="a")[0] is Miss.ABSENT and read(store, 1, namespace="b")[0] is None
    assert store.clear() == 1 and not files_of(store)


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o664])
def test_files_and_folders_have_the_mode_that_was_asked_for(tmp_path, mode):
    before = os.umask(0o077)
    try:
        store = DiskStore(tmp_path / "s", mode=mode)
        store.put(key_of(1), kv_of(1))
    finally:
        os.umask(before)
    assert stat.S_IMODE(files_of(store)[0].stat().st_mode) == mode


@pytest.mark.parametrize("wrong", [{"max_bytes": 0}, {"namespace_bytes": 0}, {"codec": "zip"}])
def test_wrong_options(tmp_path, wrong):
    with pytest.raises(InvalidInputError, match=next(iter(wrong))):
        DiskStore(tmp_path / "s", **wrong)
    assert not (tmp_path / "s").exists()


def test_a_path_that_cannot_be_a_store_is_one_clear_error(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(StoreError, match="is a file"):
        DiskStore(tmp_path / "file")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").write_text("mine")
    with pytest.raises(StoreError, match="is no document store"):
        DiskStore(tmp_path / "mine")
    store = DiskStore(tmp_path / "newer")
    (store.path / "format.json").write_text(json.dumps({"version": 99}))
    with pytest.raises(StoreError, match="format 99"):
        DiskStore(store.path)
    (store.path / "format.json").write_text("{")
    with pytest.raises(StoreError, match="damaged"):
        DiskStore(store.path)


def test_a_path_that_cannot_be_written_is_one_clear_error(tmp_path, monkeypatch):
    store = DiskStore(tmp_path / "s")
    store.put(key_of(1), kv_of(1))

    def denied(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "writev", denied)
    with pytest.raises(StoreError, match=r"cannot be opened for writing .*read_only=True"):
        DiskStore(store.path)
    reader = DiskStore(store.path, read_only=True)
    assert read(reader, 1)[0] is None and not reader.put(key_of(2), kv_of(2))


def test_the_checksum_covers_the_header():
    assert checksum(b"a", [b"data"]) != checksum(b"b", [b"data"])


# What other processes do meanwhile


def test_f5_a_file_that_another_process_removed_while_it_was_written_is_not_kept_uncounted(tmp_path, monkeypatch):
    store, other = DiskStore(tmp_path / "s"), DiskStore(tmp_path / "s")
    write = store._folder.write
    monkeypatch.setattr(store._folder, "write", lambda *given: (other.clear(), write(*given)))
    assert not store.put(key_of(1), kv_of(1))
    assert not files_of(store) and not store.totals()


@pytest.mark.parametrize("remove", ["forget", "clear", "clear all"])
def test_a_document_that_is_just_being_written_is_removed_too(tmp_path, monkeypatch, remove):
    store = DiskStore(tmp_path / "s")
    write, ways = store._folder.write, {"forget": lambda: store.forget(key_of(1)), "clear all": store.clear,
                                 "clear": lambda: store.clear(namespace_key(""))}  # fmt: skip
    monkeypatch.setattr(store._folder, "write", lambda *given: (ways[remove](), write(*given)))
    assert not store.put(key_of(1), kv_of(1))
    assert not files_of(store) and not store.totals()


@pytest.mark.parametrize("remove", ["forget", "clear"])
def test_what_was_put_aside_is_removed_too(tmp_path, remove):
    store = DiskStore(tmp_path / "s")
    for number, namespace in ((1, ""), (2, ""), (1, "other")):
        store.put(key_of(number, namespace=namespace), kv_of(number))
    for file in files_of(store):
        file.write_bytes(b"x")
    assert store.verify().broken == 3
    store.forget(key_of(1)) if remove == "forget" else store.clear(namespace_key(""))
    left = [file.name for file in (store.path / "quarantine").iterdir()]
    assert len(left) == (2 if remove == "forget" else 1)
    assert not any(name.startswith(key_of(1)[:65]) for name in left)


def test_verifying_a_store_in_use_keeps_its_cap(tmp_path, monkeypatch):
    """A document that is being written while the index is set right is counted in the end, or not there."""
    size = files_size(tmp_path)
    one, two = (DiskStore(tmp_path / "s", max_bytes=4 * size) for _ in range(2))
    write = one._folder.write
    monkeypatch.setattr(one._folder, "write", lambda *given: (two.verify(), write(*given)))
    for number in range(8):
        one.put(key_of(number), kv_of(number))
        two.put(key_of(100 + number), kv_of(100 + number))
    assert len(files_of(one)) <= 4
    assert one.totals() == two.totals() == {namespace_key(""): (len(files_of(one)) * size, len(files_of(one)))}


def files_size(folder: Path) -> int:
    return DiskStore(folder / "sizes").file_bytes(SHAPE, 5)


def test_verifying_does_not_mistake_a_file_that_leaves_for_a_broken_one(tmp_path, monkeypatch):
    store = DiskStore(tmp_path / "s")
    store.put(key_of(1), kv_of(1))
    scan = store._scan

    def leaving(*given):
        for found in list(scan(*given)):
            store.forget(key_of(1)) if not given else None
            yield found

    monkeypatch.setattr(store, "_scan", leaving)
    assert store.verify() == VerifyReport(0, 0, 0, 0)


def _open_one(folder: str, start) -> None:
    start.wait()
    assert DiskStore(folder).put(key_of(1), kv_of(1))


def test_f5_processes_may_open_a_new_folder_together(tmp_path):
    context = multiprocessing.get_context("fork")
    for turn in range(5):
        start = context.Event()
        opening = [context.Process(target=_open_one, args=(str(tmp_path / str(turn)), start)) for _ in range(6)]
        for process in opening:
            process.start()
        start.set()
        for process in opening:
            process.join(30)
        assert [process.exitcode for process in opening] == [0] * 6


@pytest.mark.parametrize("made", [["tmp"], ["tmp", "quarantine"], ["tmp", "quarantine", "v2-raw"]])
def test_f1_a_folder_whose_first_opening_was_killed_can_be_opened(tmp_path, made):
    for name in made:
        (tmp_path / "s" / name).mkdir(parents=True)
    assert DiskStore(tmp_path / "s").put(key_of(1), kv_of(1))
    (tmp_path / "foreign" / "tmp").mkdir(parents=True)
    (tmp_path / "foreign" / "letter.txt").write_text("dear")
    with pytest.raises(StoreError, match="is no document store"):
        DiskStore(tmp_path / "foreign")


# Damage and other faults of the index


@pytest.mark.parametrize("use", ["put", "verify", "forget", "totals"])
def test_f2_a_damaged_index_is_built_anew_while_the_store_is_open(tmp_path, use):
    store = DiskStore(tmp_path / "s")
    for number in range(3):
        store.put(key_of(number), kv_of(number))
    store.close()
    index = store.path / "index.sqlite"
    index.write_bytes(index.read_bytes()[:100] + b"\xff" * (index.stat().st_size - 100))
    if use == "put":
        assert store.put(key_of(3), kv_of(3))
    elif use == "verify":
        assert store.verify().whole == 3
    elif use == "forget":
        assert store.forget(key_of(0)) == 1
    files = len(files_of(store))
    assert store.totals() == {namespace_key(""): (files * files_size(tmp_path), files)}


def test_f1_an_index_whose_maker_died_before_it_was_filled_is_filled(tmp_path):
    store = DiskStore(tmp_path / "s")
    for number in range(3):
        store.put(key_of(number), kv_of(number))
    store.close()
    with closing(sqlite3.connect(store.path / "index.sqlite")) as database:
        database.executescript("DELETE FROM documents; DELETE FROM totals; PRAGMA user_version = 0;")
    size = files_size(tmp_path)
    again = DiskStore(store.path, max_bytes=3 * size)
    assert again.totals() == {namespace_key(""): (3 * size, 3)}
    assert again.put(key_of(9), kv_of(9)) and len(files_of(again)) == 3


def test_f3_another_process_that_holds_the_index_costs_a_short_wait_and_no_fault(tmp_path):
    store = DiskStore(tmp_path / "s")
    with closing(sqlite3.connect(store.path / "index.sqlite", isolation_level=None)) as database:
        database.execute("BEGIN IMMEDIATE")
        began = time.monotonic()
        assert not store.put(key_of(1), kv_of(1))
        assert time.monotonic() - began < 5
        database.execute("ROLLBACK")
    assert store.failed_writes == 0 and store.put(key_of(1), kv_of(1))


@pytest.mark.parametrize("code", [errno.EIO, errno.ESTALE, errno.EACCES])
def test_f3_a_folder_that_cannot_be_looked_into_holds_nothing(tmp_path, monkeypatch, code):
    store = DiskStore(tmp_path / "s")

    def refuse(*_args, **_options):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(Path, "stat", refuse)
    monkeypatch.setattr(os, "open", refuse)
    assert key_of(1) not in store and not store.put(key_of(1), kv_of(1))


def test_f3_maintenance_that_fails_is_one_clear_error(tmp_path, monkeypatch):
    store = DiskStore(tmp_path / "s")
    store.put(key_of(1), kv_of(1))

    def refuse(*_args, **_options):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(Path, "unlink", refuse)
    for work in (store.clear, lambda: store.forget(key_of(1))):
        with pytest.raises(StoreError, match="cannot be changed \\(Read-only file system\\)"):
            work()


def test_t4_only_keys_reach_the_file_system(tmp_path):
    store, foreign = DiskStore(tmp_path / "s"), tmp_path / "outside" / "x" / "y" / "m.safetensors"
    foreign.parent.mkdir(parents=True)
    foreign.write_bytes(b"x")
    for wrong in ("../../outside/x", "", "tenant", "*"):
        with pytest.raises(InvalidInputError):
            store.clear(wrong)
        with pytest.raises(InvalidInputError):
            store.forget(wrong)
    assert foreign.exists()


# Use and permissions


def test_the_document_used_longest_ago_leaves_first(tmp_path):
    store = DiskStore(tmp_path / "s", max_bytes=2 * files_size(tmp_path))
    store.put(key_of(1), kv_of(1))
    store.put(key_of(2), kv_of(2))
    assert read(store, 1)[0] is None
    store.put(key_of(3), kv_of(3))
    assert [key_of(number) in store for number in (1, 2, 3)] == [True, False, True]


def test_what_one_process_reads_is_not_the_first_to_leave_for_another(tmp_path, monkeypatch):
    monkeypatch.setattr("kvfusion_rag.store.index.FLUSH_SECONDS", 0.0)
    size = files_size(tmp_path)
    reader, writer = (DiskStore(tmp_path / "s", max_bytes=2 * size) for _ in range(2))
    writer.put(key_of(1), kv_of(1))
    writer.put(key_of(2), kv_of(2))
    for number in (1, 2, 1):
        assert read(reader, number)[0] is None
    assert read(reader, 1)[0] is None
    writer.put(key_of(3), kv_of(3))
    assert [key_of(number) in writer for number in (1, 2, 3)] == [True, False, True]


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o660])
def test_folders_and_index_have_the_rights_of_the_files_whatever_the_umask(tmp_path, mode):
    before = os.umask(0o077)
    try:
        store = DiskStore(tmp_path / "s", mode=mode)
        store.put(key_of(1), kv_of(1))
    finally:
        os.umask(before)
    (file,) = files_of(store)
    folders = [store.path, *file.parents[:3], store.path / "tmp", store.path / "quarantine"]
    assert {folder.stat().st_mode & 0o777 for folder in folders} == {mode | (mode & 0o444) >> 2}
    files = [file, store.path / "format.json", *store.path.glob("index.sqlite*")]
    assert {one.stat().st_mode & 0o777 for one in files} == {mode}


@pytest.mark.parametrize("mode", ["0600", 0o400, True, 0o1777])
def test_a_mode_that_is_no_permission_is_one_clear_error(tmp_path, mode):
    with pytest.raises(InvalidInputError, match="mode is"):
        DiskStore(tmp_path / "s", mode=mode)


def test_f12_parent_and_forked_child_count_together(tmp_path):
    size = files_size(tmp_path)
    store = DiskStore(tmp_path / "s", max_bytes=4 * size)
    store.put(key_of(0), kv_of(0))
    context = multiprocessing.get_context("fork")
    closed = context.Event()

    def child() -> None:
        for number in range(1, 4):
            store.put(key_of(number), kv_of(number))
        closed.wait(30)
        for number in range(4, 8):
            store.put(key_of(number), kv_of(number))

    process = context.Process(target=child)
    process.start()
    time.sleep(0.2)
    store.close()
    closed.set()
    process.join(30)
    assert process.exitcode == 0 and len(files_of(store)) == 4
    assert DiskStore(store.path).totals() == {namespace_key(""): (4 * size, 4)}


# Forks, waits and space


def test_f12_a_child_goes_on_when_its_parent_has_closed(tmp_path):
    """Each in turn, so that the child's connection is in use while the parent's is closed."""
    size = files_size(tmp_path)
    store = DiskStore(tmp_path / "s", max_bytes=20 * size)
    store.put(key_of(0), kv_of(0))
    context = multiprocessing.get_context("fork")
    begun, closed = context.Event(), context.Event()

    def child() -> None:
        assert store.put(key_of(1), kv_of(1))
        begun.set()
        assert closed.wait(30)
        for number in range(2, 7):
            assert store.put(key_of(number), kv_of(number))
        os._exit(0)  # without closing

    process = context.Process(target=child)
    process.start()
    assert begun.wait(30)
    store.close()
    closed.set()
    process.join(30)
    assert process.exitcode == 0
    assert DiskStore(store.path).totals() == {namespace_key(""): (7 * size, 7)}


def test_stores_that_are_no_longer_used_are_collected(tmp_path):
    index = weakref.ref(DiskStore(tmp_path / "s")._index)
    gc.collect()
    assert index() is None


@pytest.fixture
def held(tmp_path):
    """A store with a document, whose index another process holds while a thread waits to remove something."""
    store = DiskStore(tmp_path / "s")
    store.put(key_of(1), kv_of(1))
    with closing(sqlite3.connect(store.path / "index.sqlite", isolation_level=None)) as database:
        database.execute("BEGIN IMMEDIATE")
        waiting = threading.Thread(target=lambda: store.forget(key_of(5)))
        waiting.start()
        time.sleep(0.2)
        yield store
        database.execute("ROLLBACK")
        waiting.join()


def test_f3_reading_and_writing_wait_for_no_maintenance(held, monkeypatch, caplog):
    monkeypatch.setattr("kvfusion_rag.store.index.FLUSH_SECONDS", 0.0)
    began = time.monotonic()
    assert read(held, 1)[0] is None and not held.put(key_of(2), kv_of(2))
    files_of(held)[0].write_bytes(b"x")
    assert read(held, 1)[0] is Miss.TRUNCATED
    assert time.monotonic() - began < 4
    assert held.failed_writes == 0 and "was put aside" not in caplog.text


@pytest.mark.parametrize("error", [OSError(errno.EROFS, "Read-only file system"), sqlite3.OperationalError("full")])
def test_f3_an_index_that_fails_costs_no_reader_anything(store, monkeypatch, error):
    monkeypatch.setattr("kvfusion_rag.store.index.FLUSH_SECONDS", 0.0)
    store.put(key_of(1), kv_of(1))

    def failing(*_, **__):
        raise error

    store.close()
    monkeypatch.setattr(sqlite3, "connect", failing)
    assert read(store, 1)[0] is None
    store.close()


def test_t3_full_store_a_tenants_own_documents_leave_before_anothers(tmp_path):
    size = files_size(tmp_path)
    store = DiskStore(tmp_path / "s", max_bytes=8 * size, namespace_bytes=4 * size)
    for namespace in ("a", "b"):
        for number in range(4):
            store.put(key_of(number, namespace=namespace), kv_of(number))
    for number in range(6):
        assert store.put(key_of(number, namespace="c"), kv_of(number))
    left = {name: store.totals().get(namespace_key(name), (0, 0))[1] for name in "abc"}
    assert left == {"a": 3, "b": 4, "c": 1}


def test_what_was_put_aside_counts_and_leaves_first(tmp_path):
    size = files_size(tmp_path)
    store = DiskStore(tmp_path / "s", max_bytes=6 * size)
    for number in range(6):
        store.put(key_of(number), kv_of(number))
    for file in files_of(store):
        file.write_bytes(b"x" * size)
    assert all(read(store, number)[0] is not None for number in range(6))
    aside = store.path / "quarantine"
    assert len(list(aside.iterdir())) == QUARANTINED and not store.totals()
    for number in range(6):
        assert store.put(key_of(number), kv_of(number))
        assert len(list(aside.iterdir())) + len(files_of(store)) <= 6
    assert not list(aside.iterdir()) and len(files_of(store)) == 6 and store.evictions == 0


def test_an_index_that_was_replaced_is_noticed(tmp_path):
    one = DiskStore(tmp_path / "s")
    one.put(key_of(1), kv_of(1))
    for suffix in ("", "-wal", "-shm"):
        (one.path / f"index.sqlite{suffix}").unlink()
    two = DiskStore(tmp_path / "s")
    two.put(key_of(2), kv_of(2))
    one.put(key_of(3), kv_of(3))
    assert one.totals() == two.totals() == {namespace_key(""): (3 * files_size(tmp_path), 3)}


def test_fsync_waits_for_the_file_and_its_folder_if_it_is_asked_for(tmp_path, monkeypatch):
    synced: list[str] = []
    real = os.fsync
    monkeypatch.setattr(os, "fsync", lambda place: (synced.append(os.readlink(f"/proc/self/fd/{place}")), real(place)))
    DiskStore(tmp_path / "without").put(key_of(1), kv_of(1))
    assert not synced
    store = DiskStore(tmp_path / "with", fsync=True)
    synced.clear()
    store.put(key_of(1), kv_of(1))
    (file,) = files_of(store)
    assert Path(synced[0]).parent == store.path / "tmp" or str(store.path / "tmp") in synced[0]
    assert {str(folder) for folder in file.parents[:3]} <= set(synced)


# F6, F11: other processes, clocks, folders that cannot be written


def test_f6_another_process_removes_a_document_while_it_is_read(store, monkeypatch):
    store.put(key_of(1), kv_of(1))
    whole, context = os.preadv, multiprocessing.get_context("fork")

    def leaving(place, buffers, offset):
        other = context.Process(target=lambda: DiskStore(store.path, max_bytes=file_size()).put(key_of(2), kv_of(2)))
        other.start()
        other.join(30)
        assert other.exitcode == 0 and key_of(1) not in store
        return whole(place, buffers, offset)

    monkeypatch.setattr(os, "preadv", leaving)
    miss, found = read(store, 1)
    assert miss is None and same(found, kv_of(1))


@pytest.mark.parametrize("clock", [0.0, 1e12])
def test_f11_a_clock_that_jumps_sweeps_nothing_that_is_being_written(store, monkeypatch, clock):
    young = store.path / "tmp" / "elsewhere~1~1~1"
    young.write_bytes(b"x")
    monkeypatch.setattr(time, "time", lambda: clock)
    DiskStore(store.path)
    assert young.exists()


def test_f1_what_is_written_under_the_same_host_name_is_not_swept_nor_is_what_is_not_ours(store):
    """Containers may share a host name and see each other's processes as dead."""
    import socket

    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    young = store.path / "tmp" / f"{socket.gethostname()}~{dead.pid}~1~1"
    foreign = store.path / "tmp" / "notes.txt"
    for file in (young, foreign):
        file.write_bytes(b"x")
    os.utime(foreign, (0, 0))
    DiskStore(store.path)
    assert young.exists() and foreign.exists()


def test_f11_a_store_that_is_only_read_is_left_as_it_is(store):
    for number in range(2):
        store.put(key_of(number), kv_of(number))
    files_of(store)[1].write_bytes(b"x")
    store.close()

    def state() -> dict[str, tuple[int, int]]:
        return {str(f): (f.stat().st_size, f.stat().st_mtime_ns) for f in (store.path, *store.path.rglob("*"))}

    before, reader = state(), DiskStore(store.path, read_only=True)
    assert sorted(str(read(reader, number)[0]) for number in range(2)) == ["None", "truncated"]
    assert not reader.put(key_of(9), kv_of(9)) and reader.verify().broken == 1 and len(reader.totals()) == 1
    for work in (reader.clear, lambda: reader.forget(key_of(1))):
        with pytest.raises(StoreError, match="read_only=True"):
            work()
    reader.close()
    assert state() == before


@pytest.mark.parametrize("name", ["mkdir", "open", "writev", "replace"])
def test_f1_a_process_killed_at_any_step_of_opening_leaves_a_folder_that_opens(tmp_path, monkeypatch, name):
    context, real = multiprocessing.get_context("fork"), getattr(os, name)

    def opening(folder: Path, left: int) -> None:
        def dying(*arguments, **options):
            nonlocal left
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*arguments, **options)

        setattr(os, name, dying)
        DiskStore(folder)
        os._exit(0)

    for count in range(1, 20):
        folder = tmp_path / str(count)
        process = context.Process(target=opening, args=(folder, count))
        process.start()
        process.join(30)
        assert DiskStore(folder).put(key_of(1), kv_of(1))
        if process.exitcode == 0:
            assert count > 1
            return
    raise AssertionError(f"{name} is called more often than this test counts")


def test_f5_opening_waits_for_another_process_that_sets_up_the_index(tmp_path, monkeypatch):
    """SQLite refuses at once, whatever its timeout, where two processes set up the log together."""
    refused: list[str] = []

    class Refusing(sqlite3.Connection):
        def execute(self, sql, *given):
            if "journal_mode" in sql and len(refused) < 3:
                refused.append(sql)
                error = sqlite3.OperationalError("database is locked")
                error.sqlite_errorcode = sqlite3.SQLITE_BUSY
                raise error
            return super().execute(sql, *given)

    connect = sqlite3.connect
    monkeypatch.setattr(sqlite3, "connect", lambda *given, **options: connect(*given, factory=Refusing, **options))
    assert DiskStore(tmp_path / "s").put(key_of(1), kv_of(1)) and len(refused) == 3
