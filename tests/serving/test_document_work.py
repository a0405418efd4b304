"""Requests on documents: in steps, fair between tenants, behind answers, and until their client leaves."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Generator, Sequence
from typing import Any

import pytest
import tiny
from fakes import RecordingGenerator
from serving_client import CHAT, request

from kvfusion_rag import Document, DocumentStore, MemoryStore, Source
from kvfusion_rag.serving import document_work
from kvfusion_rag.serving.admission import Load
from kvfusion_rag.serving.document_work import DocumentWork
from kvfusion_rag.text.steps import finish
from tests.serving.test_admission import disconnect_early, served, soon


def counted(log: list[str], name: str, steps: int) -> Generator[None, None, str]:
    for _ in range(steps):
        log.append(name)
        yield
    return name


@pytest.mark.parametrize("requests", [1, 2, 20])
def test_tenants_take_turns_however_many_requests_each_has(requests):
    log: list[str] = []

    async def run() -> None:
        work = DocumentWork(Load())
        busy = [asyncio.ensure_future(work.run("a", counted(log, "a", 5))) for _ in range(requests)]
        await asyncio.sleep(0)
        assert await work.run("b", counted(log, "b", 5)) == "b"
        assert await asyncio.gather(*busy) == ["a"] * requests

    asyncio.run(run())
    assert log.count("a") == 5 * requests
    assert log.index("b") <= 2 and "".join(log).rindex("b") <= 2 * 5 + 2


def test_cancelled_work_ends_after_its_step_and_others_go_on():
    log: list[str] = []
    hold, started, closed = threading.Event(), threading.Event(), threading.Event()

    def held() -> Generator[None, None, None]:
        try:
            while True:
                started.set()
                assert hold.wait(10)
                log.append("held")
                yield
        finally:
            closed.set()

    async def run() -> None:
        work = DocumentWork(Load())
        first = asyncio.ensure_future(work.run("a", held()))
        await asyncio.to_thread(started.wait, 10)
        second = asyncio.ensure_future(work.run("b", counted(log, "b", 2)))
        first.cancel()
        await asyncio.sleep(0.05)
        assert not first.done()  # a request is in progress until its thread is free
        hold.set()
        assert await second == "b" and closed.is_set()
        with pytest.raises(asyncio.CancelledError):
            await first

    asyncio.run(run())
    assert log == ["held", "b", "b"]


def test_work_rests_while_other_requests_are_in_progress(monkeypatch):
    rests: list[float] = []

    async def rest(seconds: float) -> None:
        rests.append(seconds)

    monkeypatch.setattr(document_work.asyncio, "sleep", rest)
    load = Load()
    load.add(None)  # the request on documents itself
    asyncio.run(DocumentWork(load).run(None, counted([], "", 3)))
    assert rests == []
    load.add(None)
    asyncio.run(DocumentWork(load).run(None, counted([], "", 3)))
    assert len(rests) == 3 and min(rests) > 0


class EndlessPrefill(RecordingGenerator):
    """A generator whose prefill never ends."""

    steps = 0
    closed = False

    def prefill_steps(
        self, documents: Sequence[Document | str], **wording: Any
    ) -> Generator[None, None, list[Source]]:
        try:
            while True:
                self.steps += 1
                yield
        finally:
            self.closed = True


def test_prefill_ends_when_its_client_leaves_and_does_not_hold_up_answers():
    generator = EndlessPrefill()
    with served(generator, max_concurrency=9) as client:
        body = {"documents": ["x"]}

        def answered() -> None:
            assert soon(lambda: generator.steps > 3)
            assert client.post(CHAT, json=request()).status_code == 200

        disconnect_early(client, body, answered, path="/v1/documents")
        assert soon(lambda: generator.closed)


def test_steps_of_prefill_do_what_prefill_does():
    documents = [f"the river number {n} runs past an old mill " * (n % 4 + 1) for n in range(30)]
    whole, stepped = tiny.generator(long_documents="split"), tiny.generator(long_documents="split")
    assert finish(stepped.prefill_steps(documents)) == whole.prefill(documents)
    assert len(stepped.store.memory) == len(whole.store.memory)
    assert finish(stepped.forget_steps(documents)) == whole.forget(documents) > 0


def test_prefill_that_is_closed_keeps_what_it_has_computed():
    store = DocumentStore(MemoryStore())
    generator = tiny.generator(store=store)
    documents = [f"the river number {n} runs past an old mill " * 9 for n in range(40)]
    steps = generator.prefill_steps(documents)
    while len(store.memory) < 5:
        next(steps)
    steps.close()
    assert 5 <= len(store.memory) < 25
    assert {source.origin for source in generator.prefill(documents)} == {"memory", "computed"}


def test_long_document_is_encoded_in_steps(monkeypatch):
    generator = tiny.generator(long_documents="split")
    long = "the river runs past an old mill. " * 2000
    steps = generator.prefill_steps([long])
    for _ in range(5):
        next(steps)
    assert len(generator.store.memory) == 0  # still encoding
    steps.close()
