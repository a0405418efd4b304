"""Engines are compared on the same documents, each in a process of its own."""

from __future__ import annotations

import json
from importlib.util import find_spec

import pytest
import tiny_llama_cpp

from kvfusion_rag import InvalidInputError, MissingDependencyError
from kvfusion_rag.benchmark.engines import ENGINES, STOCK, EngineCase, documents_of, installed_engines, measure_engines
from kvfusion_rag.cli import bench, main

ON_TORCH = ["torch-float32", "torch-bfloat16", "torch-int8"]


def test_documents_have_the_given_number_of_tokens():
    case = EngineCase(None, documents=3, document_tokens=9)
    found = documents_of(case, lambda text: len(text.split()))
    assert [len(document.text.split()) for document in found] == [9, 9, 9]
    assert found == documents_of(case, lambda text: len(text.split()))


def test_unknown_engine_is_named():
    with pytest.raises(InvalidInputError, match="'onnx' is unknown"):
        measure_engines(EngineCase(None), ["onnx"])


def test_command_line_knows_the_engines():
    assert tuple(ENGINES) == bench.ENGINES


def test_engines_without_their_package_are_named(monkeypatch):
    monkeypatch.setattr("kvfusion_rag.benchmark.engines.find_spec", lambda name: None)
    assert installed_engines() == ["torch-float32", "torch-bfloat16"]
    with pytest.raises(MissingDependencyError, match="'vllm' needs vllm"):
        measure_engines(EngineCase(None), ["torch-float32", "vllm"])


def test_figures_of_each_engine(tmp_path):
    file = tiny_llama_cpp.save(tmp_path)
    engines = [*ON_TORCH, *(["llama.cpp-f16", STOCK] if find_spec("llama_cpp") else [])]
    output = tmp_path / "figures.json"
    options = [
        "--documents",
        "3",
        "--document-tokens",
        "8",
        "--answer-tokens",
        "4",
        "--repeats",
        "2",
        "--threads",
        "1",
    ]
    command = ["bench", "engines", "--model", str(file), "--engines", ",".join(engines), "--output", str(output)]
    assert main([*command, *options]) == 0
    rows = json.loads(output.read_text())["rows"]
    assert [row["engine"] for row in rows] == engines
    for row in rows:
        assert row["cold"] > 0 and row["warm"] > 0 and row["shuffled"] > 0 and row["peak MiB"] > 50
        assert ("joined prompt" in row) == (row["engine"] != STOCK)
        if row["engine"] != STOCK:
            assert row["same answers after a shuffle"] == row["questions"] == 2


def test_model_without_a_gguf_file_is_refused(model_folder, capsys):
    command = ["bench", "engines", "--model", str(model_folder), "--engines", STOCK]
    assert main(command) == 2
    assert "GGUF" in capsys.readouterr().err
