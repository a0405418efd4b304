"""The Dockerfile and the commands of its page, without Docker."""

from __future__ import annotations

import json
import re
import shlex
import tomllib
from fnmatch import fnmatch
from pathlib import Path
from typing import NamedTuple

import pytest

from kvfusion_rag.cli import COMMANDS
from kvfusion_rag.cli.parser import build_parser, parse
from kvfusion_rag.serving.access import PATHS_WITHOUT_KEY

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "container.md").read_text(encoding="utf-8")
WITH_VALUE = {"--publish", "--env", "--volume", "--gpus"}  # options of docker run on the page


class Instruction(NamedTuple):
    name: str
    text: str


def instructions() -> list[Instruction]:
    """Return the instructions of the Dockerfile, with continued lines joined."""
    text = (ROOT / "Dockerfile").read_text(encoding="utf-8").replace("\\\n", " ")
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
    return [Instruction(*line.split(maxsplit=1)) for line in lines]


ALL = instructions()


def texts(name: str) -> list[str]:
    return [one.text for one in ALL if one.name == name]


def image_arguments() -> list[list[str]]:
    """Return what follows the image in each ``docker run`` of the page."""
    found = []
    for line in PAGE.splitlines():
        words = shlex.split(line) if line.startswith("docker run ") else []
        rest = iter(words[2:])
        for word in rest:
            if word in WITH_VALUE:
                next(rest)
            elif not word.startswith("-"):
                assert word.partition(":")[0] == "kvfusion-rag"
                found.append(list(rest))
    return found


def is_sent(path: str) -> bool:
    """Return whether .dockerignore lets a path into the build. Its last matching line decides."""
    sent = True
    for line in (ROOT / ".dockerignore").read_text().split():
        if fnmatch(path, line.removeprefix("!")):
            sent = line.startswith("!")
    return sent


@pytest.fixture
def environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in place of the container's, without variables of this machine."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes").mkdir()
    return tmp_path


@pytest.mark.parametrize("words", [json.loads(texts("CMD")[0]), *image_arguments()], ids=" ".join)
def test_command_line_is_valid(environment, words):
    if words:  # without arguments, the image's own command runs
        own = [re.sub("^/(notes|cache)", rf"{environment}/\1", word) for word in words]
        parse(build_parser(COMMANDS), own)


def test_page_shows_several_commands():
    assert {words[0] for words in image_arguments() if words} == {"doctor", "ask", "serve"}
    assert [] in image_arguments()


def test_image_starts_kvfusion_with_a_key_and_not_as_root():
    assert json.loads(texts("ENTRYPOINT")[0]) == ["kvfusion"]
    args = parse(build_parser(COMMANDS), json.loads(texts("CMD")[0]))
    assert args.host == "0.0.0.0" and args.api_key_env == "KVFUSION_API_KEY" and not args.allow_unauthenticated
    order = [one.name for one in ALL]
    assert texts("USER") == ["kvfusion"] and order.index("USER") < order.index("ENTRYPOINT")
    last_stage = len(order) - 1 - order[::-1].index("FROM")
    assert order.index("USER") > last_stage, "the user is that of the image that runs"


def test_health_is_asked_without_a_key_on_the_port_of_the_server():
    port = parse(build_parser(COMMANDS), json.loads(texts("CMD")[0])).port
    assert texts("EXPOSE") == [str(port)]
    code = json.loads(texts("HEALTHCHECK")[0].partition("CMD ")[2])[2]
    compile(code, "healthcheck", "exec")
    address, path = re.search(r"http://([\d.:]+)(/\w+)", code).groups()
    assert address == f"127.0.0.1:{port}" and path in PATHS_WITHOUT_KEY


def test_caches_are_in_the_volume():
    (volume,) = texts("VOLUME")
    variables = dict(word.split("=", 1) for text in texts("ENV") for word in text.split())
    assert all(variables[name].startswith(f"{volume}/") for name in ("KVFUSION_HOME", "HF_HOME"))
    assert any(f"--owner kvfusion {volume}" in text for text in texts("RUN"))


def test_copied_files_exist_and_are_sent_to_the_build():
    sources = [word for text in texts("COPY") if "--from" not in text for word in text.split()[:-1]]
    assert len(sources) >= 5
    for source in sources:
        assert (ROOT / source).exists() and is_sent(source), source
    assert not is_sent("tests") and not is_sent(".git") and not is_sent("benchmarks")


def test_build_has_the_files_that_the_wheel_needs():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    wheel = project["tool"]["hatch"]["build"]["targets"]["wheel"]
    needed = [*wheel["packages"], *wheel["force-include"], project["project"]["readme"]]
    sources = {word for text in texts("COPY") if "--from" not in text for word in text.split()[:-1]}
    assert all(path.split("/")[0] in sources for path in needed)


def test_pip_installs_extras_that_exist_and_pinned_versions():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    pip = [text for text in texts("RUN") if text.startswith("pip install")]
    assert len(pip) == 3 and all("--constraint constraints.txt" in text for text in pip)
    (chosen,) = re.findall(r'"\.\[([\w,-]+)\]"', " ".join(pip))
    assert {"rag", "serve"} <= set(chosen.split(",")) <= extras.keys()
    pinned = (ROOT / "constraints.txt").read_text()
    assert re.search("^torch==", pinned, re.M)


@pytest.mark.parametrize("workflow", ["ci.yml", "release.yml"])
def test_workflows_run_commands_that_exist(workflow):
    text = (ROOT / ".github" / "workflows" / workflow).read_text()
    found = re.findall(r'docker run --rm (?:"\$IMAGE"|kvfusion-rag) ([\w-]+)', text)
    assert found and all(word in COMMANDS or word == "--version" for word in found)
    assert not re.search(r"uses: \S+(?<!@v\d)(?<!@release/v1)$", text, re.M), "actions have a version"
