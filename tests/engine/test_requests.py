"""Questions decoded together: whose documents share a row of the fused cache, and that no answer tells it."""

import asyncio
import gc
import os
import random
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import ARCHITECTURES, WORDS, backbone, generator
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from kvfusion_rag import (
    DiskStore,
    Document,
    DocumentStore,
    KVFusionGenerator,
    MemoryLimitError,
    MemoryStore,
    OverloadError,
)
from kvfusion_rag.engine.modes import AnswerMode, PlacedDocument
from kvfusion_rag.engine.requests import MAX_BATCH, MAX_FOREIGN, MAX_ROW_TOKENS, Batch, Request, batches
from kvfusion_rag.fusion.fused_cache import BufferPool, FusedBuffer, FusedLayer
from kvfusion_rag.fusion.interface import Question
from kvfusion_rag.fusion.memory import is_out_of_memory
from kvfusion_rag.fusion.sampling import DecodingOptions
from kvfusion_rag.fusion.torch_model import TorchModel
from kvfusion_rag.model.attention import FOLDED_ON_CPU, GROUPED, grouped_attention
from kvfusion_rag.model.kv import DocumentKV, KVShape
from kvfusion_rag.text.documents import Reading
from kvfusion_rag.text.layouts import FixedLayout

VOCABULARY = WORDS.split()
SHAPE = KVShape(2, 2, 4, torch.float32)
CPU = torch.device("cpu")
architectures = pytest.mark.parametrize("architecture", ARCHITECTURES)


def documents(rng: random.Random, count: int) -> list[Document]:
    return [Document(" ".join(rng.choices(VOCABULARY, k=rng.randint(5, 30)))) for _ in range(count)]


def batch_sizes(gen: KVFusionGenerator, monkeypatch) -> list[tuple[int, int]]:
    """(questions, rows) of every batch from now on."""
    seen = []
    start = gen._engine.runner.start

    def noted(batch, *args):
        seen.append((len(batch.requests), len(batch.rows)))
        return start(batch, *args)

    monkeypatch.setattr(gen._engine, "start", noted)
    return seen


@architectures
@pytest.mark.parametrize("mode", ["fusion", "ape"])
def test_questions_that_share_a_row_get_the_answers_of_single_ones(architecture, mode, monkeypatch):
    """Over the same documents, over nearly the same, and over others; some answers end sooner than others."""
    rng = random.Random(3)
    gen = generator(architecture, mode=mode)
    shared, other = documents(rng, 8), documents(rng, 4)
    rows = [shared, shared[:7], other, shared[::-1], shared[1:], [], other, shared]
    questions = [" ".join(rng.choices(VOCABULARY, k=rng.randint(1, 12))) for _ in rows]
    singles = [gen.answer(q, row, max_new_tokens=8) for q, row in zip(questions, rows, strict=True)]
    stop = singles[0].text[1:3]
    singles = [gen.answer(q, row, max_new_tokens=8, stop=[stop]) for q, row in zip(questions, rows, strict=True)]
    sizes = batch_sizes(gen, monkeypatch)
    together = gen.answer_batch(questions, rows, max_new_tokens=8, stop=[stop])
    assert sizes == [(8, 3)]
    assert len({len(a.token_ids) for a in singles}) > 1
    for single, answer in zip(singles, together, strict=True):
        assert (answer.text, answer.token_ids, answer.usage) == (single.text, single.token_ids, single.usage)
        assert [s.id for s in answer.sources] == [s.id for s in single.sources]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_a_batch_over_shuffled_documents_has_the_same_bits(dtype):
    rng = random.Random(4)
    bone = backbone("llama", dtype)
    rows = [documents(rng, 6)] * 3 + [documents(rng, 3)]
    found = []
    for _ in range(4):
        gen = KVFusionGenerator(TorchModel(bone), store=MemoryStore())
        options, logits = DecodingOptions(4), []
        rows = [rng.sample(row, len(row)) for row in rows]
        requests = [gen._engine.request(f"who has {n} sacks?", row, None, None, options) for n, row in enumerate(rows)]
        (batch,) = gen._engine.runner.batches(requests)
        run = gen._engine.runner.start(batch, options)
        for _ in gen._engine.runner.decode(run, options, on_logits=logits.append):
            pass
        found.append(logits)
    assert all(torch.equal(a, b) for logits in found[1:] for a, b in zip(found[0], logits, strict=True))


def test_a_seed_draws_the_same_for_a_question_in_any_company():
    gen = generator("llama")
    rows = documents(random.Random(5), 5)
    drawn = {"temperature": 1.0, "seed": 11, "max_new_tokens": 6}
    alone = gen.answer("who built it?", rows, **drawn)
    together = gen.answer_batch(["where?", "who built it?", "who has 31 sacks of flour?"], [rows] * 3, **drawn)
    assert together[1].token_ids == alone.token_ids


def test_joined_prompts_and_attentions_that_know_padding_alone_get_rows_of_their_own(monkeypatch):
    gen, rows = generator("llama"), documents(random.Random(6), 3)
    sizes = batch_sizes(gen, monkeypatch)
    gen.answer_batch(["who?", "where?"], [rows, rows], mode="concat", max_new_tokens=1)
    gen._engine.model.backbone.attention = "flash_attention_2"
    gen.answer_batch(["who?", "where?"], [rows, rows], max_new_tokens=1)
    assert sizes == [(2, 2), (2, 2)]


# Which questions share a row


def request(keys: str, question_tokens: int = 4, size: int = 10) -> Request:
    """Over one document of ``size`` tokens for each letter."""
    pieces = tuple(PlacedDocument(key, tuple(range(size)), 0) for key in sorted(keys))
    layout = FixedLayout((1, 2), tuple(range(question_tokens)), None)
    mode = AnswerMode("fusion", tuned=True)
    return Request(Reading((), {}), Question(layout.question, size), mode, pieces, layout, "", "")


wanted = st.lists(
    st.tuples(st.text("abcdefgh", max_size=8).map(lambda t: "".join(sorted(set(t)))), st.integers(1, 40))
)


@given(wanted, st.integers(60, 400))
def test_batches_hold_every_question_once_with_its_documents_and_stay_in_bounds(asked, most):
    requests = [request(keys, tokens) for keys, tokens in asked]
    found = list(batches(requests, max_slots=most, share=True))
    assert [r for batch in found for r in batch.requests] == requests
    for batch in found:
        assert len(batch.requests) <= MAX_BATCH
        assert batch.slots <= most or len(batch.requests) == 1
        assert sorted(n for row in batch.rows for n in row.members) == list(range(len(batch.requests)))
        for row in batch.rows:
            own = [{piece.key for piece in batch.requests[n].fused} for n in row.members]
            assert row.pieces.keys() == set().union(*own)
            assert row.tokens == 10 * len(row.pieces)
            assert all(row.tokens - 10 * len(keys) <= MAX_FOREIGN * row.tokens for keys in own)
            assert list(row.pieces) == sorted(row.pieces)
        assert batch.has_foreign == any(
            {p.key for p in batch.requests[n].fused} != row.pieces.keys() for row in batch.rows for n in row.members
        )


def test_a_row_takes_questions_until_they_are_long_together():
    found = Batch()
    for _ in range(4):
        found = found.joined_by(request("abc", MAX_ROW_TOKENS // 2), share=True)
    assert [row.members for row in found.rows] == [(0, 1), (2, 3)]


# Slots in place


def kv(rng: torch.Generator, rows: int, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    return tuple(torch.randn(rows, 2, tokens, 4, generator=rng) for _ in range(2))


@settings(deadline=None)
@given(st.integers(0, 5), st.integers(0, 6), st.lists(st.integers(1, 4), max_size=6), st.data())
def test_a_layer_in_place_holds_what_concatenation_would(used, room, steps, data):
    """Whatever the room, and whichever rows leave meanwhile."""
    rng = torch.Generator().manual_seed(0)
    rows = 4
    place = kv(rng, rows, used + room)
    expected = [part[:, :, :used].clone() for part in place]
    layer = FusedLayer(*place, used)
    with torch.inference_mode():
        for step in steps:
            new = kv(rng, rows, step)
            expected = [torch.cat([old, more], dim=2) for old, more in zip(expected, new, strict=True)]
            found = layer.update(*new)
            assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
            assert layer.get_seq_length() == expected[0].shape[2]
            if rows > 1 and data.draw(st.booleans()):
                kept = [0, *range(2, rows)] if data.draw(st.booleans()) else [*range(rows - 1)]
                layer.keep(kept)
                expected, rows = [part[kept] for part in expected], len(kept)


def test_a_layer_keeps_gradients():
    place = torch.zeros(1, 2, 8, 4)
    new = torch.ones(1, 2, 3, 4, requires_grad=True)
    keys, _ = FusedLayer(place, place.clone(), 2).update(new, new)
    keys.sum().backward()
    assert torch.equal(new.grad, torch.ones_like(new)) and not place.any()


def test_memory_goes_from_one_fused_context_to_the_next():
    pool = BufferPool()
    first = FusedBuffer([8, 3], SHAPE, CPU, room=4, pool=pool)
    first._keys.fill_(float("nan"))  # what the last question left
    first._values.fill_(float("nan"))
    place = first._memory.data_ptr()
    first.release()
    second = FusedBuffer([2, 4], SHAPE, CPU, pool=pool)
    assert second._memory.data_ptr() == place
    second.slots(0, 0, (1, 2)).keys.fill_(1)
    layer = second.context().layers[0]
    assert layer.keys[0, :, :2].eq(1).all() and layer.keys[0, :, 2:].eq(0).all()  # pads are zero, not NaN
    assert FusedBuffer([2], SHAPE, CPU, pool=pool)._memory.data_ptr() != place  # while the second has it
    second.release()
    assert pool.clear() == first._memory.nbytes and pool.clear() == 0


def test_memory_made_in_inference_mode_serves_outside_of_it():
    gen = generator("llama")
    expected = gen.answer("who?", ["the old mill"], max_new_tokens=3).token_ids
    gen._engine.model._pool.clear()
    with torch.inference_mode():
        gen.answer("who?", ["the old mill"], max_new_tokens=3)
    assert gen.answer("who?", ["the old mill"], max_new_tokens=3).token_ids == expected


def test_an_answer_longer_than_its_room_is_the_same(monkeypatch):
    expected = generator("llama").answer("who?", ["the old mill"], max_new_tokens=40).token_ids
    monkeypatch.setattr("kvfusion_rag.engine.run.SPARE_SLOTS", 3)
    assert generator("llama").answer("who?", ["the old mill"], max_new_tokens=40).token_ids == expected


def test_a_document_read_from_disk_is_not_handed_on_in_slots_that_are_used_again(tmp_path):
    """Another thread may look at it when the first question has ended and its memory has the next one's documents."""
    ids = tuple(range(5))
    disk = DocumentStore(None, generator("llama", store=tmp_path / "s").store.disk, load="always")
    made = DocumentKV(torch.ones(2, 2, 5, 4), torch.ones(2, 2, 5, 4), ids)
    from kvfusion_rag.store import KVRequest, document_key

    key = document_key("m", "", ids)
    disk.disk.put(key, made)
    slots = DocumentKV(torch.empty(2, 2, 5, 4), torch.empty(2, 2, 5, 4), ids)
    landed = []
    land = disk._flights.land
    disk._flights.land = lambda key, document: (landed.append(document), land(key, document))
    disk.fetch({key: KVRequest(ids, slots)}, SHAPE, CPU, "m", lambda keys: pytest.fail("computed"))
    assert slots.keys.eq(1).all()
    assert not landed or landed[0].keys.data_ptr() != slots.keys.data_ptr()


# Grouped attention


class Module(torch.nn.Module):
    num_key_value_groups = 3
    is_causal = True
    training = False


@settings(deadline=None, max_examples=30)
@given(
    st.integers(1, 3), st.sampled_from([1, 2, 5, FOLDED_ON_CPU + 3]), st.integers(0, 9), st.booleans(), st.booleans()
)
def test_grouped_attention_is_the_librarys(batch, queries, before, masked, additive_mask):
    rng = torch.Generator().manual_seed(batch * 100 + queries + before)
    slots = before + queries
    query = torch.randn(batch, 6, queries, 8, generator=rng)
    key, value = torch.randn(2, batch, 2, slots + 5, 8, generator=rng)[:, :, :, :slots]  # as in a place with room
    mask = None
    if masked or (before and queries > 1):
        mask = torch.rand(batch, 1, queries, slots, generator=rng) > 0.3
        mask[..., -1] = True
        if additive_mask:
            mask = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
    found, _ = grouped_attention(Module(), query, key, value, mask, scaling=0.3)
    expected, _ = sdpa_attention_forward(Module(), query, key, value, mask, scaling=0.3)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_models_whose_heads_share_keys_use_it():
    assert backbone("llama").attention == GROUPED
    assert backbone("gpt2").attention == "sdpa"
    assert generator("llama").identity() == generator("llama").identity()


def test_callers_from_many_threads_get_their_own_answers():
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


def test_the_shape_of_a_request_counts_its_own_tokens_alone():
    assert request("abc").fused_tokens == 30 and replace(request("a"), fused=None).fused_tokens == 0


# Callers that come at the same time


def gathered(gen: KVFusionGenerator) -> list[int]:
    """Questions of every batch from now on."""
    seen = []
    answer = gen._queue._answer_all

    def noted(requests, options):
        seen.append(len(requests))
        return answer(requests, options)

    gen._queue._answer_all = noted
    return seen


def test_tasks_that_wait_are_answered_together():
    gen, rows = generator("llama"), documents(random.Random(9), 4)
    questions = [f"who has {n} sacks?" for n in range(20)]
    expected = [gen.answer(q, rows, max_new_tokens=4).token_ids for q in questions]
    seen = gathered(gen)

    async def all_at_once():
        return await asyncio.gather(*(gen.aanswer(q, rows, max_new_tokens=4) for q in questions))

    assert [a.token_ids for a in asyncio.run(all_at_once())] == expected
    assert sum(seen) == 20 and len(seen) < 10 and max(seen) > 4


def test_other_options_and_modes_are_other_batches():
    gen, rows = generator("llama"), documents(random.Random(10), 3)
    asked = [{"max_new_tokens": 2 + n % 2, "mode": ("fusion", "concat")[n % 3 == 0]} for n in range(12)]
    expected = [gen.answer("who?", rows, **options).token_ids for options in asked]

    async def all_at_once():
        return await asyncio.gather(*(gen.aanswer("who?", rows, **options) for options in asked))

    assert [a.token_ids for a in asyncio.run(all_at_once())] == expected


def held(gen: KVFusionGenerator):
    """Hold the gatherer's work up: an event that it has begun, and one that lets it go on."""
    begun, go_on = threading.Event(), threading.Event()
    answer = gen._queue._answer_all

    def waiting(requests, options):
        begun.set()
        assert go_on.wait(20)
        return answer(requests, options)

    gen._queue._answer_all = waiting
    return begun, go_on


def test_too_many_that_wait_are_told_so():
    gen = generator("llama")
    gen._queue._max_waiting = 3
    begun, go_on = held(gen)
    with ThreadPoolExecutor(4) as pool:
        first = pool.submit(gen.answer, "who?", max_new_tokens=1)
        assert begun.wait(20)
        others = [pool.submit(gen.answer, "where?", max_new_tokens=1) for _ in range(3)]
        until(lambda: len(gen._queue._waiting) == 3)
        with pytest.raises(OverloadError, match="3 questions wait already") as caught:
            gen.answer("why?", max_new_tokens=1)
        assert "\n" not in str(caught.value)
        go_on.set()
        assert all(f.result().text is not None for f in (first, *others))


def until(holds, seconds=20.0):
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.005)


def test_a_caller_with_an_error_does_not_take_the_others_with_it():
    gen = generator("llama")
    begun, go_on = held(gen)
    with ThreadPoolExecutor(4) as pool:
        first = pool.submit(gen.answer, "who?", max_new_tokens=1)
        assert begun.wait(20)
        good = pool.submit(gen.answer, "where?", max_new_tokens=2)
        bad = pool.submit(gen._queue.ask, [replace(request("ab"), reading=None)], DecodingOptions(2))
        until(lambda: len(gen._queue._waiting) == 2)
        go_on.set()
        assert first.result().finish_reason == "length"
        assert len(good.result().token_ids) == 2
        with pytest.raises(AttributeError):
            bad.result()


def test_a_cancelled_task_ends_at_a_token_and_the_rest_go_on():
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


def test_an_interrupted_caller_leaves_the_others_to_be_answered():
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


def test_without_gathering_everyone_is_answered_alone():
    gen = KVFusionGenerator(TorchModel(backbone("llama")), store=None, gather=False)
    with_it = KVFusionGenerator(TorchModel(backbone("llama")), store=None)
    expected = with_it.answer("who?", ["the old mill"], max_new_tokens=3).token_ids
    assert gen.answer("who?", ["the old mill"], max_new_tokens=3).token_ids == expected
    assert asyncio.run(gen.aanswer("who?", ["the old mill"], max_new_tokens=3)).token_ids == expected
    assert gen.with_settings(max_new_tokens=3)._queue is None


def test_a_question_without_documents_does_not_spoil_others_in_mode_ape():
    """Pads of a row used to see what the first question sees, which can be nothing of it: NaN for the whole row."""
    rng = random.Random(12)
    gen = generator("llama", mode="ape", ape_scale=0.9)
    docs = documents(rng, 8)
    rows = [[], docs[:7], docs]
    questions = [" ".join(rng.choices(VOCABULARY, k=60)), "who?", "where was it?"]
    singles = [gen.answer(q, row, max_new_tokens=5).token_ids for q, row in zip(questions, rows, strict=True)]
    assert [a.token_ids for a in gen.answer_batch(questions, rows, max_new_tokens=5)] == singles


def test_threads_that_differ_in_torchs_threads_answer_for_each_other():
    """Their number is a setting of each thread, and part of every key."""
    gen, rows = generator("llama"), documents(random.Random(13), 3)
    usual, options = torch.get_num_threads(), DecodingOptions(2)

    def ask_elsewhere():
        torch.set_num_threads(usual + 1)
        return gen._engine.request("who?", rows, None, None, options)

    try:
        with ThreadPoolExecutor(1) as pool:
            made = pool.submit(ask_elsewhere).result()
        assert made.model != gen._engine.document_kvs.model
        assert gen._queue.ask([made], options)[0].token_ids == gen.answer("who?", rows, max_new_tokens=2).token_ids
    finally:
        torch.set_num_threads(usual)


def test_a_request_that_waited_while_weights_changed_is_answered_with_the_new_ones():
    gen, rows = generator("llama"), documents(random.Random(14), 3)
    options = DecodingOptions(3)
    waiting = gen._engine.request("who?", rows, None, None, options)
    with torch.no_grad():
        gen._engine.model.backbone.model.get_input_embeddings().weight.mul_(1.5)
    (found,) = gen._engine.answer_all([waiting], options)
    assert found.token_ids == gen.answer("who?", rows, max_new_tokens=3).token_ids
    assert {s.origin for s in found.sources} == {"computed"}


def test_an_interrupt_among_retries_loses_nobody():
    gen = generator("llama")
    begun, go_on = held(gen)
    answer, calls = gen._queue._answer_all, []

    def failing(requests, options):
        calls.append(len(requests))
        if len(calls) == 2:  # the three who waited, together
            raise RuntimeError("no")
        if len(calls) == 3:  # the first of them alone
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
def test_a_callback_of_the_store_may_ask_over_the_same_documents(tmp_path, kind):
    asked = []

    def on_event(event):
        if event.kind == kind and not asked:
            asked.append(gen)
            asked.append(gen.answer("where?", mills, max_new_tokens=2).token_ids)

    mills = ["the old mill", "the river", "white doves"]
    store = DocumentStore(MemoryStore(), DiskStore(tmp_path / "s"), on_event=on_event, load="always")
    gen = KVFusionGenerator(TorchModel(backbone("llama")), store=store)
    if kind == "hit":
        gen.prefill(mills)
        gen.store.memory.clear()
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(gen.answer, "who?", mills, max_new_tokens=2).result(20).token_ids
    assert len(asked[1]) == 2


def buffers() -> int:
    gc.collect()
    return sum(isinstance(one, FusedBuffer) for one in gc.get_objects())


def test_a_failed_batch_is_gone_when_its_callers_are_tried_alone(monkeypatch):
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
    assert alive == [0] * 4  # the first, the two together, and each of them


def test_whoever_keeps_an_error_of_memory_keeps_no_cache(monkeypatch):
    gen = generator("llama")

    def full(*args, **options):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(gen._engine.model.backbone, "forward", full)
    before = buffers()
    try:
        gen.answer("who?", ["the old mill"], max_new_tokens=1)
    except MemoryLimitError as error:
        assert buffers() == before and "not enough memory" in str(error)
    else:
        pytest.fail("no error")


@pytest.mark.parametrize(
    ("error", "is_one"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), True),
        (MemoryError(), True),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate"), True),
        (RuntimeError("CUDA error: out of memory"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("MPS backend out of memory (MPS allocated: 1 GB)"), True),
        (RuntimeError("expected scalar type Float but found Half"), False),
    ],
)
def test_shortage_of_memory_is_known_by_its_kind_or_its_words(error, is_one):
    assert is_out_of_memory(error) is is_one


def test_answers_of_a_large_batch_have_their_room_from_the_start(monkeypatch):
    gen = generator("llama")
    monkeypatch.setattr(
        "kvfusion_rag.engine.run.SPARE_SLOTS", 32
    )  # as little for each of its rows as 4096 are for many more
    monkeypatch.setattr("kvfusion_rag.fusion.fused_cache._larger", lambda *args: pytest.fail("everything moved"))
    rows = [[" ".join(VOCABULARY[n : n + 4] * 25)] for n in range(8)]
    answers = gen.answer_batch(["who?"] * 8, rows, max_new_tokens=30)
    assert max(len(answer.token_ids) for answer in answers) == 30


def test_callers_who_gave_up_do_not_count_as_waiting():
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


def test_a_caller_with_many_questions_lets_others_have_their_turn():
    gen = generator("llama")
    seen = gathered(gen)
    answers = gen.answer_batch(
        [f"who has {n}?" for n in range(MAX_BATCH + 5)], [[]] * (MAX_BATCH + 5), max_new_tokens=1
    )
    assert seen == [MAX_BATCH, 5] and len(answers) == MAX_BATCH + 5


def test_a_forked_process_answers_though_its_parent_was_answering():
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
            torch.set_num_threads(1)  # the parent's threads are gone
            os._exit(0 if gen._queue._turn.acquire(blocking=False) and not gen._queue._waiting else 1)
        assert os.waitpid(child, 0)[1] == 0
        go_on.set()
        first.result()
    assert len(expected) == 2


def test_memory_much_larger_than_needed_is_let_go():
    pool = BufferPool()
    large = FusedBuffer([400], SHAPE, CPU, pool=pool)
    large.release()
    small = FusedBuffer([4], SHAPE, CPU, pool=pool)
    assert small._memory.nbytes < large._memory.nbytes
    small.release()
    assert pool.clear() == small._memory.nbytes
