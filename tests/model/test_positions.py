"""Positions and masks, which training, evaluation and inference share."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvfusion_rag.model.positions import additive, block_mask, document_positions, fused_positions, question_start


@pytest.mark.parametrize(
    ("prefix", "passage", "longest", "start"),
    [
        (0, 192, 145, 192),  # as in the paper: p_{n+1}, regardless of the documents' lengths
        (0, 192, 200, 200),  # after a document longer than n
        (3, 120, 7, 123),
        (3, None, 7, 10),  # no passage length: right after the longest document
        (3, 120, 0, 3),  # no documents: ordinary generation
    ],
)
def test_question_start(prefix, passage, longest, start):
    assert question_start(prefix, passage, longest) == start


def test_documents_share_positions():
    assert document_positions(4, 3).tolist() == [4, 5, 6]
    assert fused_positions(2, [3, 1], 9, 2).tolist() == [0, 1, 2, 3, 4, 2, 9, 10]


@settings(max_examples=30)
@given(prefix=st.integers(0, 4), documents=st.lists(st.integers(1, 6), max_size=4), question=st.integers(1, 5))
def test_block_mask_defines_the_visible_slots(prefix, documents, question):
    mask = block_mask(prefix, documents, question)
    owner = [-1] * prefix + [i for i, n in enumerate(documents) for _ in range(n)] + [len(documents)] * question
    expected = [
        [j <= i and (other in (-1, own) or own == len(documents)) for j, other in enumerate(owner)]
        for i, own in enumerate(owner)
    ]
    assert mask.tolist() == expected
    hidden = additive(mask, torch.bfloat16)
    assert torch.equal(hidden == 0, mask) and hidden.isfinite().all()


def test_block_mask_of_one_document_is_causal():
    assert torch.equal(block_mask(2, [5], 3), torch.ones(10, 10, dtype=torch.bool).tril())
