"""Callers that ask at the same time: batching, errors, cancellation, fairness and forks."""

import asyncio
import os
import random
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from batches import buffers, documents, request
from tiny import ARCHITECTURES, WORDS, backbone, generator

from kvfusion_rag import DiskStore, DocumentStore, KVFusionGenerator, MemoryStore, OverloadError
from kvfusion_rag.engine.queue import RequestQueue
from kvfusion_rag.engine.requests import MAX_BATCH
from kvfusion_rag.fusion.sampling import DecodingOptions
from kvfusion_rag.fusion.torch_model import TorchModel
from kvfusion_rag.model.kv import KVShape

VOCABULARY = WORDS.split()
SHAPE = KVShape(2, 2, 4, 4, torch.float32)
CPU = torch.device("cpu")
architectures = pytest.mark.parametrize("architecture", ARCHITECTURES)


def test_callers_in_many_threads_get_their_own_answers():
    gen = generator("llama")
    rng = random.Random(8)
    asked = [(f"who has {n} sacks?", documents(rng, 1 + n % 4)) for n in range(12)]
    expected = [gen.answer(q, d, max_new_tokens=5).token_ids for q, d in asked]
    found: list = [None] * len(asked)

    def ask(n):
        found[n] = gen.answer(*asked[n], max_new_tokens=5).token_ids

    threads = [threading.Thread(target=ask, args=(n,)) for n in range(len(asked))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == expected


def gathered(gen: KVFusionGenerator) -> list[int]:
    """Record the number of questions of every batch."""
    seen = []
    answer = gen._queue._answer_all

    def noted(requests, options):
        seen.append(len(requests))
        return answer(requests, options)

    gen._queue._answer_all = noted
    return seen


def test_waiting_tasks_are_batched():
    gen, rows = generator("llama"), documents(random.Random(9), 4)
    questions = [f"who has {n} sacks?" for n in range(20)]
    expected = [gen.answer(q, rows, max_new_tokens=4).token_ids for q in questions]
    seen = gathered(gen)

    async def all_at_once():
        return await asyncio.gather(*(gen.aanswer(q, rows, max_new_tokens=4) for q in questions))

    assert [a.token_ids for a in asyncio.run(all_at_once())] == expected
    assert sum(seen) == 20 and len(seen) < 10 and max(seen) > 4


def test_different_options_and_modes_are_separate_batches():
    gen, rows = generator("llama"), documents(random.Random(10), 3)
    asked = [{"max_new_tokens": 2 + n % 2, "mode": ("fusion", "concat")[n % 3 == 0]} for n in range(12)]
    expected = [gen.answer("who?", rows, **options).token_ids for options in asked]

    async def all_at_once():
        return await asyncio.gather(*(gen.aanswer("who?", rows, **options) for options in asked))

    assert [a.token_ids for a in asyncio.run(all_at_once())] == expected


def held(gen: KVFusionGenerator):
    """Block the queue. Return an event that is set when it starts, and one that lets it continue."""
    begun, go_on = threading.Event(), threading.Event()
    answer = gen._queue._answer_all

    def waiting(requests, options):
        begun.set()
        assert go_on.wait(20)
        return answer(requests, options)

    gen._queue._answer_all = waiting
    return begun, go_on


def test_full_queue_raises_overload_error():
    gen = generator("llama")
    gen._queue._max_waiting = 3
    begun, go_on = held(gen)
    with ThreadPoolExecutor(4) as pool:
        first = pool.submit(gen.answer, "who?", max_new_tokens=1)
        assert begun.wait(20)
        others = [pool.submit(gen.answer, "where?", max_new_tokens=1) for _ in range(3)]
        until(lambda: len(gen._queue._waiting) == 3)
        with pytest.raises(OverloadError, match="3 waiting plus 1 new questions exceed the limit of 3") as caught:
            gen.answer("why?", max_new_tokens=1)
        assert "\n" not in str(caught.value)
        go_on.set()
        assert all(f.result().text is not None for f in (first, *others))


def until(holds, seconds=20.0):
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.005)


def test_an_error_of_one_caller_does_not_affect_others():
    gen = generator("llama")
    begun, go_on = held(gen)
    with ThreadPoolExecutor(4) as pool:
        first = pool.submit(gen.answer, "who?", max_new_tokens=1)
        assert begun.wait(20)
        good = pool.submit(gen.answer, "where?", max_new_tokens=2)
        bad = pool.submit(gen._queue.ask, [replace(request("ab"), encoded=None)], DecodingOptions(2))
        until(lambda: len(gen._queue._waiting) == 2)
        go_on.set()
        assert first.result().finish_reason == "length"
        assert len(good.result().token_ids) == 2
        with pytest.raises(AttributeError):
            bad.result()


def test_a_cancelled_task_ends_at_a_token_and_others_continue():
    gen, rows = generator("llama"), documents(random.Random(11), 3)
    expected = gen.answer("where?", rows, max_new_tokens=30).token_ids
    steps = []
    forward = gen._engine.model.backbone.forward

    async def cancel_one():
        loop = asyncio.get_running_loop()

        def counted(ids, *args, **kwargs):
            steps.append(len(ids[0]))
            if len(steps) == 4:
                loop.call_soon_threadsafe(tasks[0].cancel)
                until(lambda: any(r.cancelled.is_set() for r in running))
            return forward(ids, *args, **kwargs)

        gen._engine.model.backbone.forward = counted
        requests = gen._engine.request
        running = []
        gen._engine.request = lambda *args, **named: (made := requests(*args, **named), running.append(made))[0]
        tasks = [asyncio.create_task(gen.aanswer(q, rows, max_new_tokens=30)) for q in ("who built it?", "where?")]
        return await asyncio.gather(*tasks, return_exceptions=True)

    given_up, answer = asyncio.run(cancel_one())
    assert isinstance(given_up, asyncio.CancelledError)
    assert answer.token_ids == expected


def test_others_are_answered_when_the_answering_caller_is_interrupted():
    gen = generator("llama")
    begun, go_on = held(gen)
    answer = gen._queue._answer_all
    interrupted = []

    def interrupt_once(requests, options):
        if not interrupted:
            begun.set()
            assert go_on.wait(20)
            interrupted.append(True)
            raise KeyboardInterrupt
        return answer(requests, options)

    gen._queue._answer_all = interrupt_once
    with ThreadPoolExecutor(3) as pool:
        first = pool.submit(gen.answer, "who?", max_new_tokens=1)
        assert begun.wait(20)
        second = pool.submit(gen.answer, "where?", max_new_tokens=2)
        until(lambda: len(gen._queue._waiting) == 1)
        go_on.set()
        with pytest.raises(KeyboardInterrupt):
            first.result()
        assert len(second.result().token_ids) == 2
    assert not gen._queue._waiting


def test_without_gathering_callers_are_not_batched():
    gen = KVFusionGenerator(TorchModel(backbone("llama")), store=None, gather=False)
    with_it = KVFusionGenerator(TorchModel(backbone("llama")), store=None)
    expected = with_it.answer("who?", ["the old mill"], max_new_tokens=3).token_ids
    assert gen.answer("who?", ["the old mill"], max_new_tokens=3).token_ids == expected
    assert asyncio.run(gen.aanswer("who?", ["the old mill"], max_new_tokens=3)).token_ids == expected
    assert gen.with_settings(max_new_tokens=3)._queue is None


def test_a_question_without_documents_does_not_change_others_in_mode_ape():
    """Pads used to attend to the first question's slots only. If it had none, the whole row became NaN."""
    rng = random.Random(12)
    gen = generator("llama", mode="ape", ape_scale=0.9)
    docs = documents(rng, 8)
    rows = [[], docs[:7], docs]
    questions = [" ".join(rng.choices(VOCABULARY, k=60)), "who?", "where was it?"]
    singles = [gen.answer(q, row, max_new_tokens=5).token_ids for q, row in zip(questions, rows, strict=True)]
    assert [a.token_ids for a in gen.answer_batch(questions, rows, max_new_tokens=5)] == singles


def test_threads_with_different_torch_thread_counts_answer_for_each_other():
    """The number of torch threads is a setting per thread, and part of every key."""
    gen, rows = generator("llama"), documents(random.Random(13), 3)
    usual, options = torch.get_num_threads(), DecodingOptions(2)

    def ask_elsewhere():
        torch.set_num_threads(usual + 1)
        return gen._engine.request("who?", rows, None, None, options)

    try:
        with ThreadPoolExecutor(1) as pool:
            made = pool.submit(ask_elsewhere).result()
        assert made.version != gen._engine.document_kvs.version
        assert gen._queue.ask([made], options)[0].token_ids == gen.answer("who?", rows, max_new_tokens=2).token_ids
    finally:
        torch.set_num_threads(usual)


def test_a_waiting_request_is_answered_with_changed_weights():
    gen, rows = generator("llama"), documents(random.Random(14), 3)
    options = DecodingOptions(3)
    waiting = gen._engine.request("who?", rows, None, None, options)
    with torch.no_grad():
        gen._engine.model.backbone.model.get_input_embeddings().weight.mul_(1.5)
    (found,) = gen._engine.answer_all([waiting], options)
    assert found.token_ids == gen.answer("who?", rows, max_new_tokens=3).token_ids
    assert {s.origin for s in found.sources} == {"computed"}


def test_an_interrupt_during_retries_loses_no_caller():
    gen = generator("llama")
    begun, go_on = held(gen)
    answer, calls = gen._queue._answer_all, []

    def failing(requests, options):
        calls.append(len(requests))
        if len(calls) == 2:  # the three waiting callers in one batch
            raise RuntimeError("no")
        if len(calls) == 3:  # the first of them on its own
            raise KeyboardInterrupt
        return answer(requests, options)

    gen._queue._answer_all = failing
    with ThreadPoolExecutor(4) as pool:
        first = pool.submit(gen.answer, "who?", max_new_tokens=1)
        assert begun.wait(20)
        others = [pool.submit(gen.answer, "where?", max_new_tokens=2) for _ in range(3)]
        until(lambda: len(gen._queue._waiting) == 3)
        go_on.set()
        assert first.result().token_ids
        ends = [other.exception(20) for other in others]
    assert sum(isinstance(end, KeyboardInterrupt) for end in ends) == 1 and ends.count(None) == 2
    assert calls[:3] == [1, 3, 1]


@pytest.mark.parametrize("kind", ["miss", "computed", "stored", "hit"])
def test_a_store_callback_may_ask_about_the_same_documents(tmp_path, kind):
    asked = []

    def on_event(event):
        if event.kind == kind and not asked:
            asked.append(gen)
            asked.append(gen.answer("where?", mills, max_new_tokens=2).token_ids)

    mills = ["the old mill", "the river", "white doves"]
    store = DocumentStore(MemoryStore(), DiskStore(tmp_path / "s"), on_event=on_event)
    gen = KVFusionGenerator(TorchModel(backbone("llama")), store=store)
    if kind == "hit":
        gen.prefill(mills)
        gen.store.memory.clear()
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(gen.answer, "who?", mills, max_new_tokens=2).result(20).token_ids
    assert len(asked[1]) == 2


def test_a_failed_batch_is_freed_before_its_callers_are_retried(monkeypatch):
    gen = generator("llama")
    answer_all, alive = gen._engine.answer_all, []
    forward, begun, go_on = gen._engine.model.backbone.forward, threading.Event(), threading.Event()

    def failing(ids, *args, **options):
        begun.set()
        go_on.wait(20)
        if ids.shape[0] > 1:
            raise RuntimeError("together alone")
        return forward(ids, *args, **options)

    def noted(requests, options):
        alive.append(buffers() - before)
        return answer_all(requests, options)

    monkeypatch.setattr(gen._engine.model.backbone, "forward", failing)
    gen._queue._answer_all = noted
    before = buffers()
    with ThreadPoolExecutor(4) as pool:
        asked = [pool.submit(gen.answer, "who?", ["the old mill"], max_new_tokens=1)]
        assert begun.wait(20)
        for mill in ("the mill", "a river"):
            asked.append(pool.submit(gen.answer, "who?", [mill], max_new_tokens=1))
        until(lambda: len(gen._queue._waiting) == 2)
        go_on.set()
        assert all(one.result(20).token_ids for one in asked)
    assert alive == [0] * 4  # the first caller, the other two together, and each of them on its own


def test_cancelled_callers_do_not_count_as_waiting():
    gen = generator("llama")
    gen._queue._max_waiting = 2
    begun, go_on = held(gen)
    with ThreadPoolExecutor(4) as pool:
        first = pool.submit(gen.answer, "who?", max_new_tokens=1)
        assert begun.wait(20)
        given_up = gen._queue._submit([request("")] * 2, DecodingOptions(1))
        with pytest.raises(OverloadError):
            gen.answer("where?", max_new_tokens=1)
        given_up.cancel()
        second = pool.submit(gen.answer, "where?", max_new_tokens=1)
        until(lambda: len(gen._queue._waiting) == 1)
        go_on.set()
        assert first.result().token_ids and second.result().token_ids


def test_a_caller_with_many_questions_does_not_block_others():
    gen = generator("llama")
    seen = gathered(gen)
    answers = gen.answer_batch(
        [f"who has {n}?" for n in range(MAX_BATCH + 5)], [[]] * (MAX_BATCH + 5), max_new_tokens=1
    )
    assert seen == [MAX_BATCH, 5] and len(answers) == MAX_BATCH + 5


@pytest.mark.parametrize("jobs", [1, 3, 20])
def test_tenants_that_wait_take_turns(jobs):
    served: list[str] = []

    def answer(requests, options):
        served.append(requests[0].namespace)
        return [None] * len(requests)

    queue = RequestQueue(answer)
    waiting = [
        queue._submit([replace(request("a"), namespace=name)], DecodingOptions(number + 1))
        for number, name in enumerate("a" * jobs + "bc")
    ]
    for job in waiting:
        queue._finish(job)
    assert len(served) == len(waiting) and set(served[:3]) == set("abc")
    assert [served.index(name) for name in "abc"] == [0, 1, 2]


@pytest.mark.parametrize("options", [{}, {"focus": 1}], ids=["all", "focus"])
@pytest.mark.parametrize("kind", ["answer", "stream"])
def test_prefill_ends_at_its_next_pass_when_nobody_waits(monkeypatch, kind, options):
    gen, rows = generator("llama"), documents(random.Random(16), 40)
    begun, go_on, passes = threading.Event(), threading.Event(), []
    prefill = gen._engine.model.backbone.prefill

    def held_prefill(ids, prefix, starts=None):
        passes.append(ids)
        begun.set()
        assert go_on.wait(20)
        return prefill(ids, prefix, starts)

    async def ask_and_leave():
        stream = gen.stream("who?", rows, max_new_tokens=2, **options) if kind == "stream" else None
        asked = anext(stream, None) if stream else gen.aanswer("who?", rows, max_new_tokens=2, **options)
        task = asyncio.ensure_future(asked)
        await asyncio.to_thread(begun.wait, 20)
        task.cancel()
        await asyncio.sleep(0.01)
        go_on.set()
        with pytest.raises(asyncio.CancelledError):
            await task

    gen.answer("who?", ["the old mill"], max_new_tokens=1)  # keeps the prefix
    with monkeypatch.context() as patched:
        patched.setattr(gen._engine.model.backbone, "prefill", held_prefill)
        asyncio.run(ask_and_leave())
        gen.answer("who?", ["the old mill"], max_new_tokens=1)  # after the cancelled one
        assert len(passes) <= 2
    assert (
        gen.answer("who?", rows, max_new_tokens=2).token_ids
        == generator("llama").answer("who?", rows, max_new_tokens=2).token_ids
    )


def test_a_forked_process_answers_while_its_parent_is_answering():
    gen = generator("llama")
    expected = gen.answer("where?", max_new_tokens=2).token_ids
    begun, go_on = held(gen)
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(gen.answer, "who?", max_new_tokens=1)
        assert begun.wait(20)
        child = os.fork()
        if not child:
            signal.alarm(20)
            go_on.set()
            torch.set_num_threads(1)  # the parent's threads do not exist in the child
            os._exit(0 if gen._queue._turn.acquire(blocking=False) and not gen._queue._waiting else 1)
        assert os.waitpid(child, 0)[1] == 0
        go_on.set()
        first.result()
    assert len(expected) == 2


def test_siblings_share_the_gate_and_the_queue(monkeypatch):
    gen = generator("llama")
    gates = []
    monkeypatch.setattr(type(gen._engine.model), "run_gate", lambda *given: gates.append(given))
    tenants = [gen.with_namespace(name) for name in "abc"] + [gen.with_settings(max_new_tokens=3)]
    assert not gates
    assert all(tenant.gate is gen.gate and tenant._queue is gen._queue for tenant in tenants)


def test_tenants_that_wait_are_batched_and_get_their_own_answers():
    gen = generator("llama")
    rows = documents(random.Random(15), 3)
    tenants = [gen.with_namespace(name) for name in "abcd"]
    expected = [tenant.answer(f"who has {n} sacks?", rows, max_new_tokens=4) for n, tenant in enumerate(tenants)]
    sizes = gathered(gen)

    async def ask_all():
        calls = (t.aanswer(f"who has {n} sacks?", rows, max_new_tokens=4) for n, t in enumerate(tenants))
        return await asyncio.gather(*calls)

    answers = asyncio.run(ask_all())
    assert [answer.token_ids for answer in answers] == [answer.token_ids for answer in expected]
    assert max(sizes) > 1  # questions of several tenants in one batch
    assert {s.origin for answer in answers for s in answer.sources} == {"memory"}
    assert all(tenant.clear() == len(rows) + 1 for tenant in tenants)  # each tenant has its own KVs and prefix
