"""A generator with a store: all tiers give the same answers, and everything that changes the bits changes the key."""

import errno
import os
import random

import pytest
import torch
from safetensors import safe_open
from store_generators import DOCUMENTS, ask, origins, over, over_disk
from stores import failing
from tiny import WORDS, backbone, generator

from kvfusion_rag import DiskStore, Document, DocumentStore, InvalidInputError, MemoryStore
from kvfusion_rag.fusion.prefill import kv_shape
from kvfusion_rag.model.backbone import Backbone
from kvfusion_rag.model.document_cache import expected_kv_shape
from kvfusion_rag.store import namespace_key

VOCABULARY = WORDS.split()


def text(rng: random.Random, longest: int = 20) -> str:
    return " ".join(rng.choices(VOCABULARY, k=rng.randint(1, longest)))


def change_weights(model: Backbone) -> None:
    with torch.no_grad():
        model.model.get_input_embeddings().weight.mul_(1.5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("architecture", ["llama", "bert"])
def test_every_tier_gives_the_same_tokens(tmp_path, architecture, dtype):
    """Random documents and questions, each answered without a store, from memory and from disk."""
    rng, model = random.Random(f"{architecture}{dtype}"), backbone(architecture, dtype)
    nothing = over(DocumentStore(), model=model)
    memory = over(DocumentStore(MemoryStore()), model=model)
    disk = over_disk(tmp_path, model=model)
    pool = [text(rng) for _ in range(20)]
    for _ in range(12):
        documents, question = rng.sample(pool, rng.randint(1, 6)), text(rng, 8)
        expected = nothing.answer(question, documents, max_new_tokens=4)
        assert origins(expected) == {"computed"}
        for gen, tier in ((memory, "memory"), (disk, "disk")):
            gen.prefill(documents)
            rng.shuffle(documents)
            answer = gen.answer(question, documents, max_new_tokens=4)
            assert origins(answer) == {tier} and answer.token_ids == expected.token_ids
            assert answer.usage.cached_document_tokens == answer.usage.document_tokens


def test_rows_of_a_batch_share_documents_from_disk(tmp_path):
    gen = over_disk(tmp_path)
    rows = [DOCUMENTS, DOCUMENTS[:2], DOCUMENTS[1:], []]
    expected = [gen.answer("who?", row, max_new_tokens=5).token_ids for row in rows]
    answers = gen.answer_batch(["who?"] * 4, rows, max_new_tokens=5)
    assert [answer.token_ids for answer in answers] == expected
    assert all(origins(answer) == {"disk"} for answer in answers[:3])
    assert gen.store.metrics.hits["disk"] == 2 + 2 + 3  # and once for each document of the batch


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gpt2", "bert", "gemma3", "minicpm3"])
def test_kv_shape_follows_from_the_configuration(architecture):
    model = backbone(architecture)
    assert expected_kv_shape(model.config, model.dtype) == kv_shape(model)


def test_folder_is_accepted_as_a_store(tmp_path):
    first = over(tmp_path / "s")
    first.prefill(DOCUMENTS)
    first.store.close()
    second = over(str(tmp_path / "s"))
    assert [origins(ask(second)) for _ in range(2)] == [{"disk"}, {"memory"}]


# Everything that changes the bits changes the key


def test_other_weights_dtypes_settings_and_tenants_find_nothing(tmp_path):
    gen = over(tmp_path / "s")
    gen.prefill(DOCUMENTS)
    others = [
        over(tmp_path / "s", model=backbone("llama", torch.bfloat16)),
        over(tmp_path / "s", model=backbone("llama", seed=1)),
        over(tmp_path / "s", model=backbone("llama", rope_parameters={"rope_type": "default", "rope_theta": 500.0})),
        generator("llama", store=tmp_path / "s", prefix="other", document_template="{text}\n\n"),
        over(tmp_path / "s").with_namespace("tenant"),
    ]
    for other in others:
        assert origins(ask(other)) == {"computed"}, other
        assert set(other.store.metrics.misses) == {"absent"}
    assert origins(ask(gen)) == {"memory"}


def test_weights_changed_in_place_are_noticed(tmp_path):
    model = backbone("llama", seed=3)
    gen = over(tmp_path / "s", model=model, settings=None)
    before, identity = ask(gen, 6), gen.identity()
    change_weights(model)
    after = ask(gen, 6)
    fresh = ask(over(DocumentStore(), model=model), 6)
    assert origins(after) == {"computed"} and after.token_ids == fresh.token_ids != before.token_ids
    assert gen.identity() != identity


def test_stream_read_after_a_change_of_weights_stores_nothing_under_their_former_keys():
    model = backbone("llama")
    gen, weight = over(DocumentStore(MemoryStore()), model=model), model.model.get_input_embeddings().weight
    expected = ask(gen, 5)
    gen.store.clear()
    stream, former = gen.stream("who?", DOCUMENTS, max_new_tokens=5), weight.detach().clone()
    change_weights(model)
    list(stream)
    with torch.no_grad():
        weight.copy_(former)
    answer = ask(gen, 5)
    assert origins(answer) == {"computed"} and answer.token_ids == expected.token_ids


def test_weights_changed_during_a_request_are_an_error_and_nothing_is_stored(monkeypatch):
    model = backbone("llama")
    gen, prefill = over(DocumentStore(MemoryStore()), model=model), model.prefill
    monkeypatch.setattr(model, "prefill", lambda *given: (change_weights(model), prefill(*given))[1])
    with pytest.raises(InvalidInputError, match="changed while it was answering"):
        gen.answer("who?", DOCUMENTS)
    assert not len(gen.store.memory)


def test_bump_epoch_declares_weights_changed_unseen_by_torch(tmp_path):
    model = backbone("llama", seed=4)
    gen = over(tmp_path / "s", model=model)
    ask(gen, 6)
    model.model.get_input_embeddings().weight.data.mul_(1.5)  # torch does not count this change
    assert origins(ask(gen, 6)) == {"memory"}
    gen.bump_epoch()
    after = ask(gen, 6)
    assert origins(after) == {"computed"}
    assert after.token_ids == ask(over(DocumentStore(), model=model), 6).token_ids
    gen.bump_epoch()  # nothing has changed, so stored documents are still used
    assert origins(ask(gen, 6)) == {"memory"}


# Faults, tenants and removal


@pytest.mark.parametrize("call", ["writev", "preadv", "open"])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EACCES])
def test_failing_disk_changes_no_answer(tmp_path, monkeypatch, caplog, call, code):
    gen = over_disk(tmp_path)
    gen.prefill(DOCUMENTS[:1])
    expected = ask(over(DocumentStore()), 5).token_ids
    real, fail = os.open, failing(OSError(code, os.strerror(code)))

    def failing_call(*arguments, **_):
        return real(*arguments) if call == "open" and "/s/" not in str(arguments[0]) else fail()

    monkeypatch.setattr(os, call, failing_call)
    for _ in range(3):
        assert ask(gen, 5).token_ids == expected
    warnings = [record for record in caplog.records if record.name.startswith("kvfusion_rag.store")]
    assert 1 <= len(warnings) <= 2  # one for reading, one for writing


def test_tenants_share_no_document_and_one_can_be_cleared(tmp_path):
    store = DocumentStore(MemoryStore(), DiskStore(tmp_path / "s"))
    one, other = (over(store).with_namespace(name) for name in ("one", "other"))
    one.prefill(DOCUMENTS)
    assert origins(ask(other)) == {"computed"}
    assert one.clear() == 2 * (len(DOCUMENTS) + 1)  # including the prefix
    assert set(store.disk.totals()) == {namespace_key("other")}
    assert origins(ask(one)) == {"computed"} and origins(ask(other)) == {"memory"}


def test_forget_removes_documents_of_every_model_with_the_same_tokenizer(tmp_path):
    store = DocumentStore(MemoryStore(), DiskStore(tmp_path / "s"))
    generators = [over(store), over(store, model=backbone("llama", torch.bfloat16))]
    for gen in generators:
        gen.prefill(DOCUMENTS)
    assert generators[0].forget(DOCUMENTS[:1]) == 4
    for gen in generators:
        assert [source.origin for source in ask(gen).sources] == ["computed", "memory", "memory"]


def test_joined_documents_are_not_stored():
    """A joined prompt contains several documents, so neither another question nor forget would find it."""
    gen = over(DocumentStore(MemoryStore()))
    answers = [gen.answer("who?", DOCUMENTS, mode="concat", max_new_tokens=3) for _ in range(2)]
    assert answers[0].token_ids == answers[1].token_ids and not len(gen.store.memory)


def test_documents_at_positions_after_others_are_not_stored():
    gen = over(DocumentStore(MemoryStore())).with_settings(positions="global")
    assert ask(gen, 3).token_ids == ask(gen, 3).token_ids
    assert len(gen.store.memory) == 2  # the prefix, and the document right after it


def test_corpus_is_prefilled_in_slices_so_that_questions_do_not_wait_for_all_of_it(monkeypatch):
    monkeypatch.setattr("kvfusion_rag.engine.document_kvs.kvs.PASSES_AT_ONCE", 0.1)  # 12 tokens
    gen = over(DocumentStore(MemoryStore()))
    claimed: list[int] = []
    prefill, single_flight = gen._engine.model.backbone.prefill, gen.store._single_flight
    monkeypatch.setattr(
        gen._engine.model.backbone,
        "prefill",
        lambda *given: claimed.append(len(single_flight._pending)) or prefill(*given),
    )
    corpus = [f"the mill {word}" for word in VOCABULARY[:7]]
    assert {source.origin for source in gen.prefill(corpus)} == {"computed"}
    assert max(claimed) <= 4 + 1  # the prefix is computed with the first slice
    claimed.clear()
    assert {source.origin for source in gen.prefill(corpus)} == {"memory"} and not claimed


def test_prefill_does_not_read_stored_documents(tmp_path):
    gen = over_disk(tmp_path)
    gen.prefill(DOCUMENTS)
    assert {source.origin for source in gen.prefill(DOCUMENTS)} == {"disk"}
    assert not gen.store.metrics.hits


def test_sources_report_the_reason_for_a_miss(tmp_path):
    gen = over_disk(tmp_path)
    assert {source.miss for source in ask(gen).sources} == {"absent"}
    assert {source.miss for source in ask(gen).sources} == {None}
    file = next(gen.store.disk.path.glob("v*/*/*/*.safetensors"))
    file.write_bytes(file.read_bytes()[:-1])
    assert sorted(str(source.miss) for source in ask(gen).sources) == ["None", "None", "truncated"]
    joined = over(DocumentStore()).answer("who?", DOCUMENTS, max_new_tokens=1, mode="concat")
    assert {source.miss for source in joined.sources} == {None}


def test_prefetch_loads_stored_documents(tmp_path):
    over(tmp_path / "s").prefill(DOCUMENTS)
    gen = over(tmp_path / "s")
    assert gen.prefetch([*DOCUMENTS, "a document that is not stored"]).result(30) == 3
    assert origins(ask(gen)) == {"memory"}


@pytest.mark.parametrize("tier", ["memory", "disk"])
def test_cap_smaller_than_one_document_is_rejected(tmp_path, tier):
    store = DocumentStore(MemoryStore(99)) if tier == "memory" else DocumentStore(None, DiskStore(tmp_path / "s", 99))
    with pytest.raises(InvalidInputError, match=rf"max_bytes of the {tier} store is 99, but one document"):
        over(store)


def test_v8_answers_do_not_depend_on_what_is_stored(tmp_path):
    store = DocumentStore(MemoryStore(), DiskStore(tmp_path / "s", codec="v8"))
    gen = over(store).with_settings(max_new_tokens=24)
    answers = []
    for tier in ("computed", "memory", "disk"):
        answer = ask(gen, 8)
        assert origins(answer) == {tier}
        answers.append(answer.token_ids)
        if tier == "memory":
            store.memory.clear()
    assert answers[0] == answers[1] == answers[2]
    assert gen.check_invariance("who?", DOCUMENTS, permutations=2).identical


def test_control_tokens_in_documents_reach_no_key_and_no_store(tmp_path):
    gen = over_disk(tmp_path)
    control = gen._engine.encoder.plain.control_ids
    texts = [token.content for token in gen._engine.model.backbone.tokenizer.added_tokens_decoder.values()]
    gen.prefill([Document(f"a {text} b", title=text) for text in texts])
    ids = []
    for file in (tmp_path / "s").glob("v*/*/*/*.safetensors"):
        with safe_open(file, "pt") as tensors:
            ids.append(tensors.get_tensor("token_ids").tolist())
    ids.remove(list(gen._engine.encoder.prefix_ids))  # which contains the template's own control tokens
    assert len(ids) == len(texts) and all(map(control.isdisjoint, ids))
