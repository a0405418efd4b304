"""Version bounds match the tested versions, and incompatible libraries raise one error."""

from __future__ import annotations

import re
import tomllib
from importlib.metadata import version
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version
from peft import LoraConfig
from tiny import backbone
from tiny_training import rows

from kvfusion_rag import KVFusionGenerator, MissingDependencyError, ModelLoadError
from kvfusion_rag.cli import main
from kvfusion_rag.data.rows import write_rows
from kvfusion_rag.model.adapters.libraries import ADAPTER_LIBRARIES, require_adapter_libraries
from kvfusion_rag.training import TrainingConfig, train

ROOT = Path(__file__).parent.parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
NOT_RUN = {"torch"}  # only one version of torch is tested
UNPINNED = {"ipykernel", "ipywidgets", "s3fs"}  # not part of the tested versions; s3fs needs the fsspec of its date
UNCAPPED = {"fsspec", *UNPINNED}  # versions of fsspec are dates
TEST_TOOLS = {
    "pytest", "pytest-asyncio", "pytest-timeout", "pytest-xdist", "hypothesis", "jsonschema", "nbclient", "packaging",
}  # fmt: skip


def requirements() -> dict[str, Requirement]:
    """Return every library that the package or a framework test needs, without tools."""
    extras = PROJECT["optional-dependencies"]
    used = [name for name in extras if name not in ("dev", "docs")]
    lines = [*PROJECT["dependencies"], *(line for name in used for line in extras[name])]
    made = [Requirement(line) for line in lines]
    return {r.name: r for r in made if r.name not in TEST_TOOLS | {"kvfusion-rag"}}


def pins(file: str) -> dict[str, Version]:
    lines = [line.split("#")[0].strip() for line in (ROOT / file).read_text().splitlines()]
    return {canonicalize_name(n): Version(v) for n, _, v in (line.partition("==") for line in lines if line)}


def lower_bound(requirement: Requirement) -> Version:
    return next(Version(s.version) for s in requirement.specifier if s.operator == ">=")


@pytest.mark.parametrize("name", sorted(requirements().keys() - UNPINNED))
def test_lower_bound_is_the_lowest_tested_version(name):
    pinned, bound = pins("tests/versions/lowest.txt")[name], lower_bound(requirements()[name])
    assert pinned == bound or (name in NOT_RUN and pinned > bound)


@pytest.mark.parametrize("file", ["tests/versions/lowest.txt", "tests/versions/newest.txt", "constraints.txt"])
def test_tested_versions_are_within_the_bounds(file):
    bounds, tested = requirements(), pins(file)
    outside = {n: str(v) for n, v in tested.items() if n in bounds and not bounds[n].specifier.contains(v)}
    assert not outside


@pytest.mark.parametrize("name", sorted(requirements().keys() - UNCAPPED))
def test_upper_bound_is_above_the_newest_tested_version(name):
    bound = next(Version(s.version) for s in requirements()[name].specifier if s.operator == "<")
    assert pins("tests/versions/newest.txt")[name] < bound


def test_adapter_bounds_are_the_declared_bounds():
    declared = {r.name: r.specifier for r in requirements().values() if r.name in ADAPTER_LIBRARIES}
    assert declared == {name: Requirement(name + bounds).specifier for name, bounds in ADAPTER_LIBRARIES.items()}


@pytest.fixture
def incompatible(monkeypatch) -> list[str]:
    """Let transformers require a newer peft, and return what the error must contain."""
    monkeypatch.setattr("transformers.integrations.peft.MIN_PEFT_VERSION", "99.0")
    needed = (f'"{name}{ADAPTER_LIBRARIES[name]}"' for name in ("transformers", "peft"))
    installed = [f"{name} {version(name)}" for name in ("transformers", "peft")]
    return [*installed, "99.0", "pip install", *needed]


def test_training_command_reports_incompatible_libraries(incompatible, tmp_path, capsys):
    write_rows(tmp_path / "rows.jsonl", rows(2))
    arguments = ["train", tmp_path / "rows.jsonl", "--model", tmp_path / "unread", "--output", tmp_path / "out"]
    assert main([str(argument) for argument in arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert all(part in line for part in incompatible)


def test_adapters_report_incompatible_libraries(incompatible, tmp_path):
    for use in (
        lambda: KVFusionGenerator.from_pretrained(tmp_path, adapter=tmp_path),  # before weights are read
        lambda: backbone("llama").add_adapter(LoraConfig(target_modules=["q_proj"])),
    ):
        with pytest.raises(MissingDependencyError) as raised:
            use()
        assert all(part in str(raised.value) for part in incompatible)


def test_full_training_does_not_need_a_compatible_peft(incompatible, tmp_path):
    with pytest.raises(ModelLoadError):
        train(rows(2), output=tmp_path / "out", model=tmp_path / "unread", config=TrainingConfig(full=True))


def test_incompatible_torchao_is_named_too(monkeypatch):
    def reject() -> bool:
        raise ImportError("only versions above 99.0 are supported")

    monkeypatch.setattr("peft.import_utils.is_torchao_available", reject)
    with pytest.raises(MissingDependencyError, match=rf"torchao {re.escape(version('torchao'))}.*99\.0.*torchao>="):
        require_adapter_libraries()
