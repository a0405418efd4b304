"""Repositories that are not a model to load: the error names the cause, and its advice works."""

import json
import re
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny import model, save, tokenizer

from kvfusion_rag import InvalidInputError, KVFusionGenerator, ModelLoadError, UnsupportedModelError
from kvfusion_rag.cli import main

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 98000000\n"
CODE = "open({!r}, 'w').close()\n"


def load(folder: str | Path, **options) -> KVFusionGenerator:
    return KVFusionGenerator.from_pretrained(folder, **options)


@pytest.fixture
def folder(tmp_path) -> Path:
    return save(tmp_path / "model")


def change_json(file: Path, **values: object) -> None:
    content = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps({**content, **values}))


# Adapters


@pytest.mark.parametrize("with_config", [False, True])
def test_folder_with_only_an_adapter_names_the_call_that_loads_it(folder, tmp_path, with_config):
    network = model("llama")
    network.name_or_path = str(folder)
    get_peft_model(network, LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(tmp_path / "adapter")
    if with_config:  # some trainers write it
        (tmp_path / "adapter" / "config.json").write_text((folder / "config.json").read_text())
        tokenizer("byte-bpe").save_pretrained(tmp_path / "adapter")
    with pytest.raises(ModelLoadError, match="has only an adapter") as caught:
        load(tmp_path / "adapter")
    advice = re.search(r"from_pretrained\('(.*)', adapter='(.*)'\)", str(caught.value))
    assert advice is not None and advice[1] == str(folder)
    assert load(advice[1], adapter=advice[2]).gate.passed
    assert main(["doctor", str(folder), "--adapter", advice[2]]) == 0


# Files


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "tokenizer.json", "config.json"])
def test_git_lfs_pointer_is_named(folder, name):
    if name.endswith(".bin"):
        torch.save(model("llama").state_dict(), folder / name)
        (folder / "model.safetensors").unlink()
    content = (folder / name).read_bytes()
    (folder / name).write_text(POINTER)
    with pytest.raises(ModelLoadError, match=f"'{re.escape(name)}' of 'model' is a Git LFS pointer.*git lfs pull"):
        load(folder)
    (folder / name).write_bytes(content)  # what git lfs pull does
    assert load(folder).gate.passed


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "has no config.json"),
        ({"config.json": "{}"}, "model"),
        ({"config.json": "[]"}, "model"),
        ({"config.json": "not json"}, "configuration of 'model'"),
        ({"voices.bin": "x", "speech.onnx": "x"}, "has no config.json"),
    ],
)
def test_folder_without_a_model_is_rejected(tmp_path, files, message):
    (tmp_path / "model").mkdir()
    for name, content in files.items():
        (tmp_path / "model" / name).write_text(content)
    with pytest.raises(ModelLoadError, match=message):
        load(tmp_path / "model")


def test_diffusion_pipeline_is_named(tmp_path):
    (tmp_path / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')
    with pytest.raises(UnsupportedModelError, match="diffusion pipeline"):
        load(tmp_path)


def test_missing_hub_repository_is_not_called_a_folder_without_files(tmp_path):
    options = {"cache_dir": str(tmp_path), "local_files_only": True}
    with pytest.raises(ModelLoadError, match="cannot load the configuration of 'org/absent'"):
        load("org/absent", model_kwargs=options)


# Types


def test_unknown_type_of_model_is_named(folder):
    change_json(folder / "config.json", model_type="starling")
    with pytest.raises(UnsupportedModelError, match=r"model_type 'starling', which transformers .* does not know"):
        load(folder)


@pytest.mark.parametrize("part", ["configuration", "tokenizer"])
def test_code_of_a_repository_is_named_and_not_run(folder, tmp_path, part):
    (folder / "code.py").write_text(CODE.format(str(tmp_path / "was_run")))
    if part == "configuration":
        names = {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}
        change_json(folder / "config.json", model_type="starling", auto_map=names)
    else:
        names = {"AutoTokenizer": ["code.Tokenizer", None]}
        change_json(folder / "tokenizer_config.json", tokenizer_class="Starling", auto_map=names)
    with pytest.raises(UnsupportedModelError, match="needs code from its own repository"):
        load(folder)
    assert not (tmp_path / "was_run").exists()


def test_code_beside_a_type_that_transformers_knows_is_not_needed(folder, tmp_path):
    (folder / "code.py").write_text(CODE.format(str(tmp_path / "was_run")))
    change_json(folder / "config.json", auto_map={"AutoModelForCausalLM": "code.Model"})
    assert load(folder).gate.passed and not (tmp_path / "was_run").exists()
    with pytest.raises(InvalidInputError, match="contains 'trust_remote_code', but it must not"):
        load(folder, model_kwargs={"trust_remote_code": True})


# Embedding models


def test_embedding_model_is_named_and_embeds(tmp_path):
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.models import Pooling, Transformer

    body = Transformer(str(save(tmp_path / "base", "qwen3")))
    SentenceTransformer(modules=[body, Pooling(48)], device="cpu").save(
        str(tmp_path / "embedding"), create_model_card=False
    )
    change_json(tmp_path / "embedding" / "config.json", architectures=["Qwen3ForCausalLM"])  # as Qwen3-Embedding has
    with pytest.raises(UnsupportedModelError, match=r"is an embedding model .*; pass it as --embedding-model"):
        load(tmp_path / "embedding")
    (tmp_path / "pages").mkdir()
    (tmp_path / "pages" / "page.md").write_text("Amara Osei built a lighthouse of 31 metres.")
    index = ["index", str(tmp_path / "pages"), "--embedding-model", str(tmp_path / "embedding")]
    assert main(index) == 0
