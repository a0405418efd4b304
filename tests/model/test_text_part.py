"""Multimodal repositories: their text model is loaded alone, and gives the logits of the whole model on text."""

import json
from pathlib import Path

import multimodal
import pytest
import torch
from peft import LoraConfig
from tiny import tokenizer
from tiny_training import SETTINGS, rows
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from kvfusion_rag import Document, KVFusionGenerator, ModelLoadError, UnsupportedModelError
from kvfusion_rag.cli import main
from kvfusion_rag.data.rows import write_rows
from kvfusion_rag.fusion.fused_cache import fuse
from kvfusion_rag.fusion.prefill import prefill
from kvfusion_rag.model.adapters.switching import set_adapter
from kvfusion_rag.model.loading import _load_weights
from kvfusion_rag.model.location import locate_model
from kvfusion_rag.model.positions import block_mask, fused_positions
from kvfusion_rag.model.repository import read_config
from kvfusion_rag.model.text_part import MULTIMODAL_TYPES, text_part

IDS = torch.randint(10, 390, (1, 60), generator=torch.Generator().manual_seed(0))
COMMIT = "0123456789abcdef0123456789abcdef01234567"
PARTS_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% for part in m.content %}{% if part.type == 'image' %}<image>"
    "{% elif part.type == 'text' %}{{ part.text }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def loaded(folder: str | Path, **options) -> tuple[KVFusionGenerator, PreTrainedModel]:
    generator = KVFusionGenerator.from_pretrained(folder, **options)
    return generator, generator._engine.model.backbone.model


def text_model(folder: Path) -> PreTrainedModel:
    """Return the text model without checking that it can be fused."""
    location = locate_model(folder)
    config = text_part(read_config(location))
    return _load_weights(location, config, torch.device("cpu"), torch.float32, {}, is_text_part=True)


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@torch.no_grad()
def logits(network: PreTrainedModel) -> torch.Tensor:
    return getattr(network, "thinker", network)(input_ids=IDS).logits  # Qwen Omni calls its language model so


@pytest.mark.parametrize("model_type", sorted(MULTIMODAL_TYPES))
def test_text_model_gives_the_logits_of_the_whole_model(model_type, tmp_path):
    whole = multimodal.save(tmp_path, model_type)
    text = text_model(tmp_path)
    assert relative_error(logits(text), logits(whole)) < 2e-6
    assert not text.config.to_dict().get("vision_config")


@pytest.mark.parametrize(
    ("model_type", "text"), [("mistral3", "ministral3"), ("internvl", "qwen3"), ("llava", "mistral")]
)
def test_multimodal_types_have_several_text_models(model_type, text, tmp_path):
    """Ministral 3 has the type of Mistral Small 3.1, and another text model."""
    whole = multimodal.save(tmp_path, model_type, text=text)
    generator, found = loaded(tmp_path)
    assert found.config.model_type == text and generator.gate.passed
    assert relative_error(logits(found), logits(whole)) < 2e-6


@pytest.mark.parametrize("model_type", ["internvl", "mistral3", "qwen2_5_vl", "qwen3_vl", "smolvlm"])
@torch.no_grad()
def test_fused_logits_are_one_block_masked_pass_of_the_whole_model(model_type, tmp_path):
    whole = multimodal.save(tmp_path, model_type)
    bone = loaded(tmp_path)[0]._engine.model.backbone
    documents, question = [tuple(range(10, 60)), tuple(range(100, 131)), tuple(range(200, 270))], [7, 8, 9]
    lengths = [len(ids) for ids in documents]
    kvs = dict(prefill(bone, documents, None, tokens_per_pass=128))
    context = fuse([[kvs[index] for index in range(3)]], bone.device, [None])
    positions = fused_positions(0, lengths, max(lengths), len(question))[None]
    mask = torch.ones(1, sum(lengths) + len(question), dtype=torch.long)
    fused = bone.forward(
        torch.tensor([question]), positions[:, -3:], mask, context.cache, torch.tensor([2]), adapter=False
    )
    axes = model_type.startswith("qwen")  # equal on text
    single = whole(
        input_ids=torch.tensor([[*(i for document in documents for i in document), *question]]),
        position_ids=positions.expand(3, 1, -1) if axes else positions,
        attention_mask=block_mask(0, lengths, len(question))[None, None],
    ).logits[:, -1]
    assert relative_error(fused, single) < 2e-6


@pytest.mark.parametrize("model_type", ["gemma3", "gemma3n", "mistral3", "qwen2_5_omni", "qwen2_5_vl", "qwen3_vl"])
def test_order_of_documents_does_not_matter_on_the_text_model(model_type, tmp_path):
    multimodal.save(tmp_path, model_type)
    generator, _ = loaded(tmp_path, max_new_tokens=4)
    assert generator.gate.passed
    documents = ["Amara Osei built a lighthouse of 31 metres.", "Two grey doves sleep on the roof.", "Rain falls."]
    assert generator.check_invariance("Who built it?", documents, permutations=3, mode="fusion").identical


@pytest.mark.parametrize("model_type", ["mistral3", "gemma3", "qwen2_5_vl", "qwen3_vl", "smolvlm"])
def test_tied_heads_are_tied_as_in_the_whole_model(model_type, tmp_path):
    whole = multimodal.save(tmp_path, model_type, tied=True)
    text = text_model(tmp_path)
    assert text.lm_head.weight is text.model.embed_tokens.weight
    assert relative_error(logits(text), logits(whole)) < 2e-6


def test_weights_of_other_parts_stay_on_the_disk(tmp_path, caplog):
    whole = multimodal.save(tmp_path, "mistral3")
    _, text = loaded(tmp_path)
    names = {name for name, _ in text.named_parameters()}
    assert all(name.startswith(("model.embed_tokens", "model.layers", "model.norm", "lm_head")) for name in names)
    assert len(names) < len(list(whole.parameters()))
    assert "vision_tower" not in caplog.text  # transformers reports weights that it does not load


def test_weights_under_todays_names_are_found_too(tmp_path):
    whole = multimodal.save(tmp_path, "gemma3")
    whole.save_pretrained(tmp_path, save_original_format=False)
    assert relative_error(logits(text_model(tmp_path)), logits(whole)) < 2e-6


def test_incomplete_text_part_is_rejected(tmp_path):
    whole = multimodal.save(tmp_path, "mistral3")
    del whole.model.language_model.layers[3]
    whole.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["text_config"]["num_hidden_layers"] = 4
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelLoadError, match=r"are missing in the checkpoint, the first is 'model\.layers\.3"):
        text_model(tmp_path)


def test_hub_name_of_a_multimodal_repository(tmp_path):
    repository = tmp_path / "hub" / "models--org--seeing"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(COMMIT)
    whole = multimodal.save(repository / "snapshots" / COMMIT, "qwen2_5_vl")
    options = {"cache_dir": str(tmp_path / "hub"), "local_files_only": True}
    generator, text = loaded("org/seeing", model_kwargs=options)
    assert generator.model_id == "org/seeing"
    assert relative_error(logits(text), logits(whole)) < 2e-6


def test_model_kwargs_change_the_text_part(tmp_path):
    multimodal.save(tmp_path, "qwen2_5_vl")
    _, text = loaded(tmp_path, model_kwargs={"max_position_embeddings": 256})
    assert text.config.max_position_embeddings == 256


def test_multimodal_models_that_count_slots_fail_the_gate(tmp_path):
    """The text part of Llama 4 scales attention by the number of cache slots."""
    multimodal.save(tmp_path, "llama4")
    with pytest.raises(UnsupportedModelError, match="support gate"):
        loaded(tmp_path)


def test_configuration_of_an_unknown_text_part_is_itself():
    config = multimodal.config("mistral3")
    assert text_part(config).model_type == "mistral" and config.text_config.architectures is None
    assert text_part(config.text_config) is config.text_config


# Chat templates of processors


@pytest.mark.parametrize("name", ["chat_template.json", "processor_config.json", "chat_template.jinja"])
@pytest.mark.parametrize("template", [PARTS_TEMPLATE, tokenizer("byte-bpe").chat_template], ids=["parts", "text"])
def test_chat_template_of_the_processor_is_used(name, template, tmp_path):
    multimodal.save(tmp_path, "smolvlm")
    (tmp_path / "chat_template.jinja").unlink()
    content = template if name.endswith("jinja") else json.dumps({"chat_template": template})
    (tmp_path / name).write_text(content)
    generator, _ = loaded(tmp_path, mode="concat")
    shown = generator.show_prompt("Who built it?", [Document("Amara Osei built it.")])
    assert shown.text.startswith("<|im_start|>") and shown.text.endswith("<|im_end|>\n<|im_start|>assistant\n")
    assert "Amara Osei built it." in shown.text and "Who built it?" in shown.text


# Saving, training, commands


def test_saved_text_model_loads_everywhere(tmp_path):
    whole = multimodal.save(tmp_path / "whole", "mistral3")
    generator, _ = loaded(tmp_path / "whole")
    generator._engine.model.backbone.save(tmp_path / "text")
    assert AutoConfig.from_pretrained(tmp_path / "text").model_type == "mistral"
    for text in (AutoModelForCausalLM.from_pretrained(tmp_path / "text"), loaded(tmp_path / "text")[1]):
        assert relative_error(logits(text), logits(whole)) < 2e-6


def test_adapter_of_the_text_part_is_saved_and_loaded(tmp_path):
    multimodal.save(tmp_path / "whole", "gemma3")
    generator, text = loaded(tmp_path / "whole")
    bone = generator._engine.model.backbone
    bone.add_adapter(LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False))
    bone.save(tmp_path / "adapter")
    _, adapted = loaded(tmp_path / "whole", adapter=tmp_path / "adapter")
    set_adapter(adapted, True)
    assert torch.equal(logits(adapted), logits(text))


def test_training_and_commands_work_on_a_multimodal_repository(tmp_path, capsys):
    multimodal.save(tmp_path / "whole", "qwen3_vl")
    (tmp_path / "whole" / "kvfusion.json").write_text(json.dumps(SETTINGS.to_dict()))
    write_rows(tmp_path / "train.jsonl", rows(8))
    write_rows(tmp_path / "dev.jsonl", rows(3, seed=1))
    command = ["train", tmp_path / "train.jsonl", "--dev", tmp_path / "dev.jsonl", "--model", tmp_path / "whole"]
    command += ["--output", tmp_path / "out", "--batch-size", "4", "--rank", "4", "--max-steps", "2"]
    assert main([str(part) for part in command]) == 0
    capsys.readouterr()
    tuned = ["--adapter", str(tmp_path / "out" / "best")]
    assert main(["doctor", str(tmp_path / "whole"), *tuned, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["mode"] == "fusion"
    (tmp_path / "page.md").write_text("Amara Osei built a lighthouse of 31 metres.")
    estimate = ["store", "estimate", str(tmp_path / "page.md"), "--model", str(tmp_path / "whole"), "--json"]
    assert main(estimate) == 0
    assert json.loads(capsys.readouterr().out)["tokens"] > 5
