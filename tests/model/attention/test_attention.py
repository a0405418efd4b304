"""Grouped attention equals the attention of the library."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import ARCHITECTURES, backbone, generator
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from kvfusion_rag.model.attention.functions import FOLDED_ON_CPU, GROUPED, grouped_attention
from kvfusion_rag.model.kv import KVShape

SHAPE = KVShape(2, 2, 4, 4, torch.float32)
CPU = torch.device("cpu")
architectures = pytest.mark.parametrize("architecture", ARCHITECTURES)


class Module(torch.nn.Module):
    num_key_value_groups = 3
    is_causal = True
    training = False


@settings(deadline=None, max_examples=30)
@given(
    st.integers(1, 3), st.sampled_from([1, 2, 5, FOLDED_ON_CPU + 3]), st.integers(0, 9), st.booleans(), st.booleans()
)
def test_grouped_attention_equals_the_library(batch, queries, before, masked, additive_mask):
    rng = torch.Generator().manual_seed(batch * 100 + queries + before)
    slots = before + queries
    query = torch.randn(batch, 6, queries, 8, generator=rng)
    key, value = torch.randn(2, batch, 2, slots + 5, 8, generator=rng)[:, :, :, :slots]  # as with free slots
    mask = None
    if masked or (before and queries > 1):
        mask = torch.rand(batch, 1, queries, slots, generator=rng) > 0.3
        mask[..., -1] = True
        if additive_mask:
            mask = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
    found, _ = grouped_attention(Module(), query, key, value, mask, scaling=0.3)
    expected, _ = sdpa_attention_forward(Module(), query, key, value, mask, scaling=0.3)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_models_with_shared_key_heads_use_grouped_attention():
    assert backbone("llama").attention == GROUPED
    assert backbone("gpt2").attention == "sdpa"
    assert generator("llama").identity() == generator("llama").identity()
