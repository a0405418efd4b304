"""Files of the user that have the names of modules of Python and of libraries do not break the command."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
EARLY = ["types", "random", "token", "signal", "json", "copy"]  # python -m imports these before any of our code
LATE = ["attr", "queue", "select", "email", "torch", "numpy"]
CODE = "import kvfusion_rag.model.hardware as used; print(used.__name__)"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in EARLY + LATE:
        (tmp_path / f"{name}.py").write_text(f"raise RuntimeError('{name}.py of the user was imported')\n")
    (tmp_path / "bin").mkdir()
    script = "import sys\nfrom kvfusion_rag.cli import main\nsys.exit(main())\n"  # as pip writes it
    (tmp_path / "bin/kvfusion").write_text(script)
    return tmp_path


@pytest.mark.parametrize(
    "command", [["bin/kvfusion"], ["-m", "kvfusion_rag.cli"], ["-P", "-m", "kvfusion_rag.cli"]], ids=" ".join
)
def test_command_imports_no_files_of_the_current_folder(folder, command):
    if command[0] == "-m":
        for name in EARLY:
            (folder / f"{name}.py").unlink()
    argv = [sys.executable, *command, "doctor", "no/model", "--config-only", "--device", "cpu"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(argv, cwd=folder, capture_output=True, text=True, env=environment, timeout=300, check=False)
    assert done.returncode == 2 and done.stderr.startswith("kvfusion: error: ") and done.stderr.count("\n") == 1


def test_script_beside_such_files_works_with_safe_path(folder):
    """What docs/troubleshooting.md says."""
    (folder / "script.py").write_text(CODE)
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    for options, code in (([], 1), (["-P"], 0)):
        argv = [sys.executable, *options, "script.py"]
        done = subprocess.run(
            argv, cwd=folder, capture_output=True, text=True, env=environment, timeout=300, check=False
        )
        assert done.returncode == code, done.stderr
