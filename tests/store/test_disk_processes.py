"""The disk tier shared by processes: killed, forked and concurrent ones."""

import multiprocessing
import os
import random
import signal
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from stores import FORK, SIZE, files_of, key_of, kv_of, put, read, run_forked, same

from kvfusion_rag import DiskStore
from kvfusion_rag.store import Miss, namespace_key
from kvfusion_rag.store.folder import ABANDONED_SECONDS

SYSTEM_CALLS = ["open", "writev", "replace", "mkdir"]
SYSTEM_CALLS += [pytest.param(name, marks=pytest.mark.slow) for name in ("fchmod", "close", "fsync")]


def start(work: Callable[..., object], *arguments: object) -> multiprocessing.process.BaseProcess:
    process = FORK.Process(target=work, args=arguments)
    process.start()
    return process


def exit_code(process: multiprocessing.process.BaseProcess, seconds: float = 60) -> int | None:
    process.join(seconds)
    return process.exitcode


def run_until_killed(name: str, count: int, work: Callable[[], object]) -> None:
    """Call ``work`` in a process that dies at its ``count``-th call of ``os.name``."""
    real, left = getattr(os, name), count

    def dying(*arguments, **options):
        nonlocal left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*arguments, **options)

    setattr(os, name, dying)
    work()
    os._exit(0)


@pytest.mark.parametrize("name", SYSTEM_CALLS)
def test_process_killed_while_opening_or_writing_leaves_only_complete_files(tmp_path, name):
    def work(folder: Path) -> None:
        store = DiskStore(folder, fsync=True, max_bytes=SIZE)
        for number in range(2):
            store.put(key_of(number), kv_of(number))

    for count in range(1, 60):
        folder = tmp_path / f"store{count}"
        code = run_forked(partial(run_until_killed, name, count, partial(work, folder)))
        for left in folder.glob("tmp/*"):
            os.utime(left, (time.time() - 2 * ABANDONED_SECONDS,) * 2)
        store = DiskStore(folder, max_bytes=SIZE)
        assert store.verify().broken == 0
        assert all(read(store, n)[0] in (None, Miss.ABSENT) for n in range(2))
        assert not list((store.path / "tmp").iterdir())
        assert sum(size for size, _ in store.totals().values()) <= SIZE
        put(store, 9)
        assert read(store, 9)[0] is None
        if code == 0:
            assert count > 1
            return
        assert code == -signal.SIGKILL
    raise AssertionError(f"{name} is called more often than this test counts")


@pytest.mark.parametrize("existing", [["tmp"], ["tmp", "v4-raw"]])
def test_folder_whose_first_opening_was_killed_can_be_opened(tmp_path, existing):
    for name in existing:
        (tmp_path / "s" / name).mkdir(parents=True)
    put(DiskStore(tmp_path / "s"), 1)


@pytest.mark.parametrize("clock", [None, 0.0, 1e12])
def test_opening_removes_only_abandoned_temporary_files(tmp_path, monkeypatch, clock):
    store = DiskStore(tmp_path / "store")
    ages = {"old.part": 2 * ABANDONED_SECONDS, "new.part": 0, "notes.txt": 2 * ABANDONED_SECONDS}
    for name, age in ages.items():
        (store.path / "tmp" / name).write_bytes(b"x")
        os.utime(store.path / "tmp" / name, (time.time() - age,) * 2)
    if clock is not None:  # the machine's clock may jump
        monkeypatch.setattr(time, "time", lambda: clock)
    DiskStore(store.path)
    assert {path.name for path in (store.path / "tmp").iterdir()} == {"new.part", "notes.txt"}


def use_for(folder: Path, seed: int, seconds: float) -> None:
    """Read, store and forget random documents, and check what is read."""
    store, rng, end = DiskStore(folder, max_bytes=6 * SIZE), random.Random(seed), time.monotonic() + seconds
    hits = 0
    while time.monotonic() < end or not hits:
        number = rng.randrange(12)
        miss, document = read(store, number)
        if miss is None:
            hits += 1
            assert same(document, kv_of(number))
        else:
            assert miss is Miss.ABSENT
            store.put(key_of(number), kv_of(number))
        if rng.random() < 0.02:
            store.forget(key_of(number))
    store.close()


@pytest.mark.parametrize(("count", "seconds"), [(3, 0.5), pytest.param(8, 60.0, marks=pytest.mark.slow)])
def test_processes_share_documents_and_a_cap(tmp_path, count, seconds):
    processes = [start(use_for, tmp_path / "store", seed, seconds) for seed in range(count)]
    assert [exit_code(process, seconds + 120) for process in processes] == [0] * count
    store = DiskStore(tmp_path / "store", max_bytes=6 * SIZE)
    report = store.verify()
    assert report.broken == report.uncounted == 0 and 0 < len(files_of(store)) <= 6


def test_processes_can_open_a_new_folder_at_the_same_time(tmp_path):
    def work(folder: Path, begin) -> None:
        begin.wait()
        put(DiskStore(folder), 1)

    for turn in range(3):
        begin = FORK.Event()
        processes = [start(work, tmp_path / str(turn), begin) for _ in range(5)]
        begin.set()
        assert [exit_code(process) for process in processes] == [0] * 5


def test_file_evicted_by_another_process_during_a_read_is_read_to_its_end(tmp_path, monkeypatch):
    store = DiskStore(tmp_path / "store")
    put(store, 1)
    preadv = os.preadv

    def evict_and_read(*arguments):
        assert run_forked(lambda: put(DiskStore(store.path, max_bytes=SIZE), 2)) == 0
        assert key_of(1) not in store
        return preadv(*arguments)

    monkeypatch.setattr(os, "preadv", evict_and_read)
    miss, document = read(store, 1)
    assert miss is None and same(document, kv_of(1))


@pytest.mark.parametrize("cap", [4, 20])
def test_parent_and_forked_child_count_together(tmp_path, cap):
    """The child's connection is in use while the parent closes its own, and the child exits without closing."""
    store = DiskStore(tmp_path / "s", max_bytes=cap * SIZE)
    put(store, 0)
    begun, closed = FORK.Event(), FORK.Event()

    def child() -> None:
        put(store, 1)
        begun.set()
        assert closed.wait(30)
        put(store, *range(2, 8))
        os._exit(0)

    process = start(child)
    assert begun.wait(30)
    store.close()
    closed.set()
    assert exit_code(process) == 0
    count = min(cap, 8)
    assert len(files_of(store)) == count
    assert DiskStore(store.path).totals() == {namespace_key(""): (count * SIZE, count)}
