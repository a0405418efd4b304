"""Positions and masks: the pure functions that training, evaluation and inference share."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvfusion_rag.model.positions import additive, block_mask, document_positions, fused_positions, question_start

lengths = st.lists(st.integers(1, 9), max_size=6)


@pytest.mark.parametrize(
    ("prefix", "passage", "longest", "start"),
    [
        (0, 192, 145, 192),  # the paper: the question at p_{n+1}, however long the documents are
        (0, 192, 200, 200),  # a document longer than n moves the question behind it
        (3, 120, 7, 123),
        (3, None, 7, 10),  # no passage length: right behind the longest document
        (3, 120, 0, 3),  # no documents: plain generation
    ],
)
def test_question_start(prefix, passage, longest, start):
    assert question_start(prefix, passage, longest) == start


def test_documents_share_positions():
    assert document_positions(4, 3).tolist() == [4, 5, 6]
    assert fused_positions(2, [3, 1], 9, 2).tolist() == [0, 1, 2, 3, 4, 2, 9, 10]


@given(prefix=st.integers(0, 4), documents=lengths, question=st.integers(1, 5))
def test_block_mask_states_who_sees_whom(prefix, documents, question):
    mask = block_mask(prefix, documents, question)
    owner = [-1] * prefix + [i for i, n in enumerate(documents) for _ in range(n)] + [len(documents)] * question
    for i, mine in enumerate(owner):
        for j, other in enumerate(owner):
            visible = j <= i and (other in (-1, mine) or mine == len(documents))
            assert mask[i, j].item() == visible


def test_block_mask_of_one_document_is_causal():
    assert torch.equal(block_mask(2, [5], 3), torch.ones(10, 10, dtype=torch.bool).tril())


@given(prefix=st.integers(0, 4), documents=lengths, question=st.integers(1, 5))
def test_additive_mask_hides_the_same_and_stays_finite(prefix, documents, question):
    mask = block_mask(prefix, documents, question)
    hidden = additive(mask, torch.bfloat16)
    assert torch.equal(hidden == 0, mask) and hidden.isfinite().all()
