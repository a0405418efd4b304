"""What llama.cpp cannot load or apply is refused with the reason."""

from __future__ import annotations

import pytest
import tiny
from tiny_llama_cpp import load, save, save_adapter

from kvfusion_rag import InvalidInputError, KVFusionGenerator, ModelLoadError, UnsupportedModelError

pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
from kvfusion_rag.fusion.torch_model import TorchModel
from kvfusion_rag.llama_cpp import choosing
from kvfusion_rag.llama_cpp.model import LlamaCppModel


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return save(tmp_path_factory.mktemp("model"))


def test_model_without_a_gguf_file_is_refused(tmp_path):
    with pytest.raises(ModelLoadError, match="GGUF"):
        load(tiny.save(tmp_path / "model"))


def test_unknown_engine_is_refused(file):
    with pytest.raises(InvalidInputError, match="must be one of torch"):
        KVFusionGenerator.from_pretrained(file, engine="llamacpp")


def test_cut_file_is_refused(file, tmp_path):
    path = tmp_path / "cut.gguf"
    path.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(ModelLoadError):
        load(path)


@pytest.mark.parametrize(
    "settings",
    [{"use_dora": True}, {"modules_to_save": ["lm_head"]}, {"trainable_token_indices": [1]}, {"bias": "all"}],
    ids=lambda settings: next(iter(settings)),
)
def test_adapter_that_is_more_than_lora_is_refused(file, tmp_path, settings):
    with pytest.raises(UnsupportedModelError, match=next(iter(settings))):
        load(file, adapter=save_adapter(tmp_path, **settings))


def test_adapter_of_another_model_is_refused(file, tmp_path):
    from peft import LoraConfig, get_peft_model

    for sizes, error in (({"hidden_size": 64}, ModelLoadError), ({"num_hidden_layers": 3}, UnsupportedModelError)):
        other = tiny.model("llama", **{"num_hidden_layers": 2, **sizes})
        get_peft_model(other, LoraConfig(target_modules=["q_proj"], init_lora_weights=False)).save_pretrained(tmp_path)
        with pytest.raises(error, match=r"another model|no weights for the module"):
            load(file, adapter=tmp_path)


@pytest.mark.parametrize(
    "settings", [{"use_rslora": True}, {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 32}}], ids=str
)
def test_scales_of_an_adapter_are_those_of_peft(file, tmp_path, settings):
    from tiny_llama_cpp import DOCUMENTS, QUESTION, error, logits_of

    adapter = save_adapter(tmp_path, **settings)
    found, expected = (
        logits_of(load(file, engine, adapter=adapter), QUESTION, DOCUMENTS) for engine in ("llama.cpp", "torch")
    )
    assert error(found, expected) < 5e-3


def test_auto_is_torch_where_llama_cpp_cannot_be_used(file, tmp_path):
    folder = tiny.save(tmp_path / "model")
    for model, options in ((folder, {}), (file, {"dtype": "float32"})):
        assert isinstance(load(model, "auto", **options)._engine.model, TorchModel)


def test_auto_is_llama_cpp_where_torch_cannot_be_used(file, monkeypatch):
    assert isinstance(load(file, "auto", cache_type="q8_0")._engine.model, LlamaCppModel)
    monkeypatch.setattr(choosing, "_main_memory", lambda: 1)
    assert isinstance(load(file, "auto")._engine.model, LlamaCppModel)


@pytest.mark.parametrize("faster", ["torch", "llama.cpp"])
def test_auto_is_the_faster_engine(file, monkeypatch, faster):
    kind = {"torch": TorchModel, "llama.cpp": LlamaCppModel}[faster]
    measure = choosing._seconds
    measured = []

    def seconds(model):
        measured.append(measure(model))
        return 0.0 if isinstance(model, kind) else measured[-1]

    monkeypatch.setattr(choosing, "_seconds", seconds)
    assert isinstance(load(file, "auto")._engine.model, kind)
    assert len(measured) == 2 and min(measured) > 0
