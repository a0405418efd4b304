"""GGUF files: converted once, bit for bit as transformers reads them; nothing broken is trusted."""

import json
import logging
import os
import resource
import shutil
import signal
import struct
import subprocess
import sys
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import tiny
import tiny_gguf
import torch
from gguf import GGMLQuantizationType
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from tiny_gguf import ARCHITECTURE, field, header, tensor, text, write_gguf
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from kvfusion_rag import InvalidInputError, KVFusionGenerator, ModelLoadError, cli
from kvfusion_rag.model.gguf import convert as gguf_convert
from kvfusion_rag.model.gguf import converted as gguf_cache
from kvfusion_rag.model.gguf.converted import MANIFEST, converted_folder
from kvfusion_rag.model.gguf.header import MAX_ARRAY_ITEMS, MAX_ITEM_BYTES, MAX_TENSORS, read_header
from kvfusion_rag.model.location import locate_model

ROOT = Path(__file__).parent.parent.parent
F32, Q8_0 = GGMLQuantizationType.F32, GGMLQuantizationType.Q8_0


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch) -> Path:
    """An empty cache; the folder is made by the first conversion."""
    monkeypatch.setenv("KVFUSION_HOME", str(tmp_path / "home"))
    return tmp_path / "home" / "gguf"


@pytest.fixture(scope="module")
def file(tmp_path_factory) -> Path:
    """A GGUF file beside nothing else."""
    return write_gguf(tmp_path_factory.mktemp("model") / "tiny.Q8_0.gguf", kind=Q8_0)


@pytest.fixture(scope="module")
def converted(file, tmp_path_factory) -> Path:
    """Its converted folder, to be copied from."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KVFUSION_HOME", str(tmp_path_factory.mktemp("converted")))
        return converted_folder(file)


@pytest.fixture
def conversions(monkeypatch) -> list[str]:
    """Names of the files that are converted from now on."""
    names: list[str] = []
    convert = gguf_convert.convert

    def counted(file: Path, *args: object) -> None:
        names.append(file.name)
        convert(file, *args)

    monkeypatch.setattr(gguf_convert, "convert", counted)
    return names


def state(folder: Path, **options) -> dict[str, torch.Tensor]:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options).state_dict()


def require_equal(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, weights in theirs.items():
        assert torch.equal(ours[name], weights), name


def entries(home: Path) -> list[str]:
    """What is in the cache, but for locks and digests."""
    return sorted(p.name for p in home.glob("*") if p.suffix != ".lock" and p.name != "digests")


# What is converted


@pytest.mark.parametrize("kind", [F32, GGMLQuantizationType.F16, Q8_0, GGMLQuantizationType.Q4_1], ids=str)
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_weights_are_those_of_transformers_own_reader(kind, tied, tmp_path):
    network = tiny_gguf.model(tied=tied)
    path = write_gguf(tmp_path / "m.gguf", network, kind=kind)
    ours = state(converted_folder(path))
    require_equal(ours, state(tmp_path, gguf_file=path.name))
    if kind == F32:
        require_equal(ours, network.state_dict())


def test_the_folder_is_an_ordinary_model_with_one_copy_of_tied_weights(converted):
    weights = load_file(converted / "model.safetensors")
    assert "lm_head.weight" not in weights
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}
    assert "quantization_config" not in json.loads((converted / "config.json").read_text())
    assert AutoConfig.from_pretrained(converted).tie_word_embeddings


def test_large_models_are_kept_in_bfloat16(file, monkeypatch):
    monkeypatch.setattr(gguf_convert, "FLOAT32_BELOW", 1000)
    weights = load_file(converted_folder(file) / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}


def test_the_tokenizer_keeps_template_special_tokens_and_ids(tmp_path):
    path = write_gguf(tmp_path / "m.gguf", metadata={"tokenizer.ggml.pre": "gpt-2"})
    ours = AutoTokenizer.from_pretrained(converted_folder(path))
    theirs = AutoTokenizer.from_pretrained(tmp_path, gguf_file=path.name)
    original = tiny.tokenizer("byte-bpe")
    assert ours.chat_template == tiny.CHATML
    assert ours.special_tokens_map == theirs.special_tokens_map
    assert ours.added_tokens_decoder.keys() == theirs.added_tokens_decoder.keys()
    for sample in (tiny.WORDS, "<|im_start|>user\nhi<|im_end|>", "<tool_call>"):
        assert ours(sample)["input_ids"] == theirs(sample)["input_ids"] == original(sample)["input_ids"]


def test_digits_are_split_as_the_model_does(tmp_path):
    pieces = {}
    for pre in ("smollm", "gpt-2"):
        path = write_gguf(tmp_path / f"{pre}.gguf", metadata={"tokenizer.ggml.pre": pre})
        backend = AutoTokenizer.from_pretrained(converted_folder(path)).backend_tokenizer
        pieces[pre] = [piece for piece, _ in backend.pre_tokenizer.pre_tokenize_str("in\n\n1874")]
    assert pieces == {"smollm": ["in", "ĊĊ", "1", "8", "7", "4"], "gpt-2": ["in", "Ċ", "Ċ", "1874"]}


def test_an_unknown_split_is_said_once(tmp_path, caplog):
    path = write_gguf(tmp_path / "m.gguf", metadata={"tokenizer.ggml.pre": "new-split"})
    converted_folder(path)
    assert sum("new-split" in record.message for record in caplog.records) == 1


def test_the_end_of_a_turn_ends_an_answer(tmp_path):
    tokens = tiny_gguf.vocabulary()[0]
    end, turn = tokens.index("<|endoftext|>"), tokens.index("<|im_end|>")
    fields = {"tokenizer.ggml.eos_token_id": end, "tokenizer.ggml.eot_token_id": turn}
    path = write_gguf(tmp_path / "m.gguf", metadata=fields)
    assert KVFusionGenerator.from_pretrained(path)._engine.model.backbone.end_ids == {end, turn}


def test_what_lies_beside_the_file_does_not_change_it(file, converted, tmp_path):
    shutil.copy(file, tmp_path / "copy.gguf")
    for name in ("tokenizer.json", "tokenizer_config.json", "config.json", "generation_config.json"):
        (tmp_path / name).write_text("{}")
    copy = converted_folder(tmp_path / "copy.gguf")
    for name in ("tokenizer.json", "tokenizer_config.json", "config.json", "generation_config.json"):
        assert (copy / name).read_text() == (converted / name).read_text()


# Loading


def test_a_file_a_folder_and_a_name_in_it_load_the_same_model(file):
    by_path = KVFusionGenerator.from_pretrained(file)
    for other in (
        KVFusionGenerator.from_pretrained(str(file)),
        KVFusionGenerator.from_pretrained(file.parent),
        KVFusionGenerator.from_pretrained(str(file.parent.parent), gguf_file=f"{file.parent.name}/{file.name}"),
        KVFusionGenerator.from_pretrained(
            file.parent.parent, gguf_file=file.name, model_kwargs={"subfolder": file.parent.name}
        ),
    ):
        assert other.model_id == by_path.model_id == "tiny.Q8_0"
        assert other._engine.model.backbone.weights_digest == by_path._engine.model.backbone.weights_digest
        documents = ["the mill", "two doves"]
        assert other.answer("who?", documents, max_new_tokens=4).token_ids == (
            by_path.answer("who?", documents, max_new_tokens=4).token_ids
        )


def test_settings_beside_the_file_are_honoured(file, tmp_path):
    path = Path(shutil.copy(file, tmp_path))
    (tmp_path / "kvfusion.json").write_text('{"passage_length": 77}')
    assert KVFusionGenerator.from_pretrained(path).settings.passage_length == 77
    assert KVFusionGenerator.from_pretrained(file).settings.passage_length is None


def test_a_decoder_may_be_a_gguf_file(file, tmp_path):
    other = write_gguf(tmp_path / "tuned.gguf", tiny_gguf.model(seed=1))
    tuned = KVFusionGenerator.from_pretrained(file, decoder=other)
    assert tuned._engine.model.decoder.model_id == "tuned" and tuned.model_id == "tiny.Q8_0"


def test_a_hub_repository_with_a_gguf_file(file, tmp_path):
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "hub" / "models--org--repo"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    (repository / "snapshots" / commit).mkdir(parents=True)
    shutil.copy(file, repository / "snapshots" / commit / "m.Q8_0.gguf")
    (repository / "snapshots" / commit / "kvfusion.json").write_text('{"passage_length": 78}')
    options = {"cache_dir": str(tmp_path / "hub"), "local_files_only": True}
    found = KVFusionGenerator.from_pretrained("org/repo", gguf_file="m.Q8_0.gguf", model_kwargs=options)
    assert found.model_id == "m.Q8_0" and found.settings.passage_length == 78
    assert found._engine.model.backbone.revision == commit
    with pytest.raises(ModelLoadError, match=r"cannot load 'other.gguf' of 'org/repo'"):
        KVFusionGenerator.from_pretrained("org/repo", gguf_file="other.gguf", model_kwargs=options)


def test_a_folder_with_weights_of_its_own_is_no_gguf_folder(converted, file, tmp_path):
    folder = Path(shutil.copytree(converted, tmp_path / "model"))
    shutil.copy(file, folder)
    assert locate_model(folder).path == str(folder)
    assert locate_model(folder, gguf_file=file.name).path != str(folder)


def test_commands_take_gguf_files(file, capsys):
    assert cli.main(["doctor", str(file), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["model"] == "tiny.Q8_0"
    rows = ["store", "estimate", str(ROOT / "examples/lighthouse/great_lens.md"), "--chunk-tokens", "50"]
    printed = []
    for model in ([str(file)], [str(file.parent), "--gguf-file", file.name]):
        assert cli.main([*rows, "--model", *model, "--json"]) == 0
        printed.append(json.loads(capsys.readouterr().out))
    assert printed[0] == printed[1] and printed[0]["documents"] > 1


# Once


def test_the_second_load_does_not_convert(file, conversions, caplog):
    first = converted_folder(file)
    assert converted_folder(file) == first and conversions == [file.name]
    assert [record.message for record in caplog.records] == [
        f"converting {file.name!r} once; the result is kept in {first.parent}"
    ]


def test_a_second_load_needs_no_gguf_package(file, monkeypatch):
    past = 1_600_000_000
    os.utime(file, (past, past))
    monkeypatch.setattr(gguf_cache, "RECENT_NS", -(1 << 62))
    folder = converted_folder(file)
    monkeypatch.setitem(sys.modules, "gguf", None)
    assert converted_folder(file) == folder


def test_the_same_bytes_elsewhere_are_the_same_entry(file, conversions, tmp_path):
    copy = Path(shutil.copy(file, tmp_path / "other-name.gguf"))
    assert converted_folder(copy) == converted_folder(file) and len(conversions) == 1


@pytest.mark.parametrize("recent", [0, 1 << 62], ids=["remembered", "too recent to remember"])
def test_changed_bytes_are_another_entry(recent, conversions, monkeypatch, tmp_path):
    monkeypatch.setattr(gguf_cache, "RECENT_NS", recent)
    path = write_gguf(tmp_path / "m.gguf")
    first = converted_folder(path)
    write_gguf(path, tiny_gguf.model(seed=1))
    second = converted_folder(path)
    assert first != second and first.is_dir() and conversions == ["m.gguf"] * 2
    assert state(first)["model.norm.weight"].shape == state(second)["model.norm.weight"].shape
    assert not torch.equal(state(first)["lm_head.weight"], state(second)["lm_head.weight"])


def test_a_file_that_changes_during_conversion_is_refused(home, monkeypatch, tmp_path):
    path = write_gguf(tmp_path / "m.gguf")
    convert = gguf_convert.convert

    def change(file: Path, *args: object) -> None:
        convert(file, *args)
        write_gguf(path, tiny_gguf.model(seed=1))

    monkeypatch.setattr(gguf_convert, "convert", change)
    with pytest.raises(ModelLoadError, match="changed while it was read"):
        converted_folder(path)
    assert entries(home) == []


def test_threads_that_load_at_once_convert_once(file, conversions):
    with ThreadPoolExecutor(4) as pool:
        assert len(set(pool.map(converted_folder, [file] * 4))) == 1
    assert len(conversions) == 1


def test_stderr_is_put_back_and_was_quiet(file, capfd):
    before = sys.stderr
    converted_folder(file)
    assert sys.stderr is before
    assert "Converting" not in capfd.readouterr().err


# Damage


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


DAMAGES = {
    "no manifest": lambda entry: (entry / MANIFEST).unlink(),
    "torn manifest": lambda entry: (entry / MANIFEST).write_text("{"),
    "foreign manifest": lambda entry: (entry / MANIFEST).write_text("[]"),
    "no weights": lambda entry: (entry / "model.safetensors").unlink(),
    "torn weights": lambda entry: os.truncate(entry / "model.safetensors", 1000),
    "changed header": lambda entry: flip(entry / "model.safetensors", 20),
    "changed weight": lambda entry: flip(entry / "model.safetensors", -5),
    "changed configuration": lambda entry: (entry / "config.json").write_text("{}"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_entry_is_rebuilt_with_one_warning(damage, file, caplog):
    entry = converted_folder(file)
    whole = {path.name: path.read_bytes() for path in entry.iterdir() if path.name != MANIFEST}
    DAMAGES[damage](entry)
    caplog.clear()
    assert converted_folder(file) == entry
    assert sum("is damaged" in record.message for record in caplog.records) == 1
    assert {path.name: path.read_bytes() for path in entry.iterdir() if path.name != MANIFEST} == whole
    caplog.clear()
    assert converted_folder(file) == entry and not caplog.records


def test_damage_far_behind_the_beginning_is_noticed(file, monkeypatch, caplog):
    monkeypatch.setattr(gguf_cache, "HEAD_BYTES", 100)
    entry = converted_folder(file)
    flip(entry / "model.safetensors", -5)
    converted_folder(file)
    assert "is damaged" in caplog.text


def test_a_copied_cache_is_trusted_after_it_was_read(file, conversions, monkeypatch, tmp_path):
    entry = converted_folder(file)
    moved = tmp_path / "copied" / "gguf" / entry.name
    shutil.copytree(entry, moved, copy_function=shutil.copyfile)
    monkeypatch.setenv("KVFUSION_HOME", str(tmp_path / "copied"))
    assert converted_folder(file) == moved and len(conversions) == 1
    recorded = json.loads((moved / MANIFEST).read_text())["model.safetensors"]["mtime_ns"]
    assert (moved / "model.safetensors").stat().st_mtime_ns == recorded


KILLED = """
import sys, time
from pathlib import Path
from kvfusion_rag.model.gguf import converted as gguf_cache
def stop(*args):
    print("now", flush=True)
    time.sleep(600)
setattr(gguf_cache, sys.argv[2], stop)
gguf_cache.converted_folder(Path(sys.argv[1]))
"""


@pytest.mark.parametrize("step", ["_seal", "_sync_folder"])
def test_a_killed_conversion_leaves_nothing_that_is_trusted(step, file, home, caplog):
    child = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(file), step], stdout=subprocess.PIPE, cwd=ROOT, text=True
    )
    assert child.stdout is not None and child.stdout.readline() == "now\n"
    child.send_signal(signal.SIGKILL)
    child.wait()
    child.stdout.close()
    (leftover,) = entries(home)
    assert leftover.endswith(".tmp") and any((home / leftover).iterdir())
    entry = converted_folder(file)
    assert entries(home) == [entry.name] and "is damaged" not in caplog.text
    require_equal(state(entry), state(file.parent, gguf_file=file.name))


def test_leftovers_of_other_files_are_removed_unless_they_are_being_built(file, home):
    for name in ("dead-v1", "alive-v1"):
        (home / f"{name}.tmp").mkdir(parents=True)
    with gguf_cache.FileLock(home / "alive-v1.lock"):
        entry = converted_folder(file)
    assert entries(home) == sorted(["alive-v1.tmp", entry.name])


FULL = """
import resource, sys
from pathlib import Path
from kvfusion_rag import ModelLoadError
from kvfusion_rag.model.gguf import converted as gguf_cache
import kvfusion_rag.model.gguf.convert
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
try:
    gguf_cache.converted_folder(Path(sys.argv[1]))
except ModelLoadError as error:
    print(error)
"""


def test_a_disk_that_fills_up_is_one_sentence_and_leaves_nothing(file, home):
    out = subprocess.run(
        [sys.executable, "-c", FULL, str(file)], capture_output=True, text=True, cwd=ROOT, check=True
    ).stdout
    assert out.startswith(f"the converted {file.name!r} cannot be written to {str(home)!r}: ")
    assert "KVFUSION_HOME" in out and out.count("\n") == 1
    assert entries(home) == []
    assert converted_folder(file).is_dir()


def test_too_little_room_is_known_before_the_work(file, home, conversions, monkeypatch):
    usage = shutil.disk_usage(file.parent)
    monkeypatch.setattr(gguf_cache.shutil, "disk_usage", lambda place: usage._replace(free=1000))
    with pytest.raises(ModelLoadError, match=r"needs 0\.1 GB in .* but 0\.0 GB are free; .*KVFUSION_HOME"):
        converted_folder(file)
    assert entries(home) == [] and not conversions


def test_a_cache_that_cannot_be_written_to(file, monkeypatch, tmp_path):
    (tmp_path / "taken").write_text("a file")
    monkeypatch.setenv("KVFUSION_HOME", str(tmp_path / "taken"))
    with pytest.raises(
        ModelLoadError, match=r"cannot be written to .*taken.*; free space there, or set KVFUSION_HOME"
    ):
        converted_folder(file)


# Files that are not whole, or not honest


def test_truncated_files_are_refused_wherever_they_end(file, home, tmp_path):
    data = file.read_bytes()
    path = tmp_path / "cut.gguf"
    for end in [*range(0, 300, 7), *range(300, len(data), 9973), len(data) - 1]:
        path.write_bytes(data[:end])
        with pytest.raises(ModelLoadError, match=r"'cut.gguf' is (not a GGUF file|incomplete)"):
            converted_folder(path)
    assert entries(home) == []
    path.write_bytes(data)
    assert converted_folder(path).is_dir()


HOSTILE = {
    "empty": (b"", "is not a GGUF file"),
    "foreign": (b"PK\x03\x04" + b"\0" * 100, "is not a GGUF file"),
    "old version": (header(version=1), "GGUF version 1"),
    "big-endian": (header(version=3 << 24), "GGUF version 50331648"),
    "tensor count": (header(ARCHITECTURE, counts=(1 << 63, 1)), f"more than {MAX_TENSORS} are not read"),
    "field count": (header(ARCHITECTURE, counts=(0, 1 << 63)), "is incomplete|is damaged"),
    "key length": (header(struct.pack("<Q", 1 << 60)), "is damaged: a metadata key has"),
    "text length": (header(field("k", 8, struct.pack("<Q", 1 << 50))), "is damaged: k has"),
    "text beyond the end": (header(field("k", 8, struct.pack("<Q", 1 << 20))), "is incomplete"),
    "text that is not UTF-8": (header(field("k", 8, text(b"\xff"))), "is not UTF-8"),
    "type": (header(field("k", 99, b"")), "unknown type 99"),
    "array length": (header(field("k", 9, struct.pack("<IQ", 0, 1 << 60))), f"more than {MAX_ARRAY_ITEMS} items"),
    "array beyond the end": (header(field("k", 9, struct.pack("<IQ", 0, 1 << 20))), "is incomplete"),
    "array of arrays": (header(field("k", 9, struct.pack("<IQ", 9, 1))), "array of the type 9"),
    "item length": (
        header(field("k", 9, struct.pack("<IQ", 8, 1) + text(b"x" * (MAX_ITEM_BYTES + 1)))),
        f"more than {MAX_ITEM_BYTES} are not read",
    ),
    "no architecture": (header(field("k", 0, b"\1")), "names no architecture"),
    "layers": (
        header(ARCHITECTURE, field("llama.block_count", 4, struct.pack("<I", 1 << 31))),
        "has a block_count of 2147483648",
    ),
    "part": (header(ARCHITECTURE, field("split.count", 2, struct.pack("<H", 3))), "is one of 3 parts.*--merge"),
    "alignment": (header(ARCHITECTURE, field("general.alignment", 4, struct.pack("<I", 3))), "has an alignment of 3"),
    "alignment of zero": (
        header(ARCHITECTURE, field("general.alignment", 4, struct.pack("<I", 0))),
        "has an alignment of 0",
    ),
    "alignment as text": (header(ARCHITECTURE, field("general.alignment", 8, text("32"))), "not a 32-bit number"),
    "dimensions": (header(ARCHITECTURE, tensors=(tensor("t", (1,) * 9),)), "has 9 dimensions"),
    "shape of zero": (header(ARCHITECTURE, tensors=(tensor("t", (0,)),)), "not whole blocks"),
    "part of a block": (header(ARCHITECTURE, tensors=(tensor("t", (33,), 8),), data=b"x" * 99), "not whole blocks"),
    "huge shape": (header(ARCHITECTURE, tensors=(tensor("t", (1 << 62, 1 << 62)),)), "is incomplete: tensor 't'"),
    "format": (header(ARCHITECTURE, tensors=(tensor("t", (4,), 999),)), "in the unknown format 999"),
    "offset": (
        header(ARCHITECTURE, tensors=(tensor("t", (4,), offset=1 << 62),), data=b"x" * 16),
        "is incomplete: tensor 't'",
    ),
    "unaligned": (header(ARCHITECTURE, tensors=(tensor("t", (4,), offset=8),), data=b"x" * 64), "or is not aligned"),
    "overlap": (
        header(ARCHITECTURE, tensors=(tensor("t", (16,)), tensor("u", (8,), offset=32)), data=b"x" * 64),
        "overlaps another",
    ),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_headers_are_refused_in_little_memory(case, home, tmp_path):
    data, message = HOSTILE[case]
    path = tmp_path / "bad.gguf"
    path.write_bytes(data)
    tracemalloc.start()
    try:
        with pytest.raises(ModelLoadError, match=f"^'bad.gguf' .*({message})"):
            converted_folder(path)
        assert tracemalloc.get_traced_memory()[1] < 32 << 20
    finally:
        tracemalloc.stop()
    assert entries(home) == []


def test_a_header_that_is_too_long_is_not_read(monkeypatch, file):
    monkeypatch.setattr("kvfusion_rag.model.gguf.header.MAX_HEADER_BYTES", 1000)
    with pytest.raises(ModelLoadError, match="has a header of more than"):
        read_header(file)


@pytest.mark.parametrize(
    "metadata",
    [
        {"llama.feed_forward_length": 4_000_000_000},
        {"llama.embedding_length": 4_000_000_000},
        {"llama.block_count": 1000},
        {"llama.attention.head_count": 1 << 20},
        {"llama.rope.dimension_count": 1 << 30},
        {"llama.vocab_size": 4_000_000_000},
    ],
    ids=lambda metadata: next(iter(metadata)),
)
def test_metadata_of_a_larger_model_are_refused_before_memory_is_taken(metadata, home, tmp_path):
    path = write_gguf(tmp_path / "m.gguf", metadata=metadata)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ModelLoadError, match=r"'m\.gguf'"):
        converted_folder(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1 << 20  # KiB
    assert entries(home) == []


@settings(max_examples=25)
@given(at=st.integers(4, 12_000), value=st.integers(0, 255))
def test_any_changed_byte_of_the_header_is_an_error_of_ours_or_another_model(at, value, file, tmp_path_factory):
    folder = tmp_path_factory.mktemp("changed")
    data = bytearray(file.read_bytes())
    data[at] = value
    (folder / "m.gguf").write_bytes(data)
    try:
        entry = converted_folder(folder / "m.gguf")
    except ModelLoadError:
        return
    AutoTokenizer.from_pretrained(entry)
    state(entry)


def test_missing_tensors_are_named(tmp_path):
    network = tiny_gguf.model(tied=False)
    path = write_gguf(tmp_path / "m.gguf", network, without="blk.1.ffn_up.weight")
    with pytest.raises(ModelLoadError, match=r"'m\.gguf'"):
        converted_folder(path)


def test_an_architecture_that_transformers_cannot_read(tmp_path):
    path = tmp_path / "m.gguf"
    path.write_bytes(header(field("general.architecture", 8, text("starcoder9"))))
    with pytest.raises(ModelLoadError, match=r"configuration of 'm.gguf': .*starcoder9 is not supported"):
        converted_folder(path)


def test_no_gguf_package(file, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ModelLoadError, match="need the package gguf, which is not installed: pip install gguf"):
        converted_folder(file)


@pytest.mark.parametrize(
    ("model", "gguf_file", "error", "message"),
    [
        ("{}/absent.gguf", None, ModelLoadError, "there is no file .*absent.gguf"),
        ("absent.gguf", None, ModelLoadError, "there is no file 'absent.gguf'"),
        ("{}/several", None, ModelLoadError, r"several GGUF files; name one with gguf_file: a.gguf, b.gguf"),
        ("{}/several", "c.gguf", ModelLoadError, "there is no file 'c.gguf' in the folder"),
        ("{}/several/a.gguf", "a.gguf", InvalidInputError, "model is a file already"),
        (None, "a.gguf", InvalidInputError, "the folder or hub name that has it is not given"),
        ("{}/several", 3, InvalidInputError, "gguf_file is 3"),
        ("{}/several/kvfusion.json", None, ModelLoadError, "is not a GGUF file"),
    ],
)
def test_names_that_lead_nowhere(model, gguf_file, error, message, tmp_path):
    (tmp_path / "several").mkdir()
    for name in ("a.gguf", "b.gguf", "kvfusion.json"):
        (tmp_path / "several" / name).write_bytes(b"{}")
    model = None if model is None else model.format(tmp_path)
    with pytest.raises(error, match=message):
        locate_model(model, gguf_file=gguf_file)


def test_gguf_file_has_an_argument_of_its_own(file):
    with pytest.raises(InvalidInputError, match="model_kwargs holds 'gguf_file'"):
        KVFusionGenerator.from_pretrained(file, model_kwargs={"gguf_file": "x"})


def test_digests_are_remembered_only_for_files_that_rest(file, home, monkeypatch, caplog):
    caplog.set_level(logging.ERROR)
    monkeypatch.setattr(gguf_cache, "RECENT_NS", 1 << 62)
    converted_folder(file)
    assert not list(home.glob("digests/*"))
    monkeypatch.setattr(gguf_cache, "RECENT_NS", -(1 << 62))
    converted_folder(file)
    (memory,) = home.glob("digests/*")
    memory.write_text("{")  # torn
    assert converted_folder(file).is_dir()
