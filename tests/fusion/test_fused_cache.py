"""The fused cache: layers that grow in place, and memory that is reused."""

import pytest
import torch
from batches import buffers
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import ARCHITECTURES, WORDS, generator

from kvfusion_rag import DocumentStore, MemoryLimitError
from kvfusion_rag.fusion.fused_cache import BufferPool, FusedBuffer, FusedLayer
from kvfusion_rag.fusion.memory import is_out_of_memory
from kvfusion_rag.model.kv import DocumentKV, KVShape

VOCABULARY = WORDS.split()
SHAPE = KVShape(2, 2, 4, 6, torch.float32)
CPU = torch.device("cpu")
architectures = pytest.mark.parametrize("architecture", ARCHITECTURES)


def kv(rng: torch.Generator, rows: int, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    return tuple(torch.randn(rows, 2, tokens, 4, generator=rng) for _ in range(2))


@settings(deadline=None)
@given(st.integers(0, 5), st.integers(0, 6), st.lists(st.integers(1, 4), max_size=6), st.data())
def test_an_in_place_layer_equals_concatenation(used, room, steps, data):
    """This holds for any number of free slots, and when rows are dropped in between."""
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


def test_memory_is_reused_by_the_next_fused_context():
    pool = BufferPool()
    first = FusedBuffer([8, 3], SHAPE, CPU, room=4, pool=pool)
    first._keys.fill_(float("nan"))  # memory of the last question
    first._values.fill_(float("nan"))
    place = first._memory.data_ptr()
    first.release()
    second = FusedBuffer([2, 4], SHAPE, CPU, pool=pool)
    assert second._memory.data_ptr() == place
    second.slots(0, 0, (1, 2), 0).keys.fill_(1)
    layer = second.context().layers[0]
    assert layer.keys[0, :, :2].eq(1).all() and layer.keys[0, :, 2:].eq(0).all()  # pads are zero, not NaN
    assert FusedBuffer([2], SHAPE, CPU, pool=pool)._memory.data_ptr() != place  # because the second buffer is using it
    second.release()
    assert pool.clear() == first._memory.nbytes and pool.clear() == 0


def test_memory_allocated_in_inference_mode_is_usable_outside_it():
    gen = generator("llama")
    expected = gen.answer("who?", ["the old mill"], max_new_tokens=3).token_ids
    gen._engine.model._pool.clear()
    with torch.inference_mode():
        gen.answer("who?", ["the old mill"], max_new_tokens=3)
    assert gen.answer("who?", ["the old mill"], max_new_tokens=3).token_ids == expected


def test_an_answer_longer_than_its_free_slots_is_unchanged(monkeypatch):
    expected = generator("llama").answer("who?", ["the old mill"], max_new_tokens=40).token_ids
    monkeypatch.setattr("kvfusion_rag.engine.running_batch.SPARE_SLOTS", 3)
    assert generator("llama").answer("who?", ["the old mill"], max_new_tokens=40).token_ids == expected


def test_documents_from_disk_do_not_share_memory_with_reused_slots(tmp_path):
    """Another thread may still read a document when its slots are reused for the next question."""
    ids = tuple(range(5))
    disk = DocumentStore(None, generator("llama", store=tmp_path / "s").store.disk)
    made = DocumentKV(torch.ones(2, 2, 5, 4), torch.ones(2, 2, 5, 6), ids)
    from kvfusion_rag.store import KVRequest, document_key

    key = document_key("m", "", ids)
    disk.disk.put(key, made)
    slots = SHAPE.empty(ids)
    resolved = []
    resolve = disk._single_flight.resolve
    disk._single_flight.resolve = lambda key, document: (resolved.append(document), resolve(key, document))
    disk.fetch({key: KVRequest(ids, slots)}, SHAPE, CPU, lambda keys: pytest.fail("computed"))
    assert slots.keys.eq(1).all()
    assert not resolved or resolved[0].keys.data_ptr() != slots.keys.data_ptr()


def test_a_kept_memory_error_does_not_keep_the_cache(monkeypatch):
    gen = generator("llama")

    def full(*args, **options):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(gen._engine.model.backbone, "forward", full)
    before = buffers()
    try:
        gen.answer("who?", ["the old mill"], max_new_tokens=1)
    except MemoryLimitError as error:
        assert buffers() == before and "not have enough memory" in str(error)
    else:
        pytest.fail("no error")


@pytest.mark.parametrize(
    ("error", "is_shortage"),
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
def test_lack_of_memory_is_recognised_by_type_or_message(error, is_shortage):
    assert is_out_of_memory(error) is is_shortage


def test_answers_of_a_large_batch_have_free_slots_from_the_start(monkeypatch):
    gen = generator("llama")
    monkeypatch.setattr(
        "kvfusion_rag.engine.running_batch.SPARE_SLOTS", 32
    )  # as few per row as 4096 are in a much larger batch
    monkeypatch.setattr("kvfusion_rag.fusion.fused_cache._larger", lambda *args: pytest.fail("everything moved"))
    rows = [[" ".join(VOCABULARY[n : n + 4] * 25)] for n in range(8)]
    answers = gen.answer_batch(["who?"] * 8, rows, max_new_tokens=30)
    assert max(len(answer.token_ids) for answer in answers) == 30


def test_oversized_pooled_memory_is_freed():
    pool = BufferPool()
    large = FusedBuffer([400], SHAPE, CPU, pool=pool)
    large.release()
    small = FusedBuffer([4], SHAPE, CPU, pool=pool)
    assert small._memory.nbytes < large._memory.nbytes
    small.release()
    assert pool.clear() == small._memory.nbytes
