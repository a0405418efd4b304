"""A generator with a store when memory runs out, streams close early, a process is killed, or many callers ask."""

import asyncio
import os
import signal
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from store_generators import DOCUMENTS, ask, over, over_disk
from stores import failing, run_forked

from kvfusion_rag import DiskStore, DocumentStore, MemoryLimitError, MemoryStore


def exhaust_memory(gen, monkeypatch, times: int, largest: int = 0):
    """Let the next ``times`` passes of the model, or all passes over more than ``largest`` rows, run out of memory."""
    left = [times]
    for name in ("prefill", "forward"):
        real = getattr(gen._engine.model.backbone, name)

        def call(ids, *arguments, _real=real, **options):
            if left[0] > 0 and (not largest or ids.shape[0] > largest):
                left[0] -= 1
                raise torch.OutOfMemoryError("CUDA out of memory")
            return _real(ids, *arguments, **options)

        monkeypatch.setattr(gen._engine.model.backbone, name, call)


def test_prefill_without_memory_is_retried_after_the_store_released_its_own(monkeypatch, caplog):
    gen = over(DocumentStore(MemoryStore()))
    gen.prefill(["some other document"])
    expected = ask(over(DocumentStore()), 4).token_ids
    exhaust_memory(gen, monkeypatch, times=1)
    assert ask(gen, 4).token_ids == expected
    assert "memory ran out" in caplog.text and len(gen.store.memory) == len(DOCUMENTS)


def test_batch_without_memory_is_answered_in_halves(monkeypatch):
    gen = over(DocumentStore(MemoryStore()))
    rows = [DOCUMENTS[: 1 + n % 3] for n in range(5)]
    expected = [gen.answer("who?", row, max_new_tokens=4).token_ids for row in rows]
    exhaust_memory(gen, monkeypatch, times=10**6, largest=1)
    gen._engine.document_kvs.tokens_per_pass = 1  # one document per pass, so that prefill succeeds
    answers = gen.answer_batch(["who?"] * 5, rows, max_new_tokens=4)
    assert [answer.token_ids for answer in answers] == expected


@pytest.mark.parametrize("stored", [False, True], ids=["prefill", "decode"])
def test_too_little_memory_is_an_error_that_leaves_nothing_pending(monkeypatch, stored):
    gen = over(DocumentStore(MemoryStore()))
    if stored:
        gen.prefill(DOCUMENTS)
    with monkeypatch.context() as patch:
        exhaust_memory(gen, patch, times=10**6)
        for call in (gen.answer, lambda *a, **k: list(gen.stream(*a, **k))):
            with pytest.raises(MemoryLimitError, match="not have enough memory for 1 question"):
                call("who?", DOCUMENTS, max_new_tokens=4)
    assert not gen.store._single_flight._pending
    assert ask(gen, 4).text is not None


def test_other_errors_are_raised_unchanged(monkeypatch):
    gen = over(DocumentStore())
    monkeypatch.setattr(gen._engine.model.backbone, "prefill", failing(RuntimeError("mine")))
    with pytest.raises(RuntimeError, match="mine"):
        ask(gen)


@pytest.mark.parametrize("token", [0, 1, 3])
def test_stream_closed_at_any_token_leaves_nothing_pending(tmp_path, token):
    gen = over(DocumentStore(MemoryStore(), DiskStore(tmp_path / "s")))
    expected = ask(gen, 8).token_ids
    gen.store.memory.clear()
    with gen.stream("who?", DOCUMENTS, max_new_tokens=8) as stream:
        for _ in range(token):
            next(stream, None)
    assert not gen.store._single_flight._pending
    assert ask(gen, 8).token_ids == expected


def test_prefill_resumes_after_a_killed_process(tmp_path, monkeypatch):
    documents, put = [f"the mill has {n} sacks" for n in range(20)], DiskStore.put
    calls: list[str] = []

    def dying_put(self, *arguments):
        calls.append("put")
        if len(calls) == 7:
            os.kill(os.getpid(), signal.SIGKILL)
        return put(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(DiskStore, "put", dying_put)
        assert run_forked(lambda: over_disk(tmp_path).prefill(documents)) == -signal.SIGKILL
    found = [source.origin for source in over_disk(tmp_path).prefill(documents)]
    assert (found.count("disk"), found.count("computed")) == (5, 15)  # the first of the six files is the prefix


def test_threads_tasks_and_streams_equal_serial_answers(tmp_path):
    store = DocumentStore(MemoryStore(), DiskStore(tmp_path / "s"))
    gen, serial = over(store), over(DocumentStore())
    rows = [[f"the mill has {n} sacks", f"doves {n % 3}"] for n in range(6)]
    expected = [serial.answer("who?", row, max_new_tokens=3) for row in rows]

    def is_equal(number: int) -> bool:
        row, answer = rows[number % 6], expected[number % 6]
        if number % 2:
            return gen.answer("who?", row, max_new_tokens=3).token_ids == answer.token_ids
        stream = gen.stream("who?", row, max_new_tokens=3)
        return "".join(stream) == answer.text and stream.answer.token_ids == answer.token_ids

    async def tasks() -> list[bool]:
        return await asyncio.gather(*(asyncio.to_thread(is_equal, number) for number in range(36)))

    with ThreadPoolExecutor(16) as threads:
        running = [threads.submit(is_equal, number) for number in range(24)]
        assert all(asyncio.run(tasks())) and all(one.result() for one in running)
    assert store.metrics.computed == len({text for row in rows for text in row}) + 1  # each once, and the prefix
