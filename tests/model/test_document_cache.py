"""A prefill pass ends with the last layer's keys and values: the same bits as a whole pass, and one layer less."""

import gc
import weakref

import pytest
import torch
from tiny import ARCHITECTURES, backbone
from transformers import DynamicCache

from kvfusion_rag.fusion.prefill import prefill_prefix
from kvfusion_rag.model.kv import DocumentKV

architectures = pytest.mark.parametrize("architecture", ARCHITECTURES)
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
IDS = torch.arange(20, 46).reshape(2, 13)


def by_a_whole_pass(bone, prefix: DocumentKV | None):
    """Keys and values of ``IDS`` as transformers' own cache has them after all layers."""
    cache, past = DynamicCache(config=bone.config), 0
    if prefix is not None:
        past = prefix.num_tokens
        for layer in range(len(prefix.keys)):
            two = (len(IDS), -1, -1, -1)
            cache.update(prefix.keys[layer].expand(two), prefix.values[layer].expand(two), layer)
    places = torch.arange(past, past + IDS.shape[1]).expand(IDS.shape)
    mask = torch.ones(len(IDS), past + IDS.shape[1], dtype=torch.long)
    with torch.inference_mode():
        bone.model.get_decoder()(
            input_ids=IDS, position_ids=places, attention_mask=mask, past_key_values=cache, use_cache=True
        )
    return [torch.stack([layer[kind][:, :, past:] for layer in cache]) for kind in (0, 1)]


def layers_of(bone) -> torch.nn.ModuleList:
    count = bone.config.num_hidden_layers
    modules = bone.model.get_decoder().modules()
    return next(m for m in modules if isinstance(m, torch.nn.ModuleList) and len(m) == count)


@architectures
@dtypes
@pytest.mark.parametrize("prefix_ids", [(), (5, 6, 7)], ids=["no prefix", "prefix"])
def test_the_bits_are_those_of_a_whole_pass(architecture, dtype, prefix_ids):
    bone = backbone(architecture, dtype)
    prefix = prefill_prefix(bone, prefix_ids)
    keys, values = bone.prefill(IDS, prefix)
    expected_keys, expected_values = by_a_whole_pass(bone, prefix)
    assert keys.equal(expected_keys) and values.equal(expected_values)


@architectures
def test_the_last_layer_is_not_finished(architecture):
    bone, finished = backbone(architecture), []
    decoder, layers = bone.model.get_decoder(), layers_of(bone)
    for layer in layers:
        layer.register_forward_hook(lambda module, *_: finished.append(module))
    norm = getattr(decoder, "norm", getattr(decoder, "ln_f", None))
    if norm is not None:
        norm.register_forward_hook(lambda module, *_: finished.append(module))
    bone.prefill(IDS, None)
    assert finished == list(layers)[:-1]


@architectures
def test_a_pass_that_was_broken_off_leaves_nothing_behind(architecture):
    bone, kept = backbone(architecture), []
    before = by_a_whole_pass(bone, None)
    hook = layers_of(bone)[-1].register_forward_pre_hook(lambda module, given: kept.append(weakref.ref(given[0])))
    bone.model.train()  # as between steps of training
    gc.disable()
    try:
        bone.prefill(IDS, None)
        assert [ref() for ref in kept] == [None]  # hidden states are not kept alive by the exception
    finally:
        gc.enable()
    hook.remove()
    assert bone.model.training
    bone.model.eval()
    assert all(a.equal(b) for a, b in zip(before, by_a_whole_pass(bone, None), strict=True))


def test_errors_of_the_pass_come_through():
    with pytest.raises(IndexError):
        backbone("llama").prefill(IDS + 10_000, None)
