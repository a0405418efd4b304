"""A generator over a store on disk: every tier gives the same answers, and what changes the bits changes the key."""

import asyncio
import errno
import os
import random
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from tiny import WORDS, backbone, generator

from kvfusion_rag import (
    DiskStore,
    Document,
    DocumentStore,
    InvalidInputError,
    KVFusionGenerator,
    MemoryLimitError,
    MemoryStore,
)
from kvfusion_rag.fusion.prefill import kv_shape
from kvfusion_rag.model.support import expected_kv_shape
from kvfusion_rag.store import namespace_key

ROOT = Path(__file__).parent.parent.parent
VOCABULARY = WORDS.split()
ARCHITECTURES = ("llama", "qwen3", "gpt2", "bert", "gemma")
DOCUMENTS = [Document("the mill was built in 1874", title="mill"), "the river runs past", "two grey doves sleep"]


def text(rng: random.Random, longest: int = 20) -> str:
    return " ".join(rng.choices(VOCABULARY, k=rng.randint(1, longest)))


def over(store: DocumentStore, *, bone=None, **options) -> KVFusionGenerator:
    return KVFusionGenerator(bone or backbone("llama"), store=store, **options)


def origins(answer) -> set[str]:
    return {source.origin for source in answer.sources}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("architecture", ["llama", "bert"])
def test_c2_computed_memory_and_disk_answer_token_for_token_the_same(tmp_path, architecture, dtype):
    """200 random cases over the four parameters, each answered from all tiers."""
    rng, bone = random.Random(f"{architecture}{dtype}"), backbone(architecture, dtype)
    nothing = over(DocumentStore(), bone=bone)
    memory = over(DocumentStore(MemoryStore()), bone=bone)
    disk = over(DocumentStore(None, DiskStore(tmp_path / "s"), load="always"), bone=bone)
    pool = [text(rng) for _ in range(60)]
    for _ in range(50):
        documents, question = rng.sample(pool, rng.randint(1, 6)), text(rng, 8)
        expected = nothing.answer(question, documents, max_new_tokens=6)
        assert origins(expected) == {"computed"}
        for gen, tier in ((memory, "memory"), (disk, "disk")):
            gen.prefill(documents)
            rng.shuffle(documents)
            found = gen.answer(question, documents, max_new_tokens=6)
            assert origins(found) == {tier} and found.token_ids == expected.token_ids
            assert found.usage.cached_document_tokens == found.usage.document_tokens


def test_batches_share_documents_of_several_rows_from_disk(tmp_path):
    gen = over(DocumentStore(None, DiskStore(tmp_path / "s"), load="always"))
    rows = [DOCUMENTS, DOCUMENTS[:2], DOCUMENTS[1:], []]
    expected = [gen.answer("who?", row, max_new_tokens=5).token_ids for row in rows]
    found = gen.answer_batch(["who?"] * 4, rows, max_new_tokens=5)
    assert [answer.token_ids for answer in found] == expected
    assert all(origins(answer) == {"disk"} for answer in found[:3])
    assert gen.store.metrics.hits["disk"] == 2 + 2 + 3  # and once for each document of the batch


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_shape_of_kvs_follows_from_the_configuration(architecture):
    bone = backbone(architecture)
    assert expected_kv_shape(bone.config, bone.dtype) == kv_shape(bone)


def test_a_folder_is_a_store(tmp_path):
    first = over(tmp_path / "s")
    first.prefill(DOCUMENTS)
    first.store.close()
    second = over(str(tmp_path / "s"))
    assert origins(second.answer("who?", DOCUMENTS, max_new_tokens=2)) == {"disk"}
    assert origins(second.answer("who?", DOCUMENTS, max_new_tokens=2)) == {"memory"}


# F4: whatever changes the bits


def test_f4_other_weights_dtype_settings_and_tenants_find_nothing(tmp_path):
    gen = over(tmp_path / "s")
    gen.prefill(DOCUMENTS)
    others = [
        over(tmp_path / "s", bone=backbone("llama", torch.bfloat16)),
        over(tmp_path / "s", bone=backbone("llama", seed=1)),
        over(tmp_path / "s", bone=backbone("llama", rope_parameters={"rope_type": "default", "rope_theta": 500.0})),
        generator("llama", store=tmp_path / "s", prefix="other", document_template="{text}\n\n"),
        over(tmp_path / "s", namespace="tenant"),
    ]
    for other in others:
        answer = other.answer("who?", DOCUMENTS, max_new_tokens=2)
        assert origins(answer) == {"computed"}, other
        assert set(other.store.metrics.misses) == {"absent"}
    assert origins(gen.answer("who?", DOCUMENTS, max_new_tokens=2)) == {"memory"}


def test_f4_weights_changed_in_place_are_noticed(tmp_path):
    bone = backbone("llama", seed=3)
    gen = over(tmp_path / "s", bone=bone, settings=None)
    before = gen.answer("who?", DOCUMENTS, max_new_tokens=6)
    identity = gen.identity()
    with torch.no_grad():
        bone.model.get_input_embeddings().weight.mul_(1.5)
    after = gen.answer("who?", DOCUMENTS, max_new_tokens=6)
    fresh = over(DocumentStore(), bone=bone).answer("who?", DOCUMENTS, max_new_tokens=6)
    assert origins(after) == {"computed"} and after.token_ids == fresh.token_ids != before.token_ids
    assert gen.identity() != identity


def test_f4_a_stream_that_is_read_late_stores_nothing_under_the_keys_of_former_weights():
    bone = backbone("llama")
    gen, weight = over(DocumentStore(MemoryStore()), bone=bone), bone.model.get_input_embeddings().weight
    expected = gen.answer("who?", DOCUMENTS, max_new_tokens=5)
    gen.store.clear()
    stream, kept = gen.stream("who?", DOCUMENTS, max_new_tokens=5), weight.detach().clone()
    with torch.no_grad():
        weight.mul_(1.5)
        list(stream)
        weight.copy_(kept)
    found = gen.answer("who?", DOCUMENTS, max_new_tokens=5)
    assert origins(found) == {"computed"} and found.token_ids == expected.token_ids


def test_f4_weights_changed_under_a_request_are_one_clear_error_and_nothing_is_stored(monkeypatch):
    bone = backbone("llama")
    gen = over(DocumentStore(MemoryStore()), bone=bone)
    compute = bone.prefill

    def change(*given):
        with torch.no_grad():
            bone.model.get_input_embeddings().weight.mul_(1.5)
        return compute(*given)

    monkeypatch.setattr(bone, "prefill", change)
    with pytest.raises(InvalidInputError, match=r"weights .* were changed while it was answering"):
        gen.answer("who?", DOCUMENTS)
    assert not len(gen.store.memory)


def test_f4_weights_changed_behind_torchs_back_are_declared(tmp_path):
    bone = backbone("llama", seed=4)
    gen = over(tmp_path / "s", bone=bone)
    gen.answer("who?", DOCUMENTS, max_new_tokens=6)
    bone.model.get_input_embeddings().weight.data.mul_(1.5)  # which torch does not count
    assert origins(gen.answer("who?", DOCUMENTS, max_new_tokens=6)) == {"memory"}
    gen.bump_epoch()
    after = gen.answer("who?", DOCUMENTS, max_new_tokens=6)
    fresh = over(DocumentStore(), bone=bone).answer("who?", DOCUMENTS, max_new_tokens=6)
    assert origins(after) == {"computed"} and after.token_ids == fresh.token_ids
    gen.bump_epoch()  # nothing was changed, so nothing is lost
    assert origins(gen.answer("who?", DOCUMENTS, max_new_tokens=6)) == {"memory"}


# Faults, tenants, operations


@pytest.mark.parametrize("call", ["writev", "preadv", "open"])
@pytest.mark.parametrize("code", ["ENOSPC", "EIO", "EACCES"])
def test_f3_a_disk_that_fails_changes_no_answer(tmp_path, monkeypatch, caplog, call, code):
    gen = over(DocumentStore(None, DiskStore(tmp_path / "s"), load="always"))
    gen.prefill(DOCUMENTS[:1])
    expected = over(DocumentStore()).answer("who?", DOCUMENTS, max_new_tokens=5).token_ids
    real = os.open

    def failing(*arguments, **_):
        if call == "open" and "/s/" not in str(arguments[0]):
            return real(*arguments)
        raise OSError(getattr(errno, code), os.strerror(getattr(errno, code)))

    monkeypatch.setattr(os, call, failing)
    for _ in range(3):
        assert gen.answer("who?", DOCUMENTS, max_new_tokens=5).token_ids == expected
    said = [record for record in caplog.records if record.name.startswith("kvfusion_rag.store")]
    assert 1 <= len(said) <= 2  # one for reading, one for writing


def test_t1_tenants_share_no_document_and_one_can_be_cleared(tmp_path):
    store = DocumentStore(MemoryStore(), DiskStore(tmp_path / "s"), load="always")
    one, other = over(store, namespace="one"), over(store, namespace="other")
    one.prefill(DOCUMENTS)
    assert origins(other.answer("who?", DOCUMENTS, max_new_tokens=2)) == {"computed"}
    assert one.clear() == 2 * (len(DOCUMENTS) + 1)  # the prefix too
    assert set(store.disk.totals()) == {namespace_key("other")}
    assert origins(one.answer("who?", DOCUMENTS, max_new_tokens=2)) == {"computed"}
    assert origins(other.answer("who?", DOCUMENTS, max_new_tokens=2)) == {"memory"}


@pytest.mark.parametrize("name", ["../other", "a/b", "..", 3])
def test_t4_a_namespace_with_path_characters_is_one_clear_error(name):
    with pytest.raises(InvalidInputError, match="namespace is"):
        generator("llama").with_settings()._backbone and over(None, namespace=name)


def test_forgetting_a_document_takes_it_from_every_model_of_the_tokenizer(tmp_path):
    store = DocumentStore(MemoryStore(), DiskStore(tmp_path / "s"), load="always")
    one, other = over(store), over(store, bone=backbone("llama", torch.bfloat16))
    for gen in (one, other):
        gen.prefill(DOCUMENTS)
    assert one.forget(DOCUMENTS[:1]) == 4
    for gen in (one, other):
        answer = gen.answer("who?", DOCUMENTS, max_new_tokens=2)
        assert [s.origin for s in answer.sources] == ["computed", "memory", "memory"]


def test_joined_documents_are_not_stored():
    """A joined prompt holds several documents, so that neither another question nor forgetting would find it."""
    gen = over(DocumentStore(MemoryStore()))
    answers = [gen.answer("who?", DOCUMENTS, mode="concat", max_new_tokens=3) for _ in range(2)]
    assert answers[0].token_ids == answers[1].token_ids and not len(gen.store.memory)


def test_documents_that_stand_behind_others_are_not_stored():
    gen = over(DocumentStore(MemoryStore())).with_settings(positions="global")
    first = gen.answer("who?", DOCUMENTS, max_new_tokens=3)
    assert gen.answer("who?", DOCUMENTS, max_new_tokens=3).token_ids == first.token_ids
    assert len(gen.store.memory) == 2  # the prefix, and the document right after it


def test_a_corpus_is_prefilled_in_slices_so_that_questions_need_not_wait_for_all_of_it(monkeypatch):
    monkeypatch.setattr("kvfusion_rag.engine.document_kvs.STORED_AT_ONCE", 2)
    gen = over(DocumentStore(MemoryStore()))
    claimed: list[int] = []
    prefill, flights = gen._backbone.prefill, gen.store._flights
    monkeypatch.setattr(
        gen._backbone, "prefill", lambda *given: claimed.append(len(flights._under_way)) or prefill(*given)
    )
    corpus = [f"the mill {word}" for word in VOCABULARY[:7]]
    assert {source.origin for source in gen.prefill(corpus)} == {"computed"}
    assert max(claimed) <= 2 + 1  # the prefix is read with the first slice
    claimed.clear()
    assert {source.origin for source in gen.prefill(corpus)} == {"memory"} and not claimed


def test_what_is_stored_already_is_not_read_again_to_be_stored(tmp_path):
    gen = over(DocumentStore(None, DiskStore(tmp_path / "s"), load="always"))
    gen.prefill(DOCUMENTS)
    assert {source.origin for source in gen.prefill(DOCUMENTS)} == {"disk"}
    assert not gen.store.metrics.hits


def test_sources_say_why_the_store_had_a_document_not(tmp_path):
    gen = over(DocumentStore(None, DiskStore(tmp_path / "s"), load="always"))
    assert {source.miss for source in gen.answer("who?", DOCUMENTS, max_new_tokens=1).sources} == {"absent"}
    assert {source.miss for source in gen.answer("who?", DOCUMENTS, max_new_tokens=1).sources} == {None}
    file = next(gen.store.disk.path.glob("v*/*/*/*.safetensors"))
    file.write_bytes(file.read_bytes()[:-1])
    found = [source.miss for source in gen.answer("who?", DOCUMENTS, max_new_tokens=1).sources]
    assert sorted(map(str, found)) == ["None", "None", "truncated"]
    nothing = over(DocumentStore()).answer("who?", DOCUMENTS, max_new_tokens=1, mode="concat")
    assert {source.miss for source in nothing.sources} == {None}


def test_prefetch_loads_while_a_reranker_runs(tmp_path):
    over(tmp_path / "s").prefill(DOCUMENTS)
    gen = over(tmp_path / "s")
    assert gen.prefetch([*DOCUMENTS, "a document that is not stored"]).result(30) == 3
    assert origins(gen.answer("who?", DOCUMENTS, max_new_tokens=2)) == {"memory"}


@pytest.mark.parametrize("tier", ["memory", "disk"])
def test_a_cap_smaller_than_one_document_is_one_clear_error(tmp_path, tier):
    store = DocumentStore(MemoryStore(99)) if tier == "memory" else DocumentStore(None, DiskStore(tmp_path / "s", 99))
    with pytest.raises(InvalidInputError, match=rf"max_bytes of the {tier} store is 99, but one document"):
        over(store)


def test_with_v8_the_answer_does_not_depend_on_what_is_stored(tmp_path):
    store = DocumentStore(MemoryStore(), DiskStore(tmp_path / "s", codec="v8"), load="always")
    gen = over(store)
    found = []
    for tier in ("computed", "memory", "disk"):
        answer = gen.answer("who built it?", DOCUMENTS, max_new_tokens=8)
        assert origins(answer) == {tier}
        found.append(answer.token_ids)
        if tier == "memory":
            store.memory.clear()
    assert found[0] == found[1] == found[2]
    assert gen.check_invariance("who?", DOCUMENTS, permutations=4).identical


# F7, F8, F10, L1: memory that runs out, broken streams, killed processes, many callers


def running_out(gen, monkeypatch, times: int, largest: int = 0):
    """The next ``times`` passes of the model, or all with more rows than ``largest``, find no memory."""
    left = [times]
    for name in ("prefill", "forward"):
        real = getattr(gen._backbone, name)

        def passing(ids, *arguments, _real=real, **options):
            if left[0] > 0 and (not largest or ids.shape[0] > largest):
                left[0] -= 1
                raise torch.OutOfMemoryError("CUDA out of memory")
            return _real(ids, *arguments, **options)

        monkeypatch.setattr(gen._backbone, name, passing)


def test_f7_a_prefill_without_memory_is_tried_again_without_the_stores(monkeypatch, caplog):
    gen = over(DocumentStore(MemoryStore()))
    gen.prefill(["some other document"])
    expected = over(DocumentStore()).answer("who?", DOCUMENTS, max_new_tokens=4).token_ids
    running_out(gen, monkeypatch, times=1)
    assert gen.answer("who?", DOCUMENTS, max_new_tokens=4).token_ids == expected
    assert "given back" in caplog.text and len(gen.store.memory) == len(DOCUMENTS)


def test_f7_a_batch_without_memory_is_answered_in_halves(monkeypatch):
    gen = over(DocumentStore(MemoryStore()))
    rows = [DOCUMENTS[: 1 + n % 3] for n in range(5)]
    expected = [gen.answer("who?", row, max_new_tokens=4).token_ids for row in rows]
    running_out(gen, monkeypatch, times=10**6, largest=1)
    gen._engine.document_kvs.tokens_per_pass = 1  # one document a pass, so that prefill is within it
    found = gen.answer_batch(["who?"] * 5, rows, max_new_tokens=4)
    assert [answer.token_ids for answer in found] == expected


@pytest.mark.parametrize("stored", [False, True], ids=["prefill", "decode"])
def test_f7_where_memory_is_never_enough_there_is_one_clear_error_and_nothing_is_left(monkeypatch, stored):
    gen = over(DocumentStore(MemoryStore()))
    if stored:
        gen.prefill(DOCUMENTS)
    with monkeypatch.context() as patch:
        running_out(gen, patch, times=10**6)
        for ask in (gen.answer, lambda *a, **k: list(gen.stream(*a, **k))):
            with pytest.raises(MemoryLimitError, match="not enough memory for 1 question"):
                ask("who?", DOCUMENTS, max_new_tokens=4)
    assert not gen.store._flights._under_way and gen.store.memory.stats.pinned == 0
    assert gen.answer("who?", DOCUMENTS, max_new_tokens=4).text is not None


def test_f7_other_errors_stay_what_they_are(monkeypatch):
    gen = over(DocumentStore())
    monkeypatch.setattr(gen._backbone, "prefill", lambda *a, **k: (_ for _ in ()).throw(RuntimeError("mine")))
    with pytest.raises(RuntimeError, match="mine"):
        gen.answer("who?", DOCUMENTS)


@pytest.mark.parametrize("token", [0, 1, 3])
def test_f8_a_stream_closed_at_any_token_leaves_nothing_behind(tmp_path, token):
    gen = over(DocumentStore(MemoryStore(), DiskStore(tmp_path / "s"), load="always"))
    expected = gen.answer("who?", DOCUMENTS, max_new_tokens=8).token_ids
    gen.store.memory.clear()
    with gen.stream("who?", DOCUMENTS, max_new_tokens=8) as stream:
        for _ in range(token):
            next(stream, None)
    assert not gen.store._flights._under_way and gen.store.memory.stats.pinned == 0
    assert gen.answer("who?", DOCUMENTS, max_new_tokens=8).token_ids == expected


FILLING = """
import os, sys, torch
sys.path[:0] = sys.argv[2:]
torch.set_num_threads(1)
from tests.store.test_store_in_generator import DiskStore, DocumentStore, over
gen = over(DocumentStore(None, DiskStore(sys.argv[1])))
put, count = DiskStore.put, 0
def dying(self, *arguments):
    global count
    count += 1
    if count == 7:
        os.kill(os.getpid(), 9)
    return put(self, *arguments)
DiskStore.put = dying
gen.prefill([f"the mill has {n} sacks" for n in range(20)])
"""


def test_f10_a_killed_process_is_gone_on_from(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(FILLING)
    paths = [str(ROOT), str(ROOT / "tests" / "helpers")]
    done = subprocess.run([sys.executable, str(script), str(tmp_path / "s"), *paths], capture_output=True, check=False)
    assert done.returncode == -9, done.stderr.decode()[-2000:]
    gen = over(DocumentStore(None, DiskStore(tmp_path / "s"), load="always"))
    found = [source.origin for source in gen.prefill([f"the mill has {n} sacks" for n in range(20)])]
    assert (found.count("disk"), found.count("computed")) == (5, 15)  # the prefix was the first of six files


def test_l1_threads_and_tasks_sync_async_and_streaming_equal_serial_ones(tmp_path):
    store = DocumentStore(MemoryStore(), DiskStore(tmp_path / "s"), load="always")
    gen, serial = over(store), over(DocumentStore())
    rows = [[f"the mill has {n} sacks", f"doves {n % 3}"] for n in range(6)]
    expected = [serial.answer("who?", row, max_new_tokens=4) for row in rows]

    def ask(number: int) -> bool:
        row, wanted = rows[number % 6], expected[number % 6]
        if number % 2:
            return gen.answer("who?", row, max_new_tokens=4).token_ids == wanted.token_ids
        stream = gen.stream("who?", row, max_new_tokens=4)
        return "".join(stream) == wanted.text and stream.answer.token_ids == wanted.token_ids

    async def tasks() -> list[bool]:
        return await asyncio.gather(*(asyncio.to_thread(ask, number) for number in range(200)))

    with ThreadPoolExecutor(32) as threads:
        running = [threads.submit(ask, number) for number in range(64)]
        assert all(asyncio.run(tasks())) and all(one.result() for one in running)
    assert store.metrics.computed == len({text for row in rows for text in row}) + 1  # each once, and the prefix


def test_i4_control_tokens_in_documents_reach_no_key_and_no_store(tmp_path):
    gen = over(DocumentStore(None, DiskStore(tmp_path / "s"), load="always"))
    control = gen._encoder.plain.control_ids
    texts = [token.content for token in gen._backbone.tokenizer.added_tokens_decoder.values()]
    gen.prefill([Document(f"a {text} b", title=text) for text in texts])
    stored = list((tmp_path / "s").glob("v*/*/*/*.safetensors"))
    ids = []
    for file in stored:
        with safe_open(file, "pt") as found:
            ids.append(found.get_tensor("token_ids").tolist())
    ids.remove(list(gen._encoder.prefix_ids))  # the template's own control tokens
    assert len(ids) == len(texts) and all(map(control.isdisjoint, ids))
