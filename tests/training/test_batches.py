"""Questions with the same documents share one fused cache, which changes neither loss nor gradients."""

from collections import Counter
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_training import ARCHITECTURES, assert_same_gradients, batch_of, engine, gradients, shared

from kvfusion_rag import MemoryStore
from kvfusion_rag.data.rows import QARow
from kvfusion_rag.model.positions import SHARED, block_mask, packed_mask
from kvfusion_rag.training.batches import epoch_steps, pack
from kvfusion_rag.training.examples import collate
from kvfusion_rag.training.loss import batch_logits, fusion_loss


@pytest.mark.parametrize("changes", [{}, {"_attn_implementation": "eager"}], ids=["sdpa", "eager"])
@pytest.mark.parametrize("joined", [False, True], ids=["fused", "joined"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_packed_questions_have_the_gradients_of_single_ones(architecture, joined, changes):
    made = engine(architecture, **changes)
    made.model.decoder.model.requires_grad_(True)
    data = [*shared([3, 1, 2], rotated=not joined), QARow("none", "who", (), ())]
    together = batch_of(made, data, joined=joined)
    assert [len(group) for group in together.groups] == [3, 1, 2, 1] and together.packed
    loss, grads = gradients(made, [together])
    single_loss, single_grads = gradients(made, [batch_of(made, [row], joined=joined) for row in data])
    assert loss == pytest.approx(single_loss, rel=1e-5)
    assert_same_gradients(grads, single_grads)


def test_packed_questions_do_not_attend_to_each_other():
    made = engine()
    one, two, other = (batch_of(made, [row]).groups[0][0] for row in shared([3]))
    length = len(one.read)
    logits = [batch_logits(made, collate([one, second]), torch.arange(length))[0] for second in (two, other)]
    torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-4)


def test_documents_of_joined_prompts_are_read_once():
    made = engine()
    batch = batch_of(made, shared([3], rotated=False), joined=True)
    alone = batch_of(made, shared([1]), joined=True).ids[0]
    context = len(batch.groups[0][0].context)
    assert context > 0 and int((batch.question_of == SHARED).sum()) == context
    assert batch.ids[0, :context].tolist() == alone[:context].tolist()
    assert batch.ids.shape == (1, context + sum(len(example.read) for example in batch.groups[0]))


def test_joined_prompt_is_cut_between_documents_and_question():
    made = engine()
    (row,) = shared([1])
    ((example,),) = batch_of(made, [row], joined=True).groups
    documents = tuple(passage.document(str(n)) for n, passage in enumerate(row.passages, start=1))
    layout = made.prompts.layout(row.question, None, "fusion", has_documents=True)
    joined = layout.joined(made.read(documents, layout))
    assert example.context + example.question == joined.ids and example.question == layout.question
    assert example.start == len(example.context)


def test_documents_of_a_group_are_prefilled_and_fused_once():
    store = MemoryStore()
    made = engine(store=store)
    batch = batch_of(made, shared([8], passages=5))
    fusion_loss(made, batch)
    assert len(store) == 5 + 1 and batch.ids.shape[0] == 1


@given(st.integers(0, 3), st.lists(st.integers(1, 4), min_size=1, max_size=3), st.lists(st.integers(1, 4), max_size=3))
def test_packed_mask_is_the_block_mask_of_each_question(prefix, documents, questions):
    context = torch.ones(1, prefix + sum(documents))
    owner = [n for n, length in enumerate(questions) for _ in range(length)] + [-1, -1]
    mask = packed_mask(context, torch.tensor([owner]))[0, 0]
    slots, start = context.shape[1], 0
    for length in questions:
        seen = mask[start : start + length]
        expected = block_mask(prefix, documents, length)[-length:]
        assert torch.equal(torch.cat([seen[:, :slots], seen[:, slots + start : slots + start + length]], 1), expected)
        assert int(seen.sum()) == int(expected.sum())
        start += length
    assert mask.any(dim=1).all()  # padding too, or its softmax would be NaN


# The order of an epoch

groupings = st.lists(st.integers(0, 8), min_size=1, max_size=40)


@given(groupings, st.integers(1, 6), st.integers(1, 3), st.integers(0, 5))
def test_epoch_has_every_row_once_and_splits_only_groups_larger_than_a_batch(documents, size, batches, seed):
    options = {"batch_size": size, "batches_per_step": batches, "seed": seed}
    steps = epoch_steps(documents, **options)
    assert steps == epoch_steps(documents, **options)
    assert sorted(row for step in steps for batch in step for row in batch) == list(range(len(documents)))
    assert all(0 < len(batch) <= size for step in steps for batch in step)
    assert all(sum(map(len, step)) <= size * batches for step in steps)
    parts = Counter(key for step in steps for batch in step for key in {documents[row] for row in batch})
    for key, number in Counter(documents).items():
        assert parts[key] <= -(-number // size)


@given(st.integers(1, 30), st.integers(1, 6), st.integers(1, 3), st.integers(0, 5))
def test_rows_that_share_nothing_are_a_plain_shuffle_in_slices(number, size, batches, seed):
    steps = epoch_steps(range(number), batch_size=size, batches_per_step=batches, seed=seed)
    order = torch.randperm(number, generator=torch.Generator().manual_seed(seed)).tolist()
    slices = [order[n : n + size] for n in range(0, number, size)]
    assert [batch for step in steps for batch in step] == slices
    assert all(len(step) == batches for step in steps[:-1])


def test_groups_and_their_rows_are_shuffled_in_each_epoch():
    documents = [n // 4 for n in range(24)]
    first, second = (epoch_steps(documents, batch_size=8, batches_per_step=1, seed=n) for n in (0, 1))
    groups = [
        [tuple(batch[n : n + 4]) for step in steps for batch in step for n in (0, 4)] for steps in (first, second)
    ]
    assert [group[0] // 4 for group in groups[0]] != [group[0] // 4 for group in groups[1]]
    assert set(map(frozenset, groups[0])) == set(map(frozenset, groups[1])) and set(groups[0]) != set(groups[1])


@given(st.lists(st.integers(1, 5), max_size=30))
def test_no_two_bins_fit_into_one(sizes):
    bins = pack([[n] * size for n, size in enumerate(sizes)], 5)
    filled = sorted(sum(map(len, found)) for found in bins)
    assert all(one + two > 5 for one, two in pairwise(filled)) and sum(filled) == sum(sizes)
