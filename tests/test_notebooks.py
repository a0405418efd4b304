"""The notebooks run in any folder, and their saved outputs are complete."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

import kvfusion_rag

ROOT = Path(__file__).parent.parent
notebooks = pytest.mark.parametrize("path", sorted((ROOT / "notebooks").glob("*.ipynb")), ids=lambda path: path.stem)


def code_cells(notebook: Any) -> list[Any]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


@pytest.mark.slow
@pytest.mark.default_model
@notebooks
def test_notebook_runs_outside_the_checkout(path, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    monkeypatch.setenv("OMP_WAIT_POLICY", "passive")
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(notebook, timeout=1200, resources={"metadata": {"path": str(tmp_path)}}).execute()
    assert list(tmp_path.iterdir()) == []  # nothing is left in the reader's folder


@notebooks
def test_saved_outputs_come_from_one_run_without_warnings_of_other_libraries(path):
    cells = code_cells(nbformat.read(path, as_version=4))
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "error"]
    shown = [line for output in outputs if output.get("name") == "stderr" for line in output.text.splitlines()]
    own = ("was not trained to read fused documents", "a stored document is damaged")  # the text explains them
    assert not [line for line in shown if line and not any(warning in line for warning in own)]


def test_package_contains_the_example_files():
    examples, checkout = Path(kvfusion_rag.__file__).parent / "examples", ROOT / "examples"
    for name in ("lighthouse", "questions.jsonl"):
        assert (examples / name).samefile(checkout / name)
    wheel = (ROOT / "pyproject.toml").read_text(encoding="utf-8").partition("force-include]")[2].partition("[")[0]
    for name in ("lighthouse", "questions.jsonl"):
        assert f'"examples/{name}" = "kvfusion_rag/examples/{name}"' in wheel
