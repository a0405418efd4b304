"""A generator over a random model, and ``kvfusion evaluate`` with it."""

import pytest
import tiny
from readers import rows

from kvfusion_rag.cli import COMMANDS, evaluate, main
from kvfusion_rag.data.rows import write_rows


@pytest.fixture(scope="session")
def generator():
    return tiny.generator("llama", store="memory", passage_length=60, max_new_tokens=6)


@pytest.fixture
def command(monkeypatch, tmp_path, generator, model_folder):
    """Run ``kvfusion evaluate`` in a folder with six rows."""
    monkeypatch.setitem(COMMANDS, "evaluate", evaluate)
    monkeypatch.setattr(evaluate, "load_generator", lambda args, store: generator)
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / "rows.jsonl.gz", rows())
    return lambda *argv: main(["evaluate", "--model", str(model_folder), *map(str, argv)])
