"""Adapters as users have them: several in a folder, from a hub, beside merged weights, or made for another model."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import tiny
import torch
from huggingface_hub import constants
from peft import LoraConfig, PeftModel, get_peft_model
from peft_models import error, fused, load, move, reader, trained, two_steps
from tiny_gguf import write_gguf
from torchao.quantization import Int8WeightOnlyConfig
from transformers import TorchAoConfig

from kvfusion_rag import InvalidInputError, KVFusionGenerator, ModelLoadError
from kvfusion_rag.model.adapters.location import find_adapter
from kvfusion_rag.model.loading import load_backbone
from kvfusion_rag.model.location import locate_model
from kvfusion_rag.model.tolerance import tolerance_of

TOLERANCE = tolerance_of(torch.float32)
LORA = {"r": 4, "lora_alpha": 32, "target_modules": ["q_proj", "v_proj"]}
DOCUMENTS = ["two grey doves sleep", "Amara Osei built a lighthouse of 31 metres"]


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return tiny.save(tmp_path_factory.mktemp("base") / "tiny-base")


def tokens(model: Path, mode: str = "fusion", **options) -> list[int]:
    made = KVFusionGenerator.from_pretrained(model, mode=mode, store=None, **options)
    return list(made.answer("who built it?", DOCUMENTS, max_new_tokens=6).token_ids)


def save_several(base: Path, folder: Path, *names: str) -> PeftModel:
    """Save adapters of different weights as peft does, each under its name."""
    torch.manual_seed(0)
    adapted = get_peft_model(load(base), LoraConfig(**LORA), adapter_name=names[0])
    for name in names[1:]:
        adapted.add_adapter(name, LoraConfig(**LORA))
    for name in names:
        adapted.set_adapter(name)
        move(adapted)
    adapted.save_pretrained(folder)
    return adapted


def test_one_of_several_adapters_is_chosen_by_its_name(base, tmp_path):
    adapted = save_several(base, tmp_path, "default", "mill", "ferry")
    for name, place in {"default": tmp_path, "mill": tmp_path / "mill", "ferry": f"{tmp_path}/ferry"}.items():
        adapted.set_adapter(name)
        assert error(fused(reader(base, place)), two_steps(load(base), adapted)) < TOLERANCE
    assert find_adapter(tmp_path) == tmp_path  # the default one, as in peft


def test_several_adapters_without_a_default_must_be_named(base, tmp_path):
    save_several(base, tmp_path, "mill", "ferry")
    with pytest.raises(
        ModelLoadError, match=r"has several adapters \(ferry, mill\); name one, as in adapter='(.+)'\."
    ) as e:
        reader(base, tmp_path)
    reader(base, str(e.value).split("'")[-2])  # the advice works
    with pytest.raises(ModelLoadError, match="has no adapter 'barge'; its adapters are ferry, mill"):
        reader(base, tmp_path / "barge")
    shutil.rmtree(tmp_path / "ferry")
    assert find_adapter(tmp_path) == tmp_path / "mill"  # the only one


@pytest.mark.parametrize("adapter", ["", 3, ["a", "b"]])
def test_an_adapter_that_is_not_a_name_is_refused(base, adapter):
    with pytest.raises(InvalidInputError, match="adapter is"):
        reader(base, adapter)


@pytest.mark.parametrize("adapter", ["nothing", "./nothing", "/nothing/here", Path("nothing/here")])
def test_a_missing_folder_is_named(base, adapter):
    with pytest.raises(ModelLoadError, match=r"there is no folder .*nothing"):
        reader(base, adapter)


def test_missing_and_damaged_weights_are_reported(base, tmp_path):
    trained(base, LoraConfig(**LORA)).save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(ModelLoadError, match=r"cannot load the adapter .* of .*tiny-base' onto 'tiny-base'"):
        reader(base, tmp_path)
    file.unlink()
    with pytest.raises(ModelLoadError, match=r"adapter_model\.safetensors is missing"):
        reader(base, tmp_path)


def test_weights_in_the_older_format_are_read(base, tmp_path):
    adapted = trained(base, LoraConfig(**LORA))
    adapted.save_pretrained(tmp_path, safe_serialization=False)
    assert (tmp_path / "adapter_model.bin").is_file()
    assert error(fused(reader(base, tmp_path)), two_steps(load(base), adapted)) < TOLERANCE


# Hub


@pytest.fixture
def hub(base, tmp_path, monkeypatch) -> Path:
    """A cache of the hub, as downloads leave it, with a repository of three adapters."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    repository = tmp_path / "models--someone--adapters"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("a" * 40)
    save_several(base, repository / "snapshots" / ("a" * 40), "default", "mill", "ferry")
    return tmp_path


def test_an_adapter_is_found_in_the_cache_of_the_hub(base, hub):
    snapshot = hub / "models--someone--adapters" / "snapshots" / ("a" * 40)
    assert find_adapter("someone/adapters", cache_dir=hub) == snapshot
    assert find_adapter("someone/adapters/mill", cache_dir=hub) == snapshot / "mill"
    with pytest.raises(
        ModelLoadError, match="'someone/adapters' has no adapter 'barge'; its adapters are ferry, mill"
    ):
        find_adapter("someone/adapters/barge", cache_dir=hub)
    with pytest.raises(ModelLoadError, match="cannot load the adapter 'someone/nothing'"):
        find_adapter("someone/nothing", cache_dir=hub)
    (snapshot / "adapter_model.safetensors").unlink()
    with pytest.raises(ModelLoadError, match="cannot load the adapter 'someone/adapters' of"):
        tokens(base, adapter=snapshot)
    options = {"model_kwargs": {"cache_dir": str(hub)}}
    assert tokens(base, adapter="someone/adapters/mill", **options) == tokens(base, adapter=snapshot / "mill")


# Beside a model's weights


@pytest.mark.parametrize("mode", ["fusion", "concat"])
def test_an_adapter_beside_merged_weights_is_not_applied_again(base, tmp_path, mode, caplog):
    adapted = trained(base, LoraConfig(**LORA))
    adapted.save_pretrained(tmp_path / "beside")
    merged = adapted.merge_and_unload()
    for name in ("beside", "clean"):
        merged.save_pretrained(tmp_path / name)
        tiny.tokenizer("byte-bpe").save_pretrained(tmp_path / name)
    clean = tokens(tmp_path / "clean", mode)
    assert clean != tokens(base, mode)
    assert tokens(tmp_path / "beside", mode, adapter=None) == clean
    assert "the adapter beside" not in caplog.text
    assert tokens(tmp_path / "beside", mode) == clean
    assert "the adapter beside the weights of beside is not used" in caplog.text
    assert tokens(base, mode, decoder=tmp_path / "beside") == tokens(base, mode, decoder=tmp_path / "clean")
    with pytest.raises(ModelLoadError, match="was trained on another base model"):  # it would be applied twice
        tokens(tmp_path / "beside", mode, adapter=tmp_path / "beside")


def test_an_adapter_beside_weights_without_it_is_used_if_it_is_named(base, tmp_path):
    shutil.copytree(base, tmp_path / "both")
    adapted = trained(tmp_path / "both", LoraConfig(**LORA))
    adapted.save_pretrained(tmp_path / "both")
    bone = reader(tmp_path / "both", tmp_path / "both")
    assert error(fused(bone), two_steps(load(base), adapted)) < TOLERANCE


def test_an_adapter_folder_in_a_models_folder_may_have_names(base, tmp_path):
    shutil.copytree(base, tmp_path / "both")
    save_several(base, tmp_path / "both" / "adapter", "mill")
    named = tokens(base, adapter=tmp_path / "both" / "adapter" / "mill")
    assert tokens(tmp_path / "both") == named != tokens(tmp_path / "both", adapter=None)
    shutil.copytree(tmp_path / "both" / "adapter" / "mill", tmp_path / "both" / "adapter" / "ferry")
    with pytest.raises(ModelLoadError, match=r"has several adapters \(ferry, mill\)"):
        tokens(tmp_path / "both")
    assert tokens(tmp_path / "both", adapter=tmp_path / "both" / "adapter" / "mill") == named


# Base models


def test_an_adapter_of_other_weights_of_the_same_shape_is_refused(base, tmp_path):
    other = tiny.save(tmp_path / "other", seed=1)
    trained(other, LoraConfig(**LORA)).save_pretrained(tmp_path / "adapter")
    with pytest.raises(ModelLoadError, match=r"on another base model: on '.*other', but the weights of 'tiny-base'"):
        reader(base, tmp_path / "adapter")
    copied = shutil.copytree(other, tmp_path / "copy")
    reader(copied, tmp_path / "adapter")


@pytest.mark.parametrize("changes", [{"num_hidden_layers": 2}, {"num_hidden_layers": 5}, {"hidden_size": 32}])
def test_an_adapter_of_other_shapes_is_refused_with_both_names(base, tmp_path, changes):
    replaced = {"modules_to_save": ["embed_tokens", "input_layernorm"]}
    adapted = get_peft_model(tiny.model("llama", layer_types=None, **changes), LoraConfig(**LORA, **replaced))
    adapted.peft_config["default"].base_model_name_or_path = "someone/other-model"
    adapted.save_pretrained(tmp_path)
    with pytest.raises(
        ModelLoadError, match="onto 'tiny-base': it was trained on another base model, 'someone/other-mo"
    ):
        reader(base, tmp_path)


def test_an_adapter_of_another_architecture_is_refused_with_both_names(base, tmp_path):
    adapted = get_peft_model(tiny.model("gpt2"), LoraConfig(r=4, target_modules=["c_attn"]))
    adapted.peft_config["default"].base_model_name_or_path = "someone/gpt"
    adapted.save_pretrained(tmp_path)
    with pytest.raises(
        ModelLoadError, match=r"of 'someone/gpt' onto 'tiny-base': .*Target modules {'c_attn'} not found"
    ):
        reader(base, tmp_path)


def test_another_name_of_the_base_is_only_logged(base, tmp_path, caplog):
    for name, logged in {"someone/Tiny-Base": False, "someone/other": True, "": False}.items():
        adapted = trained(base, LoraConfig(**LORA))
        adapted.peft_config["default"].base_model_name_or_path = name
        adapted.save_pretrained(tmp_path)
        caplog.clear()
        reader(base, tmp_path)
        assert ("names the base model 'someone/other', but it is used with 'tiny-base'" in caplog.text) == logged


def test_an_adapter_with_more_tokens_is_refused_with_the_reason(base, tmp_path):
    network = load(base)
    network.resize_token_embeddings(520)
    config = LoraConfig(**LORA, modules_to_save=["embed_tokens", "lm_head"])
    get_peft_model(network, config).save_pretrained(tmp_path)
    with pytest.raises(
        ModelLoadError, match=r"has 520 rows, but the base model has 512 tokens; .* changed vocabulary"
    ):
        reader(base, tmp_path)


def test_embeddings_saved_in_another_precision_are_the_base_models(base, tmp_path):
    trained(base, LoraConfig(r=4, target_modules=["embed_tokens", "q_proj"])).half().save_pretrained(tmp_path)
    expected = fused(reader(base))
    assert torch.equal(fused(reader(base, tmp_path), adapter=False), expected)


@pytest.mark.parametrize("changed", [False, True])
def test_whole_embeddings_in_the_file_are_switched_off_for_documents(base, tmp_path, changed):
    """peft saves them if it is told to, and would load them into the base model."""
    adapted = trained(base, LoraConfig(**LORA))
    if changed:
        with torch.no_grad():
            adapted.get_input_embeddings().weight.add_(0.1)
    adapted.save_pretrained(tmp_path, save_embedding_layers=True)
    assert error(fused(reader(base, tmp_path)), two_steps(load(base), adapted)) < TOLERANCE
    assert torch.equal(fused(reader(base, tmp_path), adapter=False), fused(reader(base)))


# Bases in few bits


@pytest.mark.parametrize(
    "options", [{}, {"use_dora": True}, {"init_lora_weights": "pissa"}, {"modules_to_save": ["lm_head"]}]
)
def test_an_adapter_is_used_over_a_gguf_file(tmp_path, options):
    file = write_gguf(tmp_path / "tiny.gguf")
    location = locate_model(file)
    adapted = trained(Path(location.path), LoraConfig(**LORA, **options))
    adapted.save_pretrained(tmp_path / "adapter")
    bone = load_backbone(location, adapter=tmp_path / "adapter", dtype="float32", device="cpu")
    assert error(fused(bone), two_steps(load(Path(location.path)), adapted)) < TOLERANCE


def quantized(base: Path, adapter: Path | None = None):
    options = {"quantization_config": TorchAoConfig(Int8WeightOnlyConfig())}
    return load_backbone(locate_model(base), adapter=adapter, dtype="float32", device="cpu", model_kwargs=options)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_rslora": True},
        {"modules_to_save": ["embed_tokens"]},
        {"modules_to_save": ["lm_head"]},
        {"use_dora": True},
    ],
    ids=["plain", "rank-stabilized", "embeddings", "head", "DoRA"],
)
def test_an_adapter_is_used_over_8_bit_weights(base, tmp_path, options):
    trained(base, LoraConfig(**LORA, **options)).save_pretrained(tmp_path)
    adapted = PeftModel.from_pretrained(quantized(base).model, tmp_path).eval()
    expected = two_steps(quantized(base).model, adapted)
    bone = quantized(base, tmp_path)
    assert error(fused(bone), expected) < TOLERANCE
    assert torch.equal(fused(bone, adapter=False), fused(quantized(base)))


def test_pissa_over_8_bit_weights_is_refused(base, tmp_path):
    trained(base, LoraConfig(**LORA, init_lora_weights="pissa")).save_pretrained(tmp_path)
    with pytest.raises(ModelLoadError, match="pissa needs base weights that are not quantized"):
        quantized(base, tmp_path)
