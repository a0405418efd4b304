"""GGUF files become model folders, bit for bit as transformers reads them, and load like any other model."""

import json
import resource
import shutil
import sys
from pathlib import Path

import pytest
import tiny
import tiny_gguf
import torch
from gguf import GGMLQuantizationType
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from tiny_gguf import write_gguf
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, MambaConfig

from kvfusion_rag import InvalidInputError, KVFusionGenerator, ModelLoadError, UnsupportedModelError, cli
from kvfusion_rag.model.gguf import convert as gguf_convert
from kvfusion_rag.model.gguf.conversion_cache import converted_folder
from kvfusion_rag.model.location import locate_model

ROOT = Path(__file__).parents[3]
F32, F16, Q4_1 = GGMLQuantizationType.F32, GGMLQuantizationType.F16, GGMLQuantizationType.Q4_1
PRE = "tokenizer.ggml.pre"


def state(folder: Path, **options) -> dict[str, torch.Tensor]:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options).state_dict()


def require_equal(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, weights in theirs.items():
        assert torch.equal(ours[name], weights), name


def test_quantized_weights_are_those_of_transformers_own_reader(file, converted):
    require_equal(state(converted), state(file.parent, gguf_file=file.name))


@pytest.mark.parametrize("kind", [F32, F16, Q4_1], ids=str)
def test_weights_are_those_of_transformers_own_reader(kind, tmp_path):
    network = tiny_gguf.model(tied=kind != F32)
    path = write_gguf(tmp_path / "m.gguf", network, kind=kind)
    ours = state(converted_folder(path))
    require_equal(ours, network.state_dict() if kind == F32 else state(tmp_path, gguf_file=path.name))


def test_folder_is_an_ordinary_model_with_one_copy_of_tied_weights(converted):
    weights = load_file(converted / "model.safetensors")
    assert "lm_head.weight" not in weights
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}
    assert "quantization_config" not in json.loads((converted / "config.json").read_text())
    assert AutoConfig.from_pretrained(converted).tie_word_embeddings


def test_large_models_are_kept_in_bfloat16(file, monkeypatch, capfd):
    monkeypatch.setattr(gguf_convert, "FLOAT32_BELOW", 1000)
    stderr = sys.stderr
    weights = load_file(converted_folder(file) / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}
    assert sys.stderr is stderr and "Converting" not in capfd.readouterr().err


def test_tokenizer_keeps_template_special_tokens_and_ids(tmp_path):
    path = write_gguf(tmp_path / "m.gguf", metadata={PRE: "gpt-2"})
    ours = AutoTokenizer.from_pretrained(converted_folder(path))
    theirs = AutoTokenizer.from_pretrained(tmp_path, gguf_file=path.name)
    original = tiny.tokenizer("byte-bpe")
    assert ours.chat_template == tiny.CHATML
    assert ours.special_tokens_map == theirs.special_tokens_map
    assert ours.added_tokens_decoder.keys() == theirs.added_tokens_decoder.keys()
    for sample in (tiny.WORDS, "<|im_start|>user\nhi<|im_end|>", "<tool_call>"):
        assert ours(sample)["input_ids"] == theirs(sample)["input_ids"] == original(sample)["input_ids"]


def test_digits_are_split_as_the_model_does(converted, tmp_path, caplog):
    gpt2, unknown = (
        converted_folder(write_gguf(tmp_path / f"{pre}.gguf", metadata={PRE: pre})) for pre in ("gpt-2", "new-split")
    )
    for folder, pieces in (
        (converted, ["in", "ĊĊ", "1", "8", "7", "4"]),
        (gpt2, ["in", "Ċ", "Ċ", "1874"]),
        (unknown, ["in", "Ċ", "Ċ", "1874"]),
    ):
        pre_tokenizer = AutoTokenizer.from_pretrained(folder).backend_tokenizer.pre_tokenizer
        assert [piece for piece, _ in pre_tokenizer.pre_tokenize_str("in\n\n1874")] == pieces
    assert sum("unknown way to split text" in record.message for record in caplog.records) == 1


def test_end_of_turn_ends_an_answer(tmp_path):
    tokens = tiny_gguf.vocabulary()[0]
    end, turn = tokens.index("<|endoftext|>"), tokens.index("<|im_end|>")
    fields = {"tokenizer.ggml.eos_token_id": end, "tokenizer.ggml.eot_token_id": turn}
    path = write_gguf(tmp_path / "m.gguf", metadata=fields)
    assert KVFusionGenerator.from_pretrained(path)._engine.model.end_ids == {end, turn}


def test_files_beside_the_gguf_file_are_ignored(file, converted, tmp_path):
    shutil.copy(file, tmp_path / "copy.gguf")
    names = ("tokenizer.json", "tokenizer_config.json", "config.json", "generation_config.json")
    for name in names:
        (tmp_path / name).write_text("{}")
    copy = converted_folder(tmp_path / "copy.gguf")
    assert all((copy / name).read_text() == (converted / name).read_text() for name in names)


# Loading


def test_path_folder_and_name_load_the_same_model(file, entry):
    documents = ["the mill", "two doves"]
    loaded = [
        KVFusionGenerator.from_pretrained(model, **options)
        for model, options in (
            (file, {}),
            (str(file), {}),
            (file.parent, {}),
            (str(file.parent.parent), {"gguf_file": f"{file.parent.name}/{file.name}"}),
            (file.parent.parent, {"gguf_file": file.name, "model_kwargs": {"subfolder": file.parent.name}}),
        )
    ]
    assert {one.model_id for one in loaded} == {"tiny.Q8_0"}
    assert len({one._engine.model.weights_digest for one in loaded}) == 1
    assert len({one.answer("who?", documents, max_new_tokens=4).token_ids for one in loaded}) == 1


def test_settings_beside_the_file_are_used(file, entry, tmp_path):
    path = Path(shutil.copy(file, tmp_path))
    (tmp_path / "kvfusion.json").write_text('{"passage_length": 77}')
    assert KVFusionGenerator.from_pretrained(path).settings.passage_length == 77
    assert KVFusionGenerator.from_pretrained(file).settings.passage_length is None


def test_decoder_may_be_a_gguf_file(file, entry, tmp_path):
    other = write_gguf(tmp_path / "tuned.gguf", tiny_gguf.model(seed=1))
    tuned = KVFusionGenerator.from_pretrained(file, decoder=other)
    assert tuned._engine.model.decoder.model_id == "tuned" and tuned.model_id == "tiny.Q8_0"


def test_hub_repository_with_a_gguf_file(file, entry, tmp_path):
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "hub" / "models--org--repo"
    snapshot = repository / "snapshots" / commit
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    snapshot.mkdir(parents=True)
    shutil.copy(file, snapshot / "m.Q8_0.gguf")
    (snapshot / "kvfusion.json").write_text('{"passage_length": 78}')
    options = {"cache_dir": str(tmp_path / "hub"), "local_files_only": True}
    found = KVFusionGenerator.from_pretrained("org/repo", gguf_file="m.Q8_0.gguf", model_kwargs=options)
    assert found.model_id == "m.Q8_0" and found.settings.passage_length == 78
    assert found._engine.model.revision == commit
    with pytest.raises(ModelLoadError, match=r"cannot load 'other.gguf' of 'org/repo'"):
        KVFusionGenerator.from_pretrained("org/repo", gguf_file="other.gguf", model_kwargs=options)


def test_image_part_beside_the_text_model_is_passed_over(file, entry, tmp_path):
    shutil.copy(file, tmp_path / "m.Q8_0.gguf")
    (tmp_path / "mmproj-F16.gguf").write_bytes(b"GGUF")
    assert locate_model(tmp_path).path == str(entry)


def test_architecture_that_cannot_be_converted_is_named(tmp_path):
    file = write_gguf(tmp_path / "m.gguf", metadata={"general.architecture": "starling"})
    with pytest.raises(UnsupportedModelError, match=r"'m.gguf' has the architecture 'starling', which transformers"):
        converted_folder(file)


def test_architecture_that_cannot_be_fused_is_not_converted(tmp_path, monkeypatch):
    monkeypatch.setattr("kvfusion_rag.model.gguf.convert.AutoConfig.from_pretrained", lambda **_: MambaConfig())
    file = write_gguf(tmp_path / "m.gguf")
    with pytest.raises(UnsupportedModelError, match=r"'m.gguf' \(mamba\) cannot be fused exactly: .*running state"):
        converted_folder(file)


def test_folder_with_other_weights_is_not_a_gguf_folder(converted, file, entry, tmp_path):
    folder = Path(shutil.copytree(converted, tmp_path / "model"))
    shutil.copy(file, folder)
    assert locate_model(folder).path == str(folder)
    assert locate_model(folder, gguf_file=file.name).path == str(entry)


def test_commands_take_gguf_files(file, entry, capsys):
    assert cli.main(["doctor", str(file), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["model"] == "tiny.Q8_0"
    rows = ["store", "estimate", str(ROOT / "examples/lighthouse/great_lens.md"), "--chunk-tokens", "50"]
    printed = []
    for model in ([str(file)], [str(file.parent), "--gguf-file", file.name]):
        assert cli.main([*rows, "--model", *model, "--json"]) == 0
        printed.append(json.loads(capsys.readouterr().out))
    assert printed[0] == printed[1] and printed[0]["documents"] > 1


@pytest.mark.parametrize(
    ("model", "gguf_file", "error", "message"),
    [
        ("{}/absent.gguf", None, ModelLoadError, "there is no file .*absent.gguf"),
        ("absent.gguf", None, ModelLoadError, "there is no file 'absent.gguf'"),
        ("{}/several", None, ModelLoadError, r"several GGUF files; name one with gguf_file: a.gguf, b.gguf"),
        ("{}/several", "c.gguf", ModelLoadError, "there is no file 'c.gguf' in the folder"),
        ("{}/several/a.gguf", "a.gguf", InvalidInputError, "model is already a file"),
        (None, "a.gguf", InvalidInputError, "the folder or hub name that contains it is missing"),
        ("{}/several", 3, InvalidInputError, "gguf_file is 3"),
        ("{}/several/kvfusion.json", None, ModelLoadError, "is not a GGUF file"),
    ],
)
def test_unusable_names_are_rejected(model, gguf_file, error, message, tmp_path):
    (tmp_path / "several").mkdir()
    for name in ("a.gguf", "b.gguf", "kvfusion.json"):
        (tmp_path / "several" / name).write_bytes(b"{}")
    model = None if model is None else model.format(tmp_path)
    with pytest.raises(error, match=message):
        locate_model(model, gguf_file=gguf_file)


def test_model_kwargs_must_not_contain_gguf_file(file, entry):
    with pytest.raises(InvalidInputError, match="model_kwargs contains 'gguf_file'"):
        KVFusionGenerator.from_pretrained(file, model_kwargs={"gguf_file": "x"})


# Files that cannot be converted


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("feed_forward_length", 4_000_000_000),
        ("embedding_length", 4_000_000_000),
        ("block_count", 1000),
        ("attention.head_count", 1 << 20),
        ("rope.dimension_count", 1 << 30),
        ("vocab_size", 4_000_000_000),
    ],
)
def test_metadata_of_a_larger_model_is_rejected_before_memory_is_allocated(name, value, names, tmp_path):
    path = write_gguf(tmp_path / "m.gguf", metadata={f"llama.{name}": value})
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ModelLoadError, match=r"'m\.gguf'"):
        converted_folder(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1 << 20  # KiB
    assert names() == []


@settings(max_examples=10)
@given(at=st.integers(4, 12_000), value=st.integers(0, 255))
def test_changed_header_byte_is_our_error_or_another_model(at, value, file, tmp_path_factory):
    path = tmp_path_factory.mktemp("changed") / "m.gguf"
    data = bytearray(file.read_bytes())
    data[at] = value
    path.write_bytes(data)
    try:
        folder = converted_folder(path)
    except ModelLoadError:
        return
    AutoTokenizer.from_pretrained(folder)
    state(folder)


def test_missing_tensors_are_named(tmp_path):
    path = write_gguf(tmp_path / "m.gguf", tiny_gguf.model(tied=False), without="blk.1.ffn_up.weight")
    with pytest.raises(ModelLoadError, match=r"'m\.gguf'"):
        converted_folder(path)
