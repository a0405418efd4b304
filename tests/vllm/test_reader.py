"""Stored documents at other positions, as vLLM's workers read them. No vLLM is needed."""

from __future__ import annotations

import pytest
import tiny
import torch

from kvfusion_rag import FusedPrompt, FusedReader, KVFusionGenerator, StoreError, UnsupportedModelError
from kvfusion_rag.fusion.interface import FusionModel
from kvfusion_rag.fusion.torch_model import TorchModel
from kvfusion_rag.model.kv import DocumentKV
from kvfusion_rag.store import DiskStore, document_key
from kvfusion_rag.vllm.reader import ReaderOptions
from kvfusion_rag.vllm.rotation import KeyRotation
from kvfusion_rag.vllm.support import require_supported_model, require_supported_vllm

IDS = tuple(range(20, 37))
THETA = {"rope_theta": 10_000.0}
ROPES = {
    "default": THETA,
    "linear": THETA | {"factor": 4.0},
    "llama3": THETA
    | {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64},
    "yarn": THETA | {"factor": 4.0, "original_max_position_embeddings": 64},
}


def model_with(kind: str, **changes) -> TorchModel:
    rope = {"rope_type": kind, **ROPES[kind]}
    return TorchModel(tiny.backbone("llama", rope_parameters=rope, **changes))


def prefilled(model: FusionModel, start: int) -> DocumentKV:
    ((_, kv),) = model.prefill([IDS], None, [start])
    return kv


@pytest.mark.parametrize("shift", [-40, -1, 0, 1, 100, 300])
@pytest.mark.parametrize("kind", ROPES)
def test_moved_keys_are_those_of_the_other_position(kind, shift):
    model = model_with(kind)
    rotation = KeyRotation.of(model.backbone.model.config)
    here, there = (prefilled(model, start) for start in (50, 50 + shift))
    first = rotation.moved(here.keys[:1], shift)  # deeper layers also see positions, but only as distances
    assert torch.allclose(first, there.keys[:1], atol=1e-4)
    assert torch.allclose(rotation.moved(here.keys, shift), there.keys, atol=1e-3)
    if shift:
        assert not torch.allclose(here.keys[:1], there.keys[:1], atol=1e-2)


def test_moving_rounds_once():
    rotation = KeyRotation.of(model_with("default").backbone.model.config)
    keys = torch.randn(2, 3, 12)
    exact = rotation.moved(keys.double().float(), 77)
    assert torch.equal(rotation.moved(keys.bfloat16(), 77), rotation.moved(keys.bfloat16().float(), 77).bfloat16())
    assert torch.allclose(exact.norm(dim=-1), keys.norm(dim=-1))


@pytest.fixture
def stored(tmp_path):
    """A reader of a store with two documents, their KVs, and the prompt that reads both."""
    model, generator = model_with("default"), torch.Generator().manual_seed(0)
    store, shape, kvs, pieces = DiskStore(tmp_path), model.kv_shape, [], []
    for ids in ((1, 2, 3), (4, 5, 6, 7, 8)):
        size = (shape.layers, shape.heads, len(ids), shape.key_width)
        kvs.append(DocumentKV(torch.randn(size, generator=generator), torch.randn(size, generator=generator), ids))
        key = document_key("model", "", ids)
        assert store.put(key, kvs[-1])
        pieces.append((key, len(ids)))
    options = ReaderOptions(
        str(tmp_path), None, "raw", shape.layers, shape.heads, shape.key_width, shape.value_width, "float32"
    )
    config = model.backbone.model.config
    return FusedReader(options.to_dict(), config), kvs, FusedPrompt(tuple(pieces), 5), KeyRotation.of(config)


@pytest.mark.parametrize("skip", range(8))
def test_documents_are_joined_and_moved(stored, skip):
    reader, kvs, prompt, rotation = stored
    keys, values = reader.read(prompt, (1, 2, 3, 4, 5, 6, 7, 8, 9), skip=skip)
    expected = rotation.moved(torch.cat([kv.keys for kv in kvs], 2), 3)
    assert torch.equal(keys, expected[:, :, skip:])
    assert torch.equal(values, torch.cat([kv.values for kv in kvs], 2)[:, :, skip:])


def test_a_document_with_other_ids_is_missing(stored):
    reader, _, prompt, _ = stored
    with pytest.raises(StoreError, match="does not have the document"):
        reader.read(prompt, (1, 2, 3, 4, 5, 6, 7, 9, 9))


def test_a_removed_document_is_missing(stored, tmp_path):
    reader, _, prompt, _ = stored
    DiskStore(tmp_path).forget(prompt.documents[1][0])
    with pytest.raises(StoreError, match="does not have the document"):
        reader.read(prompt, tuple(range(1, 10)))


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (tiny.config("gpt2"), "model type is 'gpt2'"),
        (tiny.config("gemma3"), "model type is 'gemma3_text'"),
        (tiny.config("mistral"), "attention window"),
        (tiny.config("qwen3", layer_types=["sliding_attention"] * 3), "attention window"),
        (tiny.config("llama", rope_parameters={"rope_type": "dynamic", "factor": 2.0, **THETA}), "RoPE .* is dynamic"),
    ],
    ids=lambda value: getattr(value, "model_type", ""),
)
def test_models_whose_keys_cannot_be_moved_are_refused(config, reason):
    with pytest.raises(UnsupportedModelError, match=reason):
        require_supported_model(config)


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
def test_supported_models(architecture):
    require_supported_model(tiny.config(architecture))
    require_supported_model(tiny.config("mistral", sliding_window=None))


@pytest.mark.parametrize(("version", "supported"), [("0.31.2", False), ("0.32.0", True), ("0.32.1+cpu", True),
                                                    ("0.33.0", False), ("0.33.0rc1", False)])  # fmt: skip
def test_supported_versions(version, supported):
    if supported:
        require_supported_vllm(version)
        return
    with pytest.raises(ImportError, match=f"vLLM {version} is installed"):
        require_supported_vllm(version)


@pytest.mark.parametrize(
    ("options", "cause"),
    [
        ({"max_model_len": 512}, "max_model_len is 512, but only engine='vllm'"),
        ({"vllm_args": ["--x"]}, "vllm_args is .* but only engine='vllm'"),
        ({"engine": "vllm", "cache_type": "f16"}, "only engine='llama.cpp'"),
        ({"engine": "vllm", "max_model_len": 0}, "above 0"),
        ({"engine": "vllm", "vllm_args": "--x"}, "must be a list"),
        ({"engine": "vllm", "decoder": "x"}, "no such option"),
    ],
)
def test_options_of_other_engines_are_rejected(model_folder, options, cause):
    with pytest.raises(ValueError, match=cause):
        KVFusionGenerator.from_pretrained(model_folder, **options)
