"""The laws of fusion, one per test, each over several architectures."""

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from masks import block_masks
from tiny import ARCHITECTURES, WORDS, backbone, generator, tokenizer
from transformers import DynamicCache

from kvfusion_rag import Document, KVFusionGenerator
from kvfusion_rag.engine.requests import Batch
from kvfusion_rag.fusion.fused_cache import fuse
from kvfusion_rag.fusion.gate import run_gate
from kvfusion_rag.fusion.prefill import prefill, prefill_prefix
from kvfusion_rag.fusion.sampling import DecodingOptions
from kvfusion_rag.fusion.torch_model import TorchModel
from kvfusion_rag.model.positions import fused_positions, question_start
from kvfusion_rag.store import MemoryStore

architectures = pytest.mark.parametrize("architecture", ARCHITECTURES)
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
vocabulary = st.integers(10, 390)
document_ids = st.lists(vocabulary, min_size=1, max_size=70).map(tuple)
VOCABULARY = WORDS.split()


def random_documents(rng: random.Random, most: int = 7) -> list[Document]:
    """Return between 1 and ``most`` documents of 1 to 40 words, some of them repeated."""
    made = [
        Document(" ".join(rng.choices(VOCABULARY, k=rng.randint(1, 40))), title=rng.choice([None, "Mill", "Lamp"]))
        for _ in range(rng.randint(1, most))
    ]
    return made + rng.choices(made, k=rng.choice([0, 0, 1, 2]))


def prefilled(bone, documents, prefix, tokens_per_pass):
    """Return document KVs in the order of ``documents``."""
    done = dict(prefill(bone, documents, prefix, tokens_per_pass=tokens_per_pass))
    return [done[index] for index in range(len(documents))]


def fused_logits(bone, prefix, kvs, question, passage_length):
    """Return the logits of ``question`` over the fused ``kvs``."""
    context = fuse([list(kvs)], bone.device, [prefix])
    start = question_start(prefix.num_tokens if prefix else 0, passage_length, max(kv.num_tokens for kv in kvs))
    positions = torch.arange(start, start + len(question))[None]
    mask = torch.cat([context.mask, torch.ones(1, len(question), dtype=torch.long)], dim=1)
    last = torch.tensor([len(question) - 1])
    return bone.forward(torch.tensor([question]), positions, mask, context.cache, last, adapter=False)


@architectures
@settings(max_examples=12)
@given(
    documents=st.lists(document_ids, min_size=1, max_size=5),
    question=st.lists(vocabulary, min_size=1, max_size=12),
    prefix_ids=st.lists(vocabulary, max_size=6).map(tuple),
    passage_length=st.none() | st.integers(1, 90),
)
def test_fused_logits_are_one_block_masked_pass(architecture, documents, question, prefix_ids, passage_length):
    bone = backbone(architecture)
    prefix = prefill_prefix(bone, prefix_ids)
    kvs = prefilled(bone, documents, prefix, tokens_per_pass=128)
    lengths = [len(ids) for ids in documents]
    start = question_start(len(prefix_ids), passage_length, max(lengths))
    ids = [*prefix_ids, *(i for document in documents for i in document), *question]
    positions = fused_positions(len(prefix_ids), lengths, start, len(question))
    single = bone.model(
        input_ids=torch.tensor([ids]),
        position_ids=positions[None],
        attention_mask=block_masks(bone.config, len(prefix_ids), lengths, len(question), positions),
    ).logits[:, -1]
    difference = (fused_logits(bone, prefix, kvs, question, passage_length) - single).abs().max().item()
    assert difference < 1e-4 * single.abs().max().item(), f"largest difference {difference}"


@architectures
@dtypes
@settings(max_examples=8)
@given(documents=st.lists(document_ids, min_size=2, max_size=9, unique=True), data=st.data())
def test_a_document_kv_does_not_depend_on_its_batch(architecture, dtype, documents, data):
    """A stored KV equals a computed one, whichever documents the store has and whichever questions filled it."""
    bone = backbone(architecture, dtype)
    together = prefilled(bone, documents, None, tokens_per_pass=128)
    order = data.draw(st.permutations(range(len(documents))))
    some = order[: data.draw(st.integers(1, len(documents)))]
    for index, kv in zip(some, prefilled(bone, [documents[i] for i in some], None, tokens_per_pass=128), strict=True):
        assert torch.equal(kv.keys, together[index].keys)
        assert torch.equal(kv.values, together[index].values)


@architectures
def test_prefill_in_buckets_equals_prefill_of_the_exact_length(architecture):
    bone = backbone(architecture)
    document = tuple(range(20, 67))
    (kv,) = prefilled(bone, [document], None, tokens_per_pass=512)
    keys, values = bone.prefill(torch.tensor([document]), None)
    torch.testing.assert_close(kv.keys, keys[:, 0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(kv.values, values[:, 0], rtol=1e-4, atol=1e-5)


def logits_of(gen, question, documents, max_new_tokens=5):
    """Return the logits of every step and the tokens of one greedy answer."""
    kept: list[torch.Tensor] = []
    options = DecodingOptions(max_new_tokens)
    request = gen._engine.request(question, documents, None, None, options)
    run = gen._engine.runner.start(Batch.of(request))
    for _ in gen._engine.runner.decode(run, options, on_logits=kept.append):
        pass
    return torch.cat(kept), run.answers[0].ids


@pytest.mark.parametrize(
    ("architecture", "dtype"), [("llama", torch.float32), ("qwen3", torch.bfloat16), ("bert", torch.float32)]
)
def test_any_order_gives_the_same_bits_with_any_store(architecture, dtype):
    """Counts, lengths and duplicates are random. The store has none, some or all of the documents."""
    bone = backbone(architecture, dtype)
    storing, storeless = (KVFusionGenerator(TorchModel(bone), store=store) for store in (MemoryStore(), None))
    rng = random.Random(7)
    for case in range(70):
        documents = random_documents(rng)
        storing.clear()
        expected, tokens = logits_of(storing, "who built it?", documents)
        shuffled = rng.sample(documents, len(documents))
        storing.clear()
        if case % 3 == 1:
            storing.prefill(rng.sample(documents, rng.randint(1, len(documents))))
        found, found_tokens = logits_of(storing if case % 3 else storeless, "who built it?", shuffled)
        assert found_tokens == tokens
        assert torch.equal(found, expected), f"case {case}: differs by {(found - expected).abs().max()}"


@architectures
def test_one_document_greedy_equals_plain_generate_on_the_joined_prompt(architecture):
    gen = generator(architecture)
    rng = random.Random(3)
    for _ in range(6):
        document, question = random_documents(rng, most=1)[0], " ".join(rng.choices(VOCABULARY, k=6))
        answer = gen.answer(question, [document], max_new_tokens=8)
        ids = [
            *gen._engine.encoder.prefix_ids,
            *gen._engine.encoder.encode_document(document),
            *gen._engine.encoder.encode_question(question),
        ]
        tok = tokenizer("byte-bpe")
        plain = gen._engine.model.backbone.model.generate(
            torch.tensor([ids]),
            attention_mask=torch.ones(1, len(ids), dtype=torch.long),
            max_new_tokens=8,
            do_sample=False,
            eos_token_id=sorted(gen._engine.model.backbone.end_ids),
            pad_token_id=tok.pad_token_id,
        )
        assert list(answer.token_ids) == plain[0, len(ids) :].tolist()


@architectures
def test_batch_equals_singles(architecture):
    gen = generator(architecture)
    rng = random.Random(5)
    questions = [" ".join(rng.choices(VOCABULARY, k=rng.randint(1, 12))) for _ in range(6)]
    documents = [random_documents(rng) for _ in range(5)] + [[]]  # the last row has no document
    batch = gen.answer_batch(questions, documents, max_new_tokens=6)
    for answer, question, row in zip(batch, questions, documents, strict=True):
        single = gen.answer(question, row, max_new_tokens=6)
        assert (answer.text, answer.token_ids, answer.usage.prompt_tokens) == (
            single.text,
            single.token_ids,
            single.usage.prompt_tokens,
        )
        assert [s.id for s in answer.sources] == [s.id for s in single.sources]


@architectures
def test_padding_does_not_change_logits(architecture):
    bone = backbone(architecture)
    kvs = prefilled(bone, [tuple(range(20, 60)), tuple(range(30, 41))], None, tokens_per_pass=128)
    question = [15, 16, 17]
    alone = fused_logits(bone, None, kvs[1:], question, None)
    context = fuse([kvs, kvs[1:]], bone.device)
    positions = torch.stack([torch.arange(40, 43), torch.arange(11, 14)])
    mask = torch.cat([context.mask, torch.ones(2, 3, dtype=torch.long)], dim=1)
    both = bone.forward(
        torch.tensor([question, question]), positions, mask, context.cache, torch.tensor([2, 2]), adapter=False
    )
    torch.testing.assert_close(both[1], alone[0], rtol=1e-4, atol=1e-4 * alone.abs().max().item())


def test_documents_do_not_attend_to_each_other():
    """Changing one document does not change a bit of the other's KV."""
    bone = backbone("llama")
    first, second, changed = tuple(range(20, 50)), tuple(range(60, 90)), tuple(range(100, 130))
    before = prefilled(bone, [first, second], None, tokens_per_pass=512)[0]
    after = prefilled(bone, [first, changed], None, tokens_per_pass=512)[0]
    assert torch.equal(before.keys, after.keys)


def test_fusing_and_decoding_leave_document_kvs_unchanged():
    bone = backbone("llama")
    kvs = prefilled(bone, [tuple(range(20, 50)), tuple(range(60, 75))], None, tokens_per_pass=128)
    copies = [(kv.keys.clone(), kv.values.clone()) for kv in kvs]
    fused_logits(bone, None, kvs, [3, 4, 5], None)
    for kv, (keys, values) in zip(kvs, copies, strict=True):
        assert torch.equal(kv.keys, keys) and torch.equal(kv.values, values)


def test_rows_without_documents_fuse_to_an_empty_cache():
    context = fuse([[], []], torch.device("cpu"))
    assert context.mask.shape == (2, 0)
    assert isinstance(context.cache, DynamicCache) and context.cache.get_seq_length() == 0


@architectures
@dtypes
def test_the_gate_accepts_exact_models(architecture, dtype):
    report = run_gate(backbone(architecture, dtype), None, range(10, 390), tokens_per_pass=128)
    assert report.passed and len(report.checks) == 10
