"""Questions decoded together: which of them share a row of the fused cache, and that their answers do not change."""

import random
from dataclasses import replace

import pytest
import torch
from batches import documents, request
from hypothesis import given
from hypothesis import strategies as st
from tiny import ARCHITECTURES, WORDS, backbone, generator

from kvfusion_rag import KVFusionGenerator, MemoryStore
from kvfusion_rag.engine.requests import MAX_BATCH, MAX_FOREIGN, MAX_ROW_TOKENS, Batch, batches
from kvfusion_rag.fusion.sampling import DecodingOptions
from kvfusion_rag.fusion.torch_model import TorchModel
from kvfusion_rag.model.kv import KVShape

VOCABULARY = WORDS.split()
SHAPE = KVShape(2, 2, 4, 4, torch.float32)
CPU = torch.device("cpu")
architectures = pytest.mark.parametrize("architecture", ARCHITECTURES)


def batch_sizes(gen: KVFusionGenerator, monkeypatch) -> list[tuple[int, int]]:
    """Record (questions, rows) of every batch."""
    seen = []
    start = gen._engine.runner.start

    def noted(batch, *args):
        seen.append((len(batch.requests), len(batch.rows)))
        return start(batch, *args)

    monkeypatch.setattr(gen._engine.runner, "start", noted)
    return seen


@architectures
@pytest.mark.parametrize("mode", ["fusion", "ape"])
def test_questions_sharing_a_row_answer_as_single_questions(architecture, mode, monkeypatch):
    """The questions share all, most or none of their documents, and their answers differ in length."""
    rng = random.Random(3)
    gen = generator(architecture, mode=mode)
    shared, other = documents(rng, 8), documents(rng, 4)
    rows = [shared, shared[:7], other, shared[::-1], shared[1:], [], other, shared]
    questions = [" ".join(rng.choices(VOCABULARY, k=rng.randint(1, 12))) for _ in rows]
    singles = [gen.answer(q, row, max_new_tokens=8) for q, row in zip(questions, rows, strict=True)]
    stop = singles[0].text[2:4]
    singles = [gen.answer(q, row, max_new_tokens=8, stop=[stop]) for q, row in zip(questions, rows, strict=True)]
    sizes = batch_sizes(gen, monkeypatch)
    together = gen.answer_batch(questions, rows, max_new_tokens=8, stop=[stop])
    assert sizes == [(8, 3)]
    assert len({len(a.token_ids) for a in singles}) > 1
    for single, answer in zip(singles, together, strict=True):
        assert (answer.text, answer.token_ids, answer.usage) == (single.text, single.token_ids, single.usage)
        assert [s.id for s in answer.sources] == [s.id for s in single.sources]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_a_batch_has_the_same_bits_for_any_document_order(dtype):
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
        run = gen._engine.runner.start(batch)
        for _ in gen._engine.runner.decode(run, options, on_logits=logits.append):
            pass
        found.append(logits)
    assert all(torch.equal(a, b) for logits in found[1:] for a, b in zip(found[0], logits, strict=True))


def test_a_seed_gives_the_same_answer_in_any_batch():
    gen = generator("llama")
    rows = documents(random.Random(5), 5)
    drawn = {"temperature": 1.0, "seed": 11, "max_new_tokens": 6}
    alone = gen.answer("who built it?", rows, **drawn)
    together = gen.answer_batch(["where?", "who built it?", "who has 31 sacks of flour?"], [rows] * 3, **drawn)
    assert together[1].token_ids == alone.token_ids


def test_joined_prompts_and_padding_only_attention_do_not_share_rows(monkeypatch):
    gen, rows = generator("llama"), documents(random.Random(6), 3)
    sizes = batch_sizes(gen, monkeypatch)
    gen.answer_batch(["who?", "where?"], [rows, rows], mode="concat", max_new_tokens=1)
    gen._engine.model.backbone.attention = "flash_attention_2"
    gen.answer_batch(["who?", "where?"], [rows, rows], max_new_tokens=1)
    assert sizes == [(2, 2), (2, 2)]


key_lists = st.lists(
    st.tuples(st.text("abcdefgh", max_size=8).map(lambda t: "".join(sorted(set(t)))), st.integers(1, 40))
)


@given(key_lists, st.integers(60, 400))
def test_batches_contain_every_question_once_within_the_limits(questions, most):
    requests = [request(keys, tokens) for keys, tokens in questions]
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


def test_a_row_accepts_questions_up_to_its_token_limit():
    found = Batch()
    for _ in range(4):
        found = found.joined_by(request("abc", MAX_ROW_TOKENS // 2), share=True)
    assert [row.members for row in found.rows] == [(0, 1), (2, 3)]


def test_a_request_counts_its_own_tokens():
    assert request("abc").fused_tokens == 30 and replace(request("a"), fused=None).fused_tokens == 0
