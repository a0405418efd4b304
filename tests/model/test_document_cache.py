"""A prefill pass ends with the last layer's keys and values, with the bits of a whole pass and one layer less work."""

import gc
import weakref

import pytest
import torch
from tiny import ARCHITECTURES, backbone

from kvfusion_rag.fusion.prefill import prefill_prefix
from kvfusion_rag.model.document_cache import PositionedCache

architectures = pytest.mark.parametrize("architecture", ARCHITECTURES)
IDS = torch.arange(20, 46).reshape(2, 13)


def whole_pass(bone, prefix):
    """Return keys and values of ``IDS`` from transformers' own layers after all layers."""
    past = 0 if prefix is None else prefix.num_tokens
    cache = PositionedCache(torch.arange(past).expand(len(IDS), -1))
    if prefix is not None:
        for layer in range(len(prefix.keys)):
            two = (len(IDS), -1, -1, -1)
            cache.update(prefix.keys[layer].expand(two), prefix.values[layer].expand(two), layer)
    positions = torch.arange(past, past + IDS.shape[1]).expand(IDS.shape)
    mask = torch.ones(len(IDS), past + IDS.shape[1], dtype=torch.long)
    with torch.inference_mode():
        bone.model.get_decoder()(
            input_ids=IDS,
            position_ids=positions,
            attention_mask=bone._masks(mask, positions, cache),
            past_key_values=cache,
            use_cache=True,
        )
    return [torch.stack([layer[kind][:, :, past:] for layer in cache]) for kind in (0, 1)]


def layers_of(bone) -> torch.nn.ModuleList:
    count = bone.config.num_hidden_layers
    modules = bone.prefill_decoder.modules()
    return next(m for m in modules if isinstance(m, torch.nn.ModuleList) and len(m) == count)


@architectures
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bits_are_those_of_a_whole_pass(architecture, dtype):
    bone = backbone(architecture, dtype)
    for prefix_ids in ((), (5, 6, 7)):
        prefix = prefill_prefix(bone, prefix_ids)
        for found, expected in zip(bone.prefill(IDS, prefix), whole_pass(bone, prefix), strict=True):
            assert found.equal(expected)


@architectures
def test_last_layer_is_not_finished(architecture):
    bone, finished = backbone(architecture), []
    decoder, layers = bone.prefill_decoder, layers_of(bone)
    norm = getattr(decoder, "norm", getattr(decoder, "ln_f", None))
    for module in [*layers, *([] if norm is None else [norm])]:
        module.register_forward_hook(lambda module, *_: finished.append(module))
    bone.prefill(IDS, None)
    assert finished == list(layers)[:-1]


@architectures
def test_ended_pass_keeps_no_memory_and_changes_nothing(architecture):
    bone, inputs = backbone(architecture), []
    before = whole_pass(bone, None)
    hook = layers_of(bone)[-1].register_forward_pre_hook(lambda module, given: inputs.append(weakref.ref(given[0])))
    bone.model.train()  # as between training steps
    gc.disable()
    try:
        bone.prefill(IDS, None)
        assert [ref() for ref in inputs] == [None]  # the exception does not keep hidden states alive
    finally:
        gc.enable()
    hook.remove()
    assert bone.model.training
    bone.model.eval()
    assert all(a.equal(b) for a, b in zip(before, whole_pass(bone, None), strict=True))


def test_other_errors_of_the_pass_are_raised():
    with pytest.raises(IndexError):
        backbone("llama").prefill(IDS + 10_000, None)
