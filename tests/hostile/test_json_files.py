"""Files of JSON that other people may have written: our errors or a result, whatever the JSON is."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from fuzzing import DEEP, JSON, LARGE, examples, ours
from hypothesis import example, given
from hypothesis import strategies as st

from kvfusion_rag import DiskStore, InvalidInputError, KVFusionError, ModelLoadError
from kvfusion_rag.adapting.stages import NAME as STAGES_FILE
from kvfusion_rag.adapting.stages import Stages
from kvfusion_rag.evaluation.journal import Journal
from kvfusion_rag.home import home
from kvfusion_rag.model.adapters.base import require_same_base, require_trained_on
from kvfusion_rag.model.location import locate_model
from kvfusion_rag.model.repository import read_config, read_tokenizer
from kvfusion_rag.serving import Access, read_keys
from kvfusion_rag.text import measured_mode
from kvfusion_rag.text.settings import ModelSettings, load_settings
from kvfusion_rag.training.checkpoint import load_record

IDENTITY = ("digest", "float32", None)
MODEL = tiny.model("llama")


def read_settings(folder: Path, content: str) -> object:
    (folder / "kvfusion.json").write_text(content)
    return load_settings(str(folder), tiny.tokenizer("byte-bpe"), model_id="m")


def read_model_file(name: str) -> Callable[[Path, str], object]:
    def read(folder: Path, content: str) -> object:
        if not (folder / "tokenizer.json").exists():
            tiny.tokenizer("byte-bpe").save_pretrained(folder)
            tiny.config("llama").save_pretrained(folder)
        (folder / name).write_text(content)
        return read_config(locate_model(folder)), read_tokenizer(locate_model(folder))

    return read


def read_adapter_config(folder: Path, content: str) -> object:
    (folder / "adapter_config.json").write_text(content)
    return require_same_base(folder, MODEL, "m", exact=True)


def read_training_record(folder: Path, content: str) -> object:
    (folder / "training.json").write_text(content)
    return require_trained_on(folder, "m", torch.float32, lambda: "digest")


def read_checkpoint(folder: Path, content: str) -> object:
    (folder / "training.json").write_text(content)
    return load_record(folder)


def read_journal(folder: Path, content: str) -> object:
    (folder / "journal.jsonl").write_text(content + "\n")
    return Journal(folder / "journal.jsonl", {"rows": "digest"})


def read_stages(folder: Path, content: str) -> object:
    (folder / STAGES_FILE).write_text(content)
    return Stages(folder, {"format": 1})


def read_store_marker(folder: Path, content: str) -> object:
    (folder / "store").mkdir(exist_ok=True)
    (folder / "store" / "format.json").write_text(content)
    return DiskStore(folder / "store")


def read_key_file(folder: Path, content: str) -> object:
    (folder / "keys.json").write_text(content)
    return Access(read_keys(folder / "keys.json"))


READERS: dict[str, Callable[[Path, str], object]] = {
    "settings": read_settings,
    "adapter settings": read_adapter_config,
    "training record": read_training_record,
    "checkpoint": read_checkpoint,
    "journal": read_journal,
    "stages": read_stages,
    "store": read_store_marker,
    "keys": read_key_file,
    **{name: read_model_file(name) for name in ("config.json", "modules.json", "chat_template.json")},
}
FIELDS = {
    "settings": [field.name for field in fields(ModelSettings)],
    "adapter settings": ["base_model_name_or_path"],
    "training record": ["base_weights", "base_model", "dtype", "same_family"],
    "config.json": ["model_type", "auto_map", "architectures", "hidden_size", "text_config"],
    "modules.json": ["type"],
    "chat_template.json": ["chat_template"],
    "journal": ["identity", "system", "condition", "row", "answer"],
    "stages": ["format"],
    "store": ["version", "format"],
    "keys": ["key-of-the-only-tenant"],
    "checkpoint": ["rows", "config"],
}


@pytest.mark.parametrize("content", [DEEP, '{"a":' * 50_000, "", "{", "\x00", "null", "[1]", '"x"', "5", str(LARGE)],
                         ids=["deep list", "deep object", "empty", "open", "nul", "null", "list", "text", "number",
                              "large number"])  # fmt: skip
@pytest.mark.parametrize("name", READERS)
def test_json_of_another_form_is_read_or_our_error(tmp_path, name, content):
    ours(lambda: READERS[name](tmp_path, content))


@pytest.mark.parametrize("name", READERS)
@examples(12)
@given(data=st.data())
def test_any_value_in_any_field_is_read_or_our_error(tmp_path, name, data):
    names = st.sampled_from(FIELDS[name])
    value = data.draw(st.dictionaries(names, JSON, min_size=1) | st.lists(st.dictionaries(names, JSON), max_size=2))
    ours(lambda: READERS[name](tmp_path, json.dumps(value)))


@examples(30)
@given(st.fixed_dictionaries({}, optional=dict.fromkeys(FIELDS["settings"], JSON)))
@example({"ape_scale": LARGE})
@example({"focus_weight": LARGE})
def test_settings_that_are_accepted_survive_a_round_trip(tmp_path, values):
    settings = ours(lambda: read_settings(tmp_path, json.dumps(values)))
    if isinstance(settings, ModelSettings):
        assert read_settings(tmp_path, json.dumps(settings.to_dict())) == settings


@pytest.mark.parametrize("base", [5, ["a"], {"a": 1}, "x" * 300, "x" * 5000, "a\0b", "/dev/null", "\ud800", True])
def test_base_model_of_an_adapter_may_have_any_name(tmp_path, base):
    """The name is a text that somebody else wrote, and need not be a path that this system can have."""
    content = json.dumps({"base_model_name_or_path": base})
    if isinstance(base, str):
        read_adapter_config(tmp_path, content)
    else:
        with pytest.raises(ModelLoadError, match=r"base_model_name_or_path is .*, but it must be a text"):
            read_adapter_config(tmp_path, content)


@pytest.mark.parametrize("kind", [[], {}, 5, ["llama"]])
def test_model_type_that_is_not_a_text_is_named(tmp_path, kind):
    with pytest.raises(KVFusionError, match="model_type"):
        read_model_file("config.json")(tmp_path, json.dumps({"model_type": kind}))


@pytest.mark.parametrize("weight", [LARGE, "high", None, -1, True, float("nan")])
@pytest.mark.parametrize("focus", [3, LARGE, "three", True])
def test_wrong_measurements_are_ignored_with_a_warning(tmp_path, monkeypatch, caplog, weight, focus):
    monkeypatch.setenv("KVFUSION_HOME", str(tmp_path))
    measured_mode.keep_measurement(IDENTITY, "m", measured_mode.Measured("fusion", focus, weight), [])
    assert measured_mode.measured(IDENTITY) is None and "is not readable" in caplog.text


def test_deep_measurement_is_ignored_with_a_warning(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("KVFUSION_HOME", str(tmp_path))
    measured_mode.keep_measurement(IDENTITY, "m", measured_mode.Measured("fusion"), [])
    (file,) = (home() / "measured").iterdir()
    file.write_text(DEEP)
    assert measured_mode.measured(IDENTITY) is None and "nested too deeply" in caplog.text


@pytest.mark.parametrize("field", ["temperature", "top_p"])
def test_numbers_that_no_float_can_hold_are_rejected(field):
    options: dict[str, Any] = {field: LARGE}
    with pytest.raises(InvalidInputError, match=f"{field} is"):
        tiny.speaker("in 1874").answer("who?", ["the mill"], **options)
