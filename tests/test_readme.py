"""The README's Python and shell examples do what they say they print."""

import re
from pathlib import Path

import pytest

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")


def block_after(heading: str, language: str) -> str:
    found = re.search(rf"## {heading}\n.*?```{language}\n(.*?)```", README, re.DOTALL)
    assert found, f"the README has no {language} block under {heading}"
    return found[1]


@pytest.mark.default_model
def test_python_example_prints_what_its_comments_say(default_model_once, capsys):
    code = block_after("Python", "python")
    expected = [comment.strip() for comment in re.findall(r"print\(.*\)\s+# (.*)", code)]
    exec(compile(code, "README.md", "exec"), {})  # our own text
    printed = capsys.readouterr().out
    position = 0
    for value in expected:
        position = printed.find(value, position)
        assert position >= 0, f"{value!r} was not printed, in order, by the README's example:\n{printed}"


@pytest.mark.parametrize("command", re.findall(r"^make ([a-z-]+)", README, re.MULTILINE))
def test_make_commands_exist(command):
    makefile = (Path(__file__).parent.parent / "Makefile").read_text(encoding="utf-8")
    assert re.search(rf"^{command}:", makefile, re.MULTILINE)
