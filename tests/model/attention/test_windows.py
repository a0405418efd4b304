"""Windows are measured in positions: which configurations have them, and what their masks show."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import config
from transformers import (
    Gemma2Config,
    Gemma3TextConfig,
    GptOssConfig,
    Llama4TextConfig,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    Qwen2Config,
)

from kvfusion_rag.model.attention.windows import CHUNKED, FULL, SLIDING, Windows


@pytest.mark.parametrize(
    ("made", "sizes", "by_kind"),
    [
        (MistralConfig(sliding_window=4096), {SLIDING: 4096}, False),
        (Phi3Config(sliding_window=2047), {SLIDING: 2047}, False),
        (Gemma2Config(), {FULL: None, SLIDING: 4096}, True),
        (Gemma3TextConfig(), {FULL: None, SLIDING: 4096}, True),
        (GptOssConfig(), {FULL: None, SLIDING: 128}, True),
        (Llama4TextConfig(attention_chunk_size=8192), {CHUNKED: 8192, FULL: None}, True),
        (Qwen2Config(use_sliding_window=True, sliding_window=64, max_window_layers=0), {SLIDING: 64}, True),
    ],
    ids=lambda value: getattr(value, "model_type", None),
)
def test_windows_of_a_configuration(made, sizes, by_kind):
    assert Windows.of(made) == Windows(sizes, by_kind)


@pytest.mark.parametrize("made", [LlamaConfig(), MistralConfig(sliding_window=None), Qwen2Config(), config("gpt2")])
def test_configurations_without_windows(made):
    assert Windows.of(made) is None


@settings(deadline=None)
@given(size=st.integers(1, 9), data=st.data())
def test_masks_compare_positions(size, data):
    keys = data.draw(st.lists(st.integers(0, 20), min_size=1, max_size=12))
    count = data.draw(st.integers(1, len(keys)))  # the last ones are the queries
    padding = data.draw(st.lists(st.booleans(), min_size=len(keys), max_size=len(keys)))
    windows = Windows({FULL: None, SLIDING: size, CHUNKED: size}, by_kind=True)
    at, mask = torch.tensor([keys]), torch.tensor([padding]).long()
    made = windows.masks(mask, at[:, -count:], at, None)
    for kind, inside in (
        (FULL, lambda query, key: True),
        (SLIDING, lambda query, key: key > query - size),
        (CHUNKED, lambda query, key: query // size == key // size),
    ):
        expected = [
            [padding[slot] and slot <= row and inside(keys[row], keys[slot]) for slot in range(len(keys))]
            for row in range(len(keys) - count, len(keys))
        ]
        assert made[kind].expand(1, 1, count, len(keys))[0, 0].tolist() == expected


@pytest.mark.parametrize("by_kind", [False, True])
def test_additive_masks_hide_what_bool_masks_hide(by_kind):
    windows, at = Windows({SLIDING: 2}, by_kind), torch.arange(5)[None]
    shown, added = (windows.masks(torch.ones(1, 5), at, at, dtype) for dtype in (None, torch.bfloat16))
    if by_kind:
        shown, added = shown[SLIDING], added[SLIDING]
    assert torch.equal(added == 0, shown) and (added[~shown] < -1e30).all() and added.dtype == torch.bfloat16
