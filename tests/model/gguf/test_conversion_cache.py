"""The cache of converted GGUF files: each file is converted once, and damaged or incomplete folders are not used."""

import errno
import json
import logging
import os
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import tiny_gguf
from tiny_gguf import write_gguf

from kvfusion_rag import ModelLoadError
from kvfusion_rag.model.gguf import conversion_cache as gguf_cache
from kvfusion_rag.model.gguf import convert as gguf_convert
from kvfusion_rag.model.gguf.conversion_cache import MANIFEST, converted_folder

ALWAYS_RECENT, NEVER_RECENT = 1 << 62, -(1 << 62)


def test_second_load_does_not_convert(file, conversions, caplog):
    first = converted_folder(file)
    assert converted_folder(file) == first and conversions == [file.name]
    assert [record.message for record in caplog.records] == [
        f"converting {file.name!r} once; the result is kept in {first.parent}"
    ]


def test_second_load_does_not_need_the_gguf_package(file, conversions, monkeypatch):
    os.utime(file, (1_600_000_000, 1_600_000_000))
    monkeypatch.setattr(gguf_cache, "RECENT_NS", NEVER_RECENT)
    folder = converted_folder(file)
    monkeypatch.setitem(sys.modules, "gguf", None)
    assert converted_folder(file) == folder
    shutil.rmtree(folder)
    with pytest.raises(ModelLoadError, match="need the package gguf, which is not installed; run: pip install gguf"):
        converted_folder(file)


def test_same_bytes_elsewhere_share_the_folder(file, conversions, tmp_path):
    copy = Path(shutil.copy(file, tmp_path / "other-name.gguf"))
    assert converted_folder(copy) == converted_folder(file) and len(conversions) == 1


@pytest.mark.parametrize("recent", [0, ALWAYS_RECENT], ids=["digest remembered", "too recent to remember"])
def test_changed_bytes_have_another_folder(recent, conversions, monkeypatch, tmp_path):
    monkeypatch.setattr(gguf_cache, "RECENT_NS", recent)
    path = write_gguf(tmp_path / "m.gguf")
    first = converted_folder(path)
    second = converted_folder(write_gguf(path, tiny_gguf.model(seed=1)))
    assert first != second and first.is_dir() and conversions == ["m.gguf"] * 2


def test_file_that_changes_during_conversion_is_rejected(names, conversions, monkeypatch, tmp_path):
    path = write_gguf(tmp_path / "m.gguf")
    copy = gguf_convert.convert

    def change(*args, **options) -> None:
        copy(*args, **options)
        write_gguf(path, tiny_gguf.model(seed=1))

    monkeypatch.setattr(gguf_convert, "convert", change)
    with pytest.raises(ModelLoadError, match="changed while it was read"):
        converted_folder(path)
    assert names() == []


def test_concurrent_loads_convert_once(file, conversions):
    with ThreadPoolExecutor(4) as pool:
        assert len(set(pool.map(converted_folder, [file] * 4))) == 1
    assert len(conversions) == 1


# Damage


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


DAMAGES = {
    "no manifest": lambda entry: (entry / MANIFEST).unlink(),
    "truncated manifest": lambda entry: (entry / MANIFEST).write_text("{"),
    "foreign manifest": lambda entry: (entry / MANIFEST).write_text("[]"),
    "no weights": lambda entry: (entry / "model.safetensors").unlink(),
    "truncated weights": lambda entry: os.truncate(entry / "model.safetensors", 1000),
    "changed header": lambda entry: flip(entry / "model.safetensors", 20),
    "changed weight": lambda entry: flip(entry / "model.safetensors", -5),
    "changed configuration": lambda entry: (entry / "config.json").write_text("{}"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_folder_is_rebuilt_with_one_warning(damage, file, entry, converted, conversions, caplog):
    DAMAGES[damage](entry)
    assert converted_folder(file) == entry
    assert sum("is damaged" in record.message for record in caplog.records) == 1
    for path in converted.iterdir():
        assert path.name == MANIFEST or (entry / path.name).read_bytes() == path.read_bytes()
    caplog.clear()
    assert converted_folder(file) == entry and not caplog.records


def test_damage_behind_the_head_is_noticed(file, conversions, monkeypatch, caplog):
    monkeypatch.setattr(gguf_cache, "HEAD_BYTES", 100)
    flip(converted_folder(file) / "model.safetensors", -5)
    converted_folder(file)
    assert "is damaged" in caplog.text


def test_copied_cache_is_used_after_a_full_check(file, entry, conversions, monkeypatch, tmp_path):
    moved = tmp_path / "copied" / "gguf" / entry.name
    shutil.copytree(entry, moved, copy_function=shutil.copyfile)
    monkeypatch.setenv("KVFUSION_HOME", str(tmp_path / "copied"))
    assert converted_folder(file) == moved and not conversions
    recorded = json.loads((moved / MANIFEST).read_text())["model.safetensors"]["mtime_ns"]
    assert (moved / "model.safetensors").stat().st_mtime_ns == recorded


@pytest.mark.parametrize("missing", [[MANIFEST], []], ids=["before the manifest", "before the move"])
def test_leftovers_of_a_killed_conversion_are_not_used(missing, file, cache, converted, conversions, names, caplog):
    leftover = cache / f"{converted.name}.tmp"
    shutil.copytree(converted, leftover, ignore=shutil.ignore_patterns(*missing))
    assert converted_folder(file) == cache / converted.name
    assert names() == [converted.name] and conversions and "is damaged" not in caplog.text


def test_leftovers_of_other_files_are_removed_unless_they_are_in_progress(file, cache, conversions, names):
    for name in ("dead-v1", "alive-v1"):
        (cache / f"{name}.tmp").mkdir(parents=True)
    with gguf_cache.FileLock(cache / "alive-v1.lock"):
        entry = converted_folder(file)
    assert names() == sorted(["alive-v1.tmp", entry.name])


# Faults of the disk


def test_full_disk_is_one_error_and_leaves_nothing(file, cache, names, monkeypatch):
    def fill(file: Path, header: object, folder: Path, *, weights: bool) -> None:
        (folder / "config.json").write_text("{}")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(gguf_convert, "convert", fill)
    with pytest.raises(ModelLoadError, match=r"cannot be written to .*No space left.*KVFUSION_HOME") as raised:
        converted_folder(file)
    assert str(raised.value).startswith(f"the converted {file.name!r} cannot be written to {str(cache)!r}: ")
    assert "\n" not in str(raised.value) and names() == []


def test_too_little_space_is_reported_before_conversion(file, names, conversions, monkeypatch):
    usage = shutil.disk_usage(file.parent)
    monkeypatch.setattr(gguf_cache.shutil, "disk_usage", lambda folder: usage._replace(free=1000))
    with pytest.raises(ModelLoadError, match=r"needs 0\.1 GB in .* but 0\.0 GB are free; .*KVFUSION_HOME"):
        converted_folder(file)
    assert names() == [] and not conversions


def test_cache_that_cannot_be_written_to_is_one_error(file, monkeypatch, tmp_path):
    (tmp_path / "taken").write_text("a file")
    monkeypatch.setenv("KVFUSION_HOME", str(tmp_path / "taken"))
    with pytest.raises(
        ModelLoadError, match=r"cannot be written to .*taken.*; free space there, or set KVFUSION_HOME"
    ):
        converted_folder(file)


def test_digests_of_recent_files_are_not_remembered(file, cache, conversions, monkeypatch, caplog):
    caplog.set_level(logging.ERROR)
    monkeypatch.setattr(gguf_cache, "RECENT_NS", ALWAYS_RECENT)
    converted_folder(file)
    assert not list(cache.glob("digests/*"))
    monkeypatch.setattr(gguf_cache, "RECENT_NS", NEVER_RECENT)
    converted_folder(file)
    (remembered,) = cache.glob("digests/*")
    remembered.write_text("{")  # truncated
    assert converted_folder(file).is_dir()


def test_folder_without_weights_has_the_same_tokenizer_and_ends(tmp_path, monkeypatch):
    monkeypatch.setenv("KVFUSION_HOME", str(tmp_path / "home"))
    file = write_gguf(tmp_path / "m.gguf")
    whole, text = converted_folder(file), converted_folder(file, weights=False)
    assert not list(text.glob("*.safetensors"))
    for name in ("tokenizer.json", "config.json"):
        ours, expected = (json.loads((folder / name).read_text()) for folder in (text, whole))
        assert {key: value for key, value in ours.items() if key in expected} == ours
    ends = [json.loads((folder / "generation_config.json").read_text())["eos_token_id"] for folder in (text, whole)]
    assert ends[0] == ends[1]
