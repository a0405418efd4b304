"""Questions on the same documents read one fused context, and nothing else changes by it."""

from collections import Counter
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvfusion_rag import MemoryStore
from kvfusion_rag.data.rows import QARow
from kvfusion_rag.model.positions import block_mask, packed_mask
from kvfusion_rag.training.batches import epoch_steps, pack
from kvfusion_rag.training.examples import collate
from kvfusion_rag.training.loss import batch_logits, fusion_loss
from tests.training.test_training import ARCHITECTURES, batch_of, engine, rows, trainer


def shared(sizes: list[int], seed: int = 0, passages: int = 3) -> list[QARow]:
    """For each size that many questions, of several lengths, on the same passages in different orders."""
    made = []
    for group, (size, row) in enumerate(zip(sizes, rows(len(sizes), passages, seed), strict=True)):
        for n in range(size):
            order = row.passages[n % passages :] + row.passages[: n % passages]
            question = " ".join([row.question, "please", *["now"] * n])
            made.append(QARow(f"{group}-{n}", question, row.answers if n % 2 else ("grey red",), order))
    return made


def gradients(made, batches) -> tuple[float, dict[str, torch.Tensor]]:
    made.model.decoder.model.zero_grad()
    loss = sum(fusion_loss(made, batch) for batch in batches)
    loss.backward()
    return float(loss.detach()), {
        n: p.grad.clone() for n, p in made.model.decoder.model.named_parameters() if p.grad is not None
    }


@pytest.mark.parametrize("changes", [{}, {"_attn_implementation": "eager"}], ids=["sdpa", "eager"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_packed_questions_have_the_loss_and_gradients_of_single_ones(architecture, changes):
    made = engine(architecture, **changes)
    made.model.decoder.model.requires_grad_(True)
    data = [*shared([3, 1, 2]), QARow("none", "who", (), ())]
    together = batch_of(made, data)
    assert [len(group) for group in together.groups] == [3, 1, 2, 1] and together.packed
    loss, grads = gradients(made, [together])
    single_loss, single_grads = gradients(made, [batch_of(made, [row]) for row in data])
    assert loss == pytest.approx(single_loss, rel=1e-5)
    assert grads.keys() == single_grads.keys() and len(grads) > 10
    for name, grad in grads.items():
        torch.testing.assert_close(grad, single_grads[name], rtol=1e-3, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


def test_a_question_does_not_see_the_one_beside_it():
    made = engine()
    one, two, other = (batch_of(made, [row]).groups[0][0] for row in shared([3]))
    length = len(one.read)
    logits = [batch_logits(made, collate([one, beside]), torch.arange(length))[0] for beside in (two, other)]
    torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-4)


def test_joined_rows_are_never_packed():
    batch = batch_of(engine(), shared([3]), joined=True)
    assert not batch.packed and len(batch.groups) == 3


def test_documents_of_a_group_are_prefilled_and_fused_once():
    store = MemoryStore()
    made = engine(store=store)
    batch = batch_of(made, shared([8], passages=5))
    fusion_loss(made, batch)
    assert len(store) == 5 + 1 and batch.ids.shape[0] == 1


@given(st.integers(0, 3), st.lists(st.integers(1, 4), min_size=1, max_size=3), st.lists(st.integers(1, 4), max_size=3))
def test_a_packed_mask_is_the_block_mask_of_each_question(prefix, documents, questions):
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
    assert mask.any(dim=1).all()  # pads too, or their softmax would be NaN


# The order of an epoch

groupings = st.lists(st.integers(0, 8), min_size=1, max_size=40)


@given(groupings, st.integers(1, 6), st.integers(1, 3), st.integers(0, 5))
def test_an_epoch_has_every_row_once_and_cuts_only_groups_larger_than_a_batch(documents, size, batches, seed):
    options = {"batch_size": size, "batches_per_step": batches, "seed": seed}
    steps = epoch_steps(documents, **options)
    assert steps == epoch_steps(documents, **options)
    assert sorted(row for step in steps for batch in step for row in batch) == list(range(len(documents)))
    assert all(0 < len(batch) <= size for step in steps for batch in step)
    assert all(sum(map(len, step)) <= size * batches for step in steps)
    parts = Counter(shared for step in steps for batch in step for shared in {documents[row] for row in batch})
    for shared, number in Counter(documents).items():
        assert parts[shared] <= -(-number // size)


@given(st.integers(1, 30), st.integers(1, 6), st.integers(1, 3), st.integers(0, 5))
def test_rows_that_share_nothing_are_a_plain_shuffle_in_slices(number, size, batches, seed):
    steps = epoch_steps(range(number), batch_size=size, batches_per_step=batches, seed=seed)
    order = torch.randperm(number, generator=torch.Generator().manual_seed(seed)).tolist()
    slices = [order[n : n + size] for n in range(0, number, size)]
    assert [batch for step in steps for batch in step] == slices
    assert all(len(step) == batches for step in steps[:-1])


def test_groups_and_the_rows_in_them_change_places_from_epoch_to_epoch():
    documents = [n // 4 for n in range(24)]
    first, second = (epoch_steps(documents, batch_size=8, batches_per_step=1, seed=n) for n in (0, 1))
    groups = [
        [tuple(batch[n : n + 4]) for step in steps for batch in step for n in (0, 4)] for steps in (first, second)
    ]
    assert [group[0] // 4 for group in groups[0]] != [group[0] // 4 for group in groups[1]]
    assert set(map(frozenset, groups[0])) == set(map(frozenset, groups[1])) and set(groups[0]) != set(groups[1])


@given(st.lists(st.integers(1, 5), max_size=30))
def test_no_two_bins_could_be_one(sizes):
    bins = pack([[n] * size for n, size in enumerate(sizes)], 5)
    filled = sorted(sum(map(len, found)) for found in bins)
    assert all(one + two > 5 for one, two in pairwise(filled)) and sum(filled) == sum(sizes)


def test_a_run_over_shared_documents_taken_up_again_goes_on_as_if_it_had_not_stopped(tmp_path):
    data, options = shared([3, 2, 4, 1, 5]), {"eval_every": 2, "max_steps": 5, "dropout": 0.1, "epochs": 3}
    whole = trainer(tmp_path / "whole", engine(), data, **options).run()
    cut = trainer(tmp_path / "cut", engine(), data, **options)
    with pytest.raises(KeyboardInterrupt):
        cut.run(report=lambda progress: (_ for _ in ()).throw(KeyboardInterrupt))
    assert trainer(tmp_path / "cut", engine(), data, **options).run(resume=True).losses == whole.losses
