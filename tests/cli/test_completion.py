"""``kvfusion completion``: scripts for three shells, each run as its shell runs it, if the shell is installed."""

from __future__ import annotations

import json
import os
import pty
import select
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from commands import run

from kvfusion_rag.cli import COMMANDS
from kvfusion_rag.cli.completion import SHELLS
from kvfusion_rag.cli.parser import build_parser

BASH, ZSH, FISH = (shutil.which(shell) for shell in SHELLS)
ASK = 'COMP_WORDS=({words}); COMP_CWORD={last}; _shtab_kvfusion; printf "%s\\n" "${{COMPREPLY[@]}}"'
ZSHRC = """
fpath=({folder} $fpath)
autoload -Uz compinit && compinit -D -u
kvfusion() {{ print -r -- "<$*>" }}
PROMPT="ready> "
"""
LONGEST = 60  # seconds for a shell to react, on a busy machine


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory):
    """Return a function that writes the script of a shell, as its user does, into a folder and returns the file."""
    root, folder = Path(__file__).parent.parent.parent, tmp_path_factory.mktemp("completion")

    def write(shell: str, name: str) -> Path:
        code = f"from kvfusion_rag.cli import main; main(['completion', {shell!r}])"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root)
        (folder / name).write_text(done.stdout)
        return folder / name

    return write


@pytest.fixture(scope="module")
def script(written) -> Path:
    return written("bash", "kvfusion.bash")


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


@pytest.fixture(scope="module")
def fish_script(written) -> Path:
    if FISH is None:
        pytest.skip("fish is not installed")
    return written("fish", "kvfusion.fish")


@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("kvfusion ", set(COMMANDS)),
        ("kvfusion st", {"store"}),
        ("kvfusion store ", {"stats", "verify", "missing", "clear", "forget", "estimate"}),
        ("kvfusion serve --served", {"--served-model-name"}),
        ("kvfusion serve --mode ", {"auto", "fusion", "concat", "ape"}),
        ("kvfusion completion ", set(SHELLS)),
    ],
)
def test_fish_completes_commands_options_and_values(fish_script, tmp_path, line, offered):
    code = f"source {shlex.quote(str(fish_script))}; complete -C {shlex.quote(line)}"
    done = subprocess.run(
        [FISH, "--no-config", "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path,
        env={"PATH": "", "HOME": str(tmp_path)},
    )  # fmt: skip
    assert done.stderr == ""
    assert {found.split("\t")[0] for found in done.stdout.splitlines()} == offered


@pytest.fixture(scope="module")
def zsh_folder(written, tmp_path_factory) -> Path:
    """Return a folder with the settings of a zsh that finds the script in its function path."""
    if ZSH is None:
        pytest.skip("zsh is not installed")
    folder = tmp_path_factory.mktemp("zsh")
    (folder / ".zshrc").write_text(ZSHRC.format(folder=written("zsh", "_kvfusion").parent))
    return folder


@pytest.mark.parametrize(
    ("line", "completed"),
    [
        ("kvfusion st", "store"),
        ("kvfusion store ver", "store verify"),
        ("kvfusion serve --served", "serve --served-model-name"),
        ("kvfusion serve --mode con", "serve --mode concat"),
        ("kvfusion completion f", "completion fish"),
        ("kvfusion ask who --docs no", "ask who --docs notes.txt"),
    ],
)
def test_zsh_completes_commands_options_values_and_paths(zsh_folder, tmp_path, line, completed):
    """Zsh completes only what is typed at a terminal. Its ``kvfusion`` is a function that shows its arguments."""
    (tmp_path / "notes.txt").touch()
    terminal, its_end = pty.openpty()
    shell = subprocess.Popen(
        [ZSH, "-d", "-i"], stdin=its_end, stdout=its_end, stderr=its_end, cwd=tmp_path, start_new_session=True,
        env={"PATH": os.defpath, "HOME": str(zsh_folder), "ZDOTDIR": str(zsh_folder), "TERM": "dumb"},
    )  # fmt: skip
    try:
        os.close(its_end)
        until(terminal, "ready> ")
        os.write(terminal, f"{line}\t\r".encode())
        assert f"<{completed}>" in until(terminal, ">\r\n")
    finally:
        shell.kill()
        shell.wait()
        os.close(terminal)


def until(terminal: int, mark: str) -> str:
    """Return what a shell writes up to ``mark``, or all that it writes in ``LONGEST`` seconds."""
    written, end = b"", time.monotonic() + LONGEST
    while mark.encode() not in written and (left := end - time.monotonic()) > 0:
        if select.select([terminal], [], [], left)[0]:
            written += os.read(terminal, 4096)
    return written.decode()


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
