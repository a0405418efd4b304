"""Bounds of versions: what is declared is what is tested, and libraries that do not fit each other are one error."""

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
from kvfusion_rag.model.adapters import ADAPTER_LIBRARIES, require_adapter_libraries
from kvfusion_rag.training import TrainingConfig, train

ROOT = Path(__file__).parent.parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
NOT_RUN = {"torch"}  # one version of torch is tested
SHOWN_IN = {"ipykernel", "ipywidgets"}  # notebooks, which are no part of the versions that are tested
UNCAPPED = {"fsspec", *SHOWN_IN}  # versions of fsspec are dates
TEST_TOOLS = {"pytest", "pytest-asyncio", "pytest-timeout", "pytest-xdist", "hypothesis", "nbmake", "packaging"}


def requirements() -> dict[str, Requirement]:
    """Every library that the package or a test of a framework needs, without tools."""
    extras = PROJECT["optional-dependencies"]
    lines = [
        *PROJECT["dependencies"],
        *(line for name in extras if name not in ("dev", "docs") for line in extras[name]),
    ]
    made = [Requirement(line) for line in lines]
    return {r.name: r for r in made if r.name not in TEST_TOOLS | {"kvfusion-rag"}}


def pins(file: str) -> dict[str, Version]:
    lines = [line.split("#")[0].strip() for line in (ROOT / file).read_text().splitlines()]
    return {canonicalize_name(n): Version(v) for n, _, v in (line.partition("==") for line in lines if line)}


def lower_bound(requirement: Requirement) -> Version:
    return next(Version(s.version) for s in requirement.specifier if s.operator == ">=")


@pytest.mark.parametrize("name", sorted(requirements().keys() - SHOWN_IN))
def test_the_lower_bound_is_what_the_lowest_environment_has(name):
    pinned, bound = pins("tests/versions/lowest.txt")[name], lower_bound(requirements()[name])
    assert pinned == bound or (name in NOT_RUN and pinned > bound)


@pytest.mark.parametrize("file", ["tests/versions/lowest.txt", "tests/versions/newest.txt", "constraints.txt"])
def test_what_is_tested_lies_within_the_bounds(file):
    bounds, tested = requirements(), pins(file)
    outside = {n: str(v) for n, v in tested.items() if n in bounds and not bounds[n].specifier.contains(v)}
    assert not outside


@pytest.mark.parametrize("name", sorted(requirements().keys() - UNCAPPED))
def test_the_upper_bound_is_above_what_the_newest_environment_has(name):
    bound = next(Version(s.version) for s in requirements()[name].specifier if s.operator == "<")
    assert pins("tests/versions/newest.txt")[name] < bound


def test_the_command_that_mends_adapters_names_the_declared_bounds():
    declared = {r.name: r.specifier for r in requirements().values() if r.name in ADAPTER_LIBRARIES}
    assert declared == {name: Requirement(name + bounds).specifier for name, bounds in ADAPTER_LIBRARIES.items()}


@pytest.fixture
def misfit(monkeypatch) -> list[str]:
    """A transformers that wants a newer peft than is installed; returns what an error must name."""
    monkeypatch.setattr("transformers.integrations.peft.MIN_PEFT_VERSION", "99.0")
    mended = (f'"{name}{ADAPTER_LIBRARIES[name]}"' for name in ("transformers", "peft"))
    named = [f"{name} {version(name)}" for name in ("transformers", "peft")]
    return [*named, "99.0", "pip install", *mended]


def test_training_with_a_peft_that_transformers_refuses_is_one_error(misfit, tmp_path, capsys):
    write_rows(tmp_path / "rows.jsonl", rows(2))
    arguments = ["train", tmp_path / "rows.jsonl", "--model", tmp_path / "unread", "--output", tmp_path / "out"]
    assert main([str(argument) for argument in arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert all(part in line for part in misfit)


def test_an_adapter_with_a_peft_that_transformers_refuses_is_one_error(misfit, tmp_path):
    with pytest.raises(MissingDependencyError) as raised:  # before weights are read
        KVFusionGenerator.from_pretrained(tmp_path, adapter=tmp_path)
    assert all(part in str(raised.value) for part in misfit)


def test_a_fresh_adapter_with_a_peft_that_transformers_refuses_is_one_error(misfit):
    with pytest.raises(MissingDependencyError) as raised:
        backbone("llama").add_adapter(LoraConfig(target_modules=["q_proj"]))
    assert all(part in str(raised.value) for part in misfit)


def test_full_training_needs_no_peft_that_fits(misfit, tmp_path):
    with pytest.raises(ModelLoadError):
        train(rows(2), output=tmp_path / "out", model=tmp_path / "unread", config=TrainingConfig(full=True))


def test_a_torchao_that_peft_refuses_is_named_too(monkeypatch):
    def refuse() -> bool:
        raise ImportError("only versions above 99.0 are supported")

    monkeypatch.setattr("peft.import_utils.is_torchao_available", refuse)
    with pytest.raises(MissingDependencyError, match=rf"torchao {re.escape(version('torchao'))}.*99\.0.*torchao>="):
        require_adapter_libraries()
