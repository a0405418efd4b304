"""Recorded steps are the ordinary ones: same tokens, any order the same bits, whoever ends first.

A GPU replays a graph; here a recorder runs the pass again over the same memory, which is all that a graph can do. What
only a GPU can show is marked ``gpu``.
"""

from __future__ import annotations

import logging
import random
from contextlib import nullcontext
from unittest.mock import ANY

import pytest
import torch
from peft import LoraConfig
from tiny import ARCHITECTURES, backbone

from kvfusion_rag import KVFusionGenerator, MemoryStore
from kvfusion_rag.fusion.fused_cache import FusedContext
from kvfusion_rag.fusion.recording import WORTH, CudaGraphs
from kvfusion_rag.model.backbone import Backbone
from tests.engine.test_requests import documents
from tests.fusion.test_fusion_laws import logits_of

QUESTIONS = ["who built it?", "where do doves sleep?", "who has 31 sacks of flour?", "when was the lamp lit?"]


class Rerun:
    """Runs a pass again where a GPU would replay it, with the count of used slots that stood at the recording."""

    def __init__(self, contexts: list[FusedContext]) -> None:
        self.recorded, self.replayed = 0, 0
        self._contexts = contexts
        self.given_up: list[str] = []

    def record(self, run):
        self.recorded += 1
        context = self._contexts[-1]
        frozen = context.used

        def replay():
            self.replayed += 1
            used = context.used
            context.grow(frozen - used)
            logits = run()
            context.grow(used - frozen)
            return logits

        return replay

    def give_up(self, cause):
        self.given_up.append(cause)


CONTEXTS: list[FusedContext] = []  # that were taken whole, the last one last


def recorded(made: KVFusionGenerator) -> Rerun:
    made._engine.recorder = Rerun(CONTEXTS)
    return made._engine.recorder


def pair(architecture="llama", **settings) -> tuple[KVFusionGenerator, KVFusionGenerator, Rerun]:
    """Two generators over one model, of which the second records."""
    bone = backbone(architecture, **settings)
    plain, other = (KVFusionGenerator(bone, store=MemoryStore()) for _ in range(2))
    return plain, other, recorded(other)


@pytest.fixture(autouse=True)
def garbage_in_fresh_memory(monkeypatch):
    empty = torch.empty
    monkeypatch.setattr(
        torch,
        "empty",
        lambda *a, **k: made.fill_(float("nan")) if (made := empty(*a, **k)).is_floating_point() else made,
    )


@pytest.fixture(autouse=True)
def noted_contexts(monkeypatch):
    take = FusedContext.take_whole
    monkeypatch.setattr(FusedContext, "take_whole", lambda self, at: (CONTEXTS.append(self), take(self, at))[1])
    yield
    CONTEXTS.clear()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_an_answer_has_the_tokens_of_ordinary_steps(architecture):
    plain, other, recorder = pair(architecture)
    rng = random.Random(1)
    for question in QUESTIONS:
        rows = documents(rng, 5)
        expected = plain.answer(question, rows, max_new_tokens=24)
        found = other.answer(question, rows, max_new_tokens=24)
        assert (found.token_ids, found.text, found.usage) == (expected.token_ids, expected.text, expected.usage)
    assert recorder.recorded and recorder.replayed > recorder.recorded


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_any_order_gives_the_same_bits(dtype):
    bone, rng = backbone("qwen3", dtype), random.Random(2)
    for _ in range(20):
        rows, found = documents(rng, rng.randint(1, 6)), []
        for order in (rows, rng.sample(rows, len(rows))):
            made = KVFusionGenerator(bone, store=MemoryStore())
            recorder = recorded(made)
            found.append(logits_of(made, "who built it?", order, max_new_tokens=12))
        assert found[0][1] == found[1][1] and torch.equal(found[0][0], found[1][0])
    assert recorder.recorded


@pytest.mark.parametrize("share", [True, False], ids=["shared documents", "documents of their own"])
def test_questions_that_end_at_different_times_have_their_own_answers(share):
    plain, other, recorder = pair("llama")
    rng = random.Random(3)
    questions = [f"{question} {n}" for n in range(3) for question in QUESTIONS]
    shared = documents(rng, 4)
    rows = [shared if share else documents(rng, rng.randint(0, 4)) for _ in questions]
    singles = [plain.answer(q, row, max_new_tokens=60) for q, row in zip(questions, rows, strict=True)]
    stop = [single.text[3:5] for single in singles[:7]]
    singles = [plain.answer(q, row, max_new_tokens=60, stop=stop) for q, row in zip(questions, rows, strict=True)]
    assert len({len(answer.token_ids) for answer in singles}) > 2
    together = other.answer_batch(questions, rows, max_new_tokens=60, stop=stop)
    assert [a.token_ids for a in together] == [a.token_ids for a in singles]
    assert [a.finish_reason for a in together] == [a.finish_reason for a in singles]
    assert recorder.replayed > recorder.recorded > (0 if share else 1)  # rows that are half empty are recorded anew


def test_an_adapter_takes_part_in_recorded_steps_and_documents_are_prefilled_without():
    plain, other, recorder = pair("llama")
    rows = documents(random.Random(4), 4)
    base = plain.answer("who built it?", rows, max_new_tokens=20).token_ids
    torch.manual_seed(0)
    plain._backbone.add_adapter(LoraConfig(r=4, lora_alpha=64, target_modules="all-linear", init_lora_weights=False))
    expected = plain.answer("who built it?", rows, max_new_tokens=20).token_ids
    found = [
        other.answer("who built it?", rows, max_new_tokens=20, mode=mode).token_ids for mode in ("fusion", "concat")
    ]
    assert found[0] == expected != base
    assert found[1] == plain.answer("who built it?", rows, max_new_tokens=20, mode="concat").token_ids
    assert recorder.recorded == 2


def test_short_answers_and_ape_are_not_worth_or_not_able_to_be_recorded():
    plain, other, recorder = pair("llama")
    rows = documents(random.Random(5), 4)
    for options in ({"max_new_tokens": WORTH}, {"max_new_tokens": 30, "mode": "ape"}):
        expected = plain.answer("who built it?", rows, **options).token_ids
        assert other.answer("who built it?", rows, **options).token_ids == expected
    assert not recorder.recorded


def test_an_answer_that_may_outgrow_its_room_is_not_recorded_before_it_has_more(monkeypatch):
    plain, other, recorder = pair("llama")
    rows = ["the old mill of dorn"]  # half of which is less room than ROOM
    expected = plain.answer("who built it?", rows, max_new_tokens=40).token_ids
    assert len(expected) > 20
    monkeypatch.setattr("kvfusion_rag.engine.engine.ROOM", 12)
    assert other.answer("who built it?", rows, max_new_tokens=40).token_ids == expected
    assert recorder.recorded == 1 and recorder.replayed < 35  # only once everything has moved to where there is room


@pytest.mark.parametrize("fault", ["cannot be captured", "other logits"])
def test_what_cannot_be_recorded_is_said_once_and_answered_all_the_same(fault, monkeypatch, caplog):
    def record(self, run):
        if fault == "cannot be captured":
            raise RuntimeError("operation not permitted when stream is capturing")
        return lambda: run() + torch.arange(512.0)

    monkeypatch.setattr(CudaGraphs, "_record", record)
    monkeypatch.setattr(torch.cuda, "device", nullcontext)
    plain, other, _ = pair("llama")
    other._engine.recorder = CudaGraphs(torch.device("cuda"))
    rows = documents(random.Random(7), 3)
    with caplog.at_level(logging.WARNING, "kvfusion_rag.fusion.recording"):
        for made in (other, other.with_settings(max_new_tokens=20), other.with_namespace("b")):
            for question in QUESTIONS:
                expected = plain.answer(question, rows, max_new_tokens=20).token_ids
                assert made.answer(question, rows, max_new_tokens=20).token_ids == expected
    assert [r.message for r in caplog.records if r.name == "kvfusion_rag.fusion.recording"] == [ANY]
    assert "one kernel at a time" in caplog.text


def test_a_recording_that_finds_no_memory_is_tried_again_at_the_next_answer(monkeypatch, caplog):
    def record(self, run):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(CudaGraphs, "_record", record)
    monkeypatch.setattr(torch.cuda, "device", nullcontext)
    plain, other, _ = pair("llama")
    other._engine.recorder = CudaGraphs(torch.device("cuda"))
    rows = documents(random.Random(9), 3)
    expected = plain.answer("who?", rows, max_new_tokens=20).token_ids
    assert other.answer("who?", rows, max_new_tokens=20).token_ids == expected
    monkeypatch.setattr(CudaGraphs, "_record", lambda self, run: run)
    assert other.answer("who?", rows, max_new_tokens=20).token_ids == expected
    assert other._engine.recorder.recorded == 1 and "one kernel at a time" not in caplog.text


def test_where_there_is_no_gpu_steps_are_ordinary_ones():
    made = KVFusionGenerator(backbone("llama"), store=None, cuda_graphs=True)
    assert made._engine.recorder is None and made.with_settings(positions="global")._engine.recorder is None


@pytest.mark.gpu
@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gpt2"])
def test_graphs_on_a_gpu_give_the_tokens_of_ordinary_steps(architecture, caplog):
    bone = backbone(architecture)
    bone = Backbone(bone.model.to("cuda"), bone.tokenizer, bone.settings, model_id="on a GPU")
    plain, other = (KVFusionGenerator(bone, store=None, cuda_graphs=graphs) for graphs in (False, True))
    rng = random.Random(8)
    rows = [documents(rng, 5) for _ in QUESTIONS]
    for ask in (lambda made: [made.answer(q, r, max_new_tokens=24) for q, r in zip(QUESTIONS, rows, strict=True)],
                lambda made: made.answer_batch(QUESTIONS, rows, max_new_tokens=24)):  # fmt: skip
        assert [a.token_ids for a in ask(other)] == [a.token_ids for a in ask(plain)]
    assert other._engine.recorder.recorded > 1 and "one kernel at a time" not in caplog.text
    kept = torch.cuda.memory_reserved()
    for _ in range(200):
        other.answer(QUESTIONS[0], rows[0], max_new_tokens=24)
    assert torch.cuda.memory_reserved() < kept + (1 << 30)
