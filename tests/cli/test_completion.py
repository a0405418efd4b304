"""``kvfusion completion``: scripts for three shells. That of bash is run as bash runs it."""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from commands import run

from kvfusion_rag.cli import COMMANDS
from kvfusion_rag.cli.completion import SHELLS
from kvfusion_rag.cli.parser import build_parser

BASH = shutil.which("bash")
ASK = 'COMP_WORDS=({words}); COMP_CWORD={last}; _shtab_kvfusion; printf "%s\\n" "${{COMPREPLY[@]}}"'


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    code = "from kvfusion_rag.cli import main; main(['completion', 'bash'])"
    root = Path(__file__).parent.parent.parent
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root)
    path = tmp_path_factory.mktemp("completion") / "kvfusion.bash"
    path.write_text(done.stdout)
    return path


def completions(script: Path, folder: Path, *words: str) -> set[str]:
    """Return what bash offers for the last of the words. There are no other programs, so none is started."""
    if BASH is None:
        pytest.skip("bash is not installed")
    ask = ASK.format(words=shlex.join(["kvfusion", *words]), last=len(words))
    done = subprocess.run(
        [BASH, "--norc", "-c", f"source {shlex.quote(str(script))}; {ask}"],
        capture_output=True, text=True, check=True, cwd=folder, env={"PATH": ""},
    )  # fmt: skip
    assert done.stderr == ""
    return set(done.stdout.split())


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        ([""], set(COMMANDS)),
        (["st"], {"store"}),
        (["store", ""], {"stats", "verify", "missing", "clear", "forget", "estimate"}),
        (["serve", "--served"], {"--served-model-name"}),
        (["serve", "--mode", ""], {"auto", "fusion", "concat", "ape"}),
        (["bench", "answer", "--shape", "qwen2.5-0"], {"qwen2.5-0.5b"}),
        (["completion", ""], set(SHELLS)),
        (["ask", "who?", "--docs", "no"], {"notes", "notes.txt"}),
        (["train", "--output", "no"], {"notes"}),
    ],
)
def test_bash_completes_commands_options_values_and_paths(script, tmp_path, words, offered):
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes.txt").touch()
    assert completions(script, tmp_path, *words) == offered


@pytest.mark.parametrize("command", COMMANDS)
def test_bash_offers_every_visible_option(script, tmp_path, command):
    for leaf in build_parser({command: COMMANDS[command]}).leaves():
        offered = completions(script, tmp_path, *leaf.command, "--")
        shown = {text for option in leaf.options.values() for text in option.action.option_strings}
        assert {text for text in shown if text.startswith("--")} - {"--verbose"} <= offered
        assert not any(text.startswith("--no-") for text in offered - shown), "opposites of flags are not shown"


@pytest.mark.parametrize("shell", SHELLS)
def test_script_of_each_shell_has_the_options(capsys, shell):
    code, out, err = run(capsys, "completion", shell)
    assert (code, err) == (0, "") and "served-model-name" in out and "qwen2.5-0.5b" in out
    assert json.loads(run(capsys, "completion", shell, "--json")[1]) == {"shell": shell, "script": out.rstrip("\n")}


def test_script_is_made_without_torch(script):
    code = (
        "import sys; from kvfusion_rag.cli import main; main(['completion', 'zsh']); "
        "print([name for name in ('torch', 'transformers', 'numpy') if name in sys.modules])"
    )
    root = Path(__file__).parent.parent.parent
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root)
    assert done.stdout.splitlines()[-1] == "[]"


def test_missing_library_is_named(capsys, monkeypatch):
    monkeypatch.setattr("kvfusion_rag.cli.completion.find_spec", lambda name: None)
    code, out, err = run(capsys, "completion", "bash")
    assert (code, out) == (2, "") and "needs shtab" in err and '".[completion]"' in err
