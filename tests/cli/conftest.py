"""Fixtures of the command tests: a fake generator, and a folder of documents."""

from __future__ import annotations

from pathlib import Path

import pytest
from commands import CommandGenerator
from indexes import WordEmbedder
from tiny import config

from kvfusion_rag.cli import ask, doctor


@pytest.fixture
def generator(monkeypatch) -> CommandGenerator:
    """Replace the loaded model by a fake, and embeddings by hashed words."""
    fake = CommandGenerator()
    monkeypatch.setattr(ask, "load_generator", lambda args: fake)
    monkeypatch.setattr(doctor, "load_generator", lambda args: fake)
    monkeypatch.setattr(doctor, "load_whole_config", lambda args: config("llama"))
    monkeypatch.setattr("kvfusion_rag.retrieval.SentenceTransformerEmbedder", lambda name, device: WordEmbedder())
    return fake


@pytest.fixture
def docs(tmp_path) -> Path:
    folder = tmp_path / "docs"
    folder.mkdir()
    (folder / "peru.md").write_text("# Peru\n\nThe office stands on a hill. The office is In Lima. It is old.")
    (folder / "rice.txt").write_text("Rice is eaten everywhere.")
    (folder / "data.bin").write_text("x")
    return folder
