"""``positions="global"``: documents are placed one after another, and still do not attend to each other."""

import random

import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st
from masks import block_masks

from kvfusion_rag import ContextLimitError, InvalidInputError, KVFusionGenerator
from kvfusion_rag.data.rows import Passage, QARow
from kvfusion_rag.fusion.torch_model import TorchModel
from kvfusion_rag.model.positions import global_starts
from kvfusion_rag.store import MemoryStore
from kvfusion_rag.text.settings import ModelSettings
from kvfusion_rag.training import train
from tests.fusion.test_fusion_laws import VOCABULARY, architectures, logits_of, random_documents
from tests.test_generator import DOCUMENTS


def test_global_positions_put_documents_one_after_another():
    assert global_starts(3, [5, 1, 2]) == [3, 8, 9, 11]
    assert global_starts(3, []) == [3]


@architectures
@examples(max_examples=6)
@given(seed=st.integers(0, 2**16), prefix=st.sampled_from(["", "the river "]))
def test_answers_equal_one_block_masked_pass_at_these_positions(architecture, seed, prefix):
    rng = random.Random(seed)
    gen = tiny.generator(architecture, prefix=prefix, positions="global", passage_length=100)
    documents, question = random_documents(rng, most=4), " ".join(rng.choices(VOCABULARY, k=4))
    steps, ids = logits_of(gen, question, documents)
    encoder = gen._engine.encoder
    pieces = list(dict.fromkeys(p for d in gen._engine.read(documents).documents for p in d.pieces))
    question_ids = [*encoder.encode_question(question), *ids[:-1]]
    row = [*encoder.prefix_ids, *(i for piece in pieces for i in piece), *question_ids]
    network, positions = tiny.model(architecture), torch.arange(len(row))
    masks = block_masks(
        network.config, len(encoder.prefix_ids), [len(p) for p in pieces], len(question_ids), positions
    )
    logits = network(input_ids=torch.tensor([row]), position_ids=positions[None], attention_mask=masks).logits
    expected = logits[0, -len(ids) :].detach()
    difference = (steps - expected).abs().max().item()
    assert difference < 1e-4 * expected.abs().max().item(), f"largest difference {difference}"


@pytest.mark.parametrize("architecture", ["gpt2", "bert", "llama"])
def test_documents_may_reach_the_end_of_the_window(architecture):
    """Padding must not pass the last position, where learned positions have no row."""
    gen = tiny.generator(architecture, positions="global")
    documents = [f"{number} {word} the mill" for number, word in enumerate(VOCABULARY * 3)]
    fitting = next(n for n in range(len(documents)) if gen._engine.read(documents[: n + 1]).tokens > 490)
    kept = documents[:fitting]
    answer = gen.answer("who?", kept, max_new_tokens=4)
    assert answer.usage.document_tokens > 470
    with pytest.raises(ContextLimitError, match="with positions='uniform' documents share positions"):
        gen.answer("who?", [*kept, *DOCUMENTS], max_new_tokens=4)
    assert gen.with_settings(positions="uniform").answer("who?", [*kept, *DOCUMENTS], max_new_tokens=4).text


@pytest.mark.parametrize("architecture", [name for name in tiny.ARCHITECTURES if name != "mistral"])
def test_order_matters_with_global_positions(architecture):
    """Except where windows are so narrow that no document is near the end of the question (mistral)."""
    gen = tiny.generator(architecture)
    moved = gen.with_settings(positions="global")
    assert not moved.check_invariance("who?", DOCUMENTS, permutations=3).identical
    assert gen.check_invariance("who?", DOCUMENTS, permutations=3).identical  # although they share a store
    assert moved.check_invariance(
        "who?", DOCUMENTS, permutations=3, mode="ape"
    ).identical  # the setting affects only mode fusion


def test_only_the_first_document_uses_the_store():
    store = MemoryStore()
    gen = tiny.generator("llama", store=store)
    moved = gen.with_settings(positions="global")
    assert gen.prefill(DOCUMENTS)
    first = moved.answer("who?", DOCUMENTS, max_new_tokens=6)
    assert [s.origin for s in first.sources] == ["memory", "computed", "computed"]  # the first keeps its position
    again = moved.answer("who?", DOCUMENTS, max_new_tokens=6)
    assert [s.origin for s in again.sources] == [
        s.origin for s in first.sources
    ] and again.token_ids == first.token_ids
    assert len(store) == len(DOCUMENTS) + 1  # the prefix is stored too
    alone = KVFusionGenerator(TorchModel(tiny.backbone("llama")), store=None).with_settings(positions="global")
    assert alone.answer("who?", DOCUMENTS, max_new_tokens=6).token_ids == first.token_ids


def test_repeated_documents_are_placed_once():
    gen = tiny.generator("llama", positions="global")
    once = gen.answer("who?", ["a mill", "a river", "rain"], max_new_tokens=5)
    many = gen.answer("who?", ["a mill", "a river", "a mill", " ", "rain", "a river"], max_new_tokens=5)
    assert many.token_ids == once.token_ids and many.usage.prompt_tokens == once.usage.prompt_tokens
    assert [s.duplicate_of for s in many.sources] == [None, None, "1", None, None, "2"]


def test_batch_equals_singles_with_and_without_documents():
    gen = tiny.generator("qwen2", positions="global")
    rng = random.Random(4)
    rows = [random_documents(rng, most=4) for _ in range(4)] + [[]]
    questions = [" ".join(rng.choices(VOCABULARY, k=3)) for _ in rows]
    batch = gen.answer_batch(questions, rows, max_new_tokens=5)
    singles = [gen.answer(q, row, max_new_tokens=5) for q, row in zip(questions, rows, strict=True)]
    assert [a.token_ids for a in batch] == [a.token_ids for a in singles]
    assert singles[-1].token_ids == gen.answer(questions[-1], [], mode="concat", max_new_tokens=5).token_ids


def test_unsupported_uses_raise_one_clear_error(tmp_path):
    with pytest.raises(InvalidInputError, match="positions is 'local', but it must be 'uniform' or 'global'"):
        ModelSettings(positions="local")  # type: ignore[arg-type]
    with pytest.raises(InvalidInputError, match="position depends on the question's other documents"):
        tiny.generator("llama", positions="global").prefill(DOCUMENTS)
    tiny.save(tmp_path, settings=ModelSettings(positions="global"))
    assert KVFusionGenerator.from_pretrained(tmp_path).settings.positions == "global"
    assert KVFusionGenerator.from_pretrained(tmp_path, positions="uniform").settings.positions == "uniform"
    with pytest.raises(InvalidInputError, match="but it must be 'uniform'"):
        train([QARow("1", "who?", ("x",), (Passage("x", gold=True),))], output=tmp_path / "run", model=tmp_path)
