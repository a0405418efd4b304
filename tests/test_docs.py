"""The README and the pages in docs/: their Python blocks run, and the files and commands that they name exist."""

import re
from pathlib import Path

import pytest

import kvfusion_rag

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
PAGES = sorted((ROOT / "docs").glob("*.md"))
TEXTS = [README, *PAGES, *(ROOT / name for name in ("CONTRIBUTING.md", "SECURITY.md"))]
QUICK = ("README", "index", "store")  # the other pages load a framework or answer many questions
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
MAKE_TARGETS = {*re.findall(r"^([a-z-]+):", MAKEFILE, re.MULTILINE), "test-lowest", "test-newest"}


def python_blocks(page: Path) -> list[str]:
    """Return the Python blocks of a page, but only the first of the README, because the others need your own chain."""
    blocks = re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    return blocks[:1] if page == README else blocks


def runnable_pages() -> list[object]:
    pages = [page for page in (README, *PAGES) if python_blocks(page)]
    return [pytest.param(page, id=page.stem, marks=() if page.stem in QUICK else pytest.mark.slow) for page in pages]


@pytest.mark.default_model
@pytest.mark.usefixtures("default_model_once")
@pytest.mark.parametrize("page", runnable_pages())
def test_python_blocks_print_the_values_in_their_comments(page, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)  # pages use the files of examples/
    names: dict[str, object] = {"__name__": page.stem}
    for code in python_blocks(page):
        capsys.readouterr()
        exec(compile(code, page.name, "exec"), names)  # our own text
        printed, position = capsys.readouterr().out, 0
        for value in re.findall(r"print\(.*\)\s+# (.*)", code):
            position = printed.find(value.strip(), position)
            assert position >= 0, f"{value!r} was not printed, in order, by\n{code}\nbut this was:\n{printed}"


def test_readme_is_short():
    assert README.read_text(encoding="utf-8").count("\n") <= 200


@pytest.mark.parametrize("text", TEXTS, ids=lambda path: path.stem)
def test_named_files_and_make_targets_exist(text):
    source = text.read_text(encoding="utf-8")
    files = re.findall(
        r"\b(?:kvfusion_rag|integrations|tests|benchmarks|notebooks|recipes|examples)/[\w./-]*\w", source
    )
    assert not [file for file in files if not (ROOT / file).exists()]
    targets = re.findall(r"(?:^|`)make ([a-z-]+)", source, re.MULTILINE)
    assert not set(targets) - MAKE_TARGETS


def test_version_tests_exist():
    listed = re.search(r"^VERSION_TESTS := \$\(addprefix tests/,(.*?)\)", MAKEFILE, re.DOTALL | re.MULTILINE)
    assert listed
    names = listed[1].replace("\\", " ").split()
    assert names
    assert not [name for name in names if not (ROOT / "tests" / name).exists()]


def test_every_page_is_in_the_navigation():
    named = set(re.findall(r": (\w+\.md)$", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"), re.MULTILINE))
    assert named == {page.name for page in PAGES}


def test_api_page_has_every_public_name():
    documented = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    names = [name for name in kvfusion_rag.__all__ if not name.endswith(("Error", "__version__"))]
    assert not [name for name in names if f"::: kvfusion_rag.{name}\n" not in documented]


def test_citation_has_the_version_of_the_package():
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert f"\nversion: {kvfusion_rag.__version__}\n" in citation
