"""The shape of the package: who may import whom, and what an import may cost."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from kvfusion_rag import _HOME

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "kvfusion_rag"
# Each module may import only those above it.
LAYERS = [
    "errors", "versions", "home", "probe", "devices", "digest", "schema", "kv", "chat", "settings", "prompts",
    "splitting", "positions", "support", "gguf_header", "gguf_convert", "gguf_cache", "locating", "linear",
    "attention", "ape", "watch", "collecting", "backbone", "measured", "prefill", "fusion", "likelihood", "gate",
    "limits", "loading", "citations", "store", "supply", "reading", "focus", "layouts", "recording", "decoding",
    "placing", "batching", "gathering", "prompt_reader", "engine", "attribution", "invariance", "streaming",
    "generator", "qa", "retrieval", "evaluation", "training", "adapting", "serving", "cli",
]  # fmt: skip


def layer_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_layers(path: Path) -> set[str]:
    """Top-level modules of kvfusion_rag that a file imports, relative or absolute."""
    package = ["kvfusion_rag", *path.relative_to(PACKAGE).parts[:-1]]
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            name = [*base, *(node.module.split(".") if node.module else [])]
            found |= {".".join([*name, alias.name]) for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    names = {n.split(".")[1] for n in found if n.startswith("kvfusion_rag.")} - {"__version__"}
    return {_HOME.get(name, name) for name in names}  # a public name counts as the module it lives in


@pytest.mark.parametrize(
    "path", sorted(p for p in PACKAGE.rglob("*.py") if p.parent != PACKAGE or p.name != "__init__.py"), ids=str
)
def test_modules_import_only_what_is_above_them(path):
    mine = layer_of(path)
    assert mine in LAYERS, f"{path.name} has no place in the list of layers"
    above = set(LAYERS[: LAYERS.index(mine) + 1])
    assert imported_layers(path) <= above


@pytest.mark.parametrize("folder", [PACKAGE, ROOT / "integrations"], ids=["kvfusion_rag", "integrations"])
def test_no_unsafe_loading(folder):
    for path in folder.rglob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        names = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name)}
        names |= {a.name.split(".")[0] for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
        calls = {ast.unparse(n.func) for n in ast.walk(tree) if isinstance(n, ast.Call)}
        assert not names & {"pickle", "eval", "exec", "marshal", "shelve"}, path
        assert not calls & {"torch.load"}, path


def test_integrations_use_public_names_alone():
    for path in (ROOT / "integrations").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("kvfusion_rag"):
                assert node.module == "kvfusion_rag", f"{path.name} imports from {node.module}"


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("kvfusion_rag", ["torch", "transformers"]),
        ("kvfusion_rag.generator", ["langchain_core", "llama_index", "chromadb", "sentence_transformers", "peft"]),
        ("kvfusion_rag.training.formats", ["bm25s", "accelerate", "chromadb", "sentence_transformers"]),
        ("kvfusion_rag.cli", ["torch", "transformers", "chromadb"]),
    ],
)
def test_imports_are_light(module, absent):
    code = f"import sys, {module}; print([m for m in {absent!r} if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert out.stdout.strip() == "[]"


@pytest.mark.parametrize(
    "code",
    [
        "from kvfusion_rag import Answer, Document, Message; from kvfusion_rag.schema import Usage; Document('x')",
        "from kvfusion_rag.cli import main; assert main(['--help']) == 0 == main(['ask', '--help'])",
    ],
    ids=["data", "help"],
)
def test_plain_data_and_help_load_no_torch(code):
    code += "\nimport sys; print([m for m in ('torch', 'transformers', 'numpy') if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert out.stdout.splitlines()[-1] == "[]"


def test_type_checkers_see_the_public_names_where_they_are():
    (block,) = (
        node
        for node in ast.parse((PACKAGE / "__init__.py").read_text(encoding="utf-8")).body
        if isinstance(node, ast.If)
    )
    seen = {alias.name: node.module for node in block.body for alias in node.names}
    assert seen == _HOME


def test_public_names_resolve():
    import kvfusion_rag

    for name in kvfusion_rag.__all__:
        assert getattr(kvfusion_rag, name) is not None
    with pytest.raises(AttributeError, match="no_such_name"):
        kvfusion_rag.no_such_name  # noqa: B018
