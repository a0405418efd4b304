"""Every Python block of every docs page runs, in order, and prints what its comments say."""

import re
from pathlib import Path

import pytest

pytestmark = [pytest.mark.default_model, pytest.mark.usefixtures("default_model_once")]
ROOT = Path(__file__).parent.parent
PAGES = sorted((ROOT / "docs").glob("*.md"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_python_blocks_run_and_print_what_their_comments_say(page, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)  # pages use the files of examples/
    names: dict[str, object] = {"__name__": page.stem}
    for code in re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE):
        capsys.readouterr()
        exec(compile(code, page.name, "exec"), names)  # our own text
        printed, position = capsys.readouterr().out, 0
        for value in re.findall(r"print\(.*\)\s+# (.*)", code):
            position = printed.find(value.strip(), position)
            assert position >= 0, f"{value!r} was not printed, in order, by\n{code}\nbut this was:\n{printed}"
