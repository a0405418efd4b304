"""The structure of the package: which modules may import which, and what an import may load."""

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "kvfusion_rag"
# A module imports only from its own room and the rooms above it, and never in a circle.
ROOMS = [
    "errors", "schema", "home", "machine", "plotting", "option_names", "text", "model", "fusion", "llama_cpp", "store",
    "retrieval", "engine", "vllm", "generator", "data", "evaluation", "training", "adapting", "benchmark", "serving",
    "cluster", "cli",
]  # fmt: skip
MAX_MODULES = 14  # per room, without its __init__
MAX_LINES = 400
MAX_FUNCTION_LINES = 60
MODULES = sorted(PACKAGE.rglob("*.py"))


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


NAMES = {name_of(path): path for path in MODULES}


def lazy_names(stub: Path) -> dict[str, str]:
    """Return the module of every name that a lazy ``__init__.pyi`` lists."""
    tree = ast.parse(stub.read_text(encoding="utf-8"))
    package = name_of(stub)
    imports = [node for node in tree.body if isinstance(node, ast.ImportFrom)]
    return {alias.name: f"{package}.{node.module}" for node in imports for alias in node.names}


LAZY = {name_of(stub): lazy_names(stub) for stub in PACKAGE.rglob("__init__.pyi")}


def imported_modules(path: Path) -> set[str]:
    """Return the modules of kvfusion_rag that a file imports. A public name counts as its module."""
    parts = name_of(path).split(".")
    package = parts if path.stem == "__init__" else parts[:-1]
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.ImportFrom):
            continue
        base = package[: len(package) - node.level + 1] if node.level else []
        source = ".".join([*base, *(node.module.split(".") if node.module else [])])
        for alias in node.names:
            inner = LAZY.get(source, {}).get(alias.name, f"{source}.{alias.name}")
            found.add(inner if inner in NAMES else source)
    return {name for name in found if name in NAMES}


def room_of(name: str) -> str:
    return name.split(".")[1]


@pytest.mark.parametrize("path", [path for path in MODULES if path != PACKAGE / "__init__.py"], ids=name_of)
def test_modules_import_only_from_rooms_above(path):
    room = room_of(name_of(path))
    assert room in ROOMS, f"{room} is not in the list of rooms"
    above = ROOMS[: ROOMS.index(room) + 1]
    wrong = {name for name in imported_modules(path) if name != "kvfusion_rag" and room_of(name) not in above}
    assert not wrong


def test_modules_of_a_room_do_not_import_in_circles():
    graph = {name: imported_modules(path) - {name} for name, path in NAMES.items() if path.stem != "__init__"}
    TopologicalSorter(graph).prepare()  # raises CycleError


def test_rooms_stay_small():
    assert len([path for path in PACKAGE.glob("*.py") if path.stem != "__init__"]) <= 5
    for room in (path for path in PACKAGE.rglob("*") if path.is_dir()):
        modules = [path.name for path in room.glob("*.py") if path.stem != "__init__"]
        assert len(modules) <= MAX_MODULES, f"{room.name} has {len(modules)} modules"


@pytest.mark.parametrize("path", [*MODULES, *sorted((ROOT / "integrations").rglob("*.py"))], ids=name_of)
def test_modules_and_functions_stay_short(path):
    text = path.read_text(encoding="utf-8")
    assert text.count("\n") <= MAX_LINES
    functions = (n for n in ast.walk(ast.parse(text)) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef))
    lengths = {function.name: function.end_lineno - function.lineno + 1 for function in functions}
    assert not {name: length for name, length in lengths.items() if length > MAX_FUNCTION_LINES}


@pytest.mark.parametrize("folder", [PACKAGE, ROOT / "integrations"], ids=["kvfusion_rag", "integrations"])
def test_no_unsafe_loading(folder):
    for path in folder.rglob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        names = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name)}
        names |= {a.name.split(".")[0] for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
        calls = {ast.unparse(n.func) for n in ast.walk(tree) if isinstance(n, ast.Call)}
        assert not names & {"pickle", "eval", "exec", "marshal", "shelve"}, path
        assert not calls & {"torch.load"}, path


def test_integrations_use_only_public_names():
    for path in (ROOT / "integrations").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("kvfusion_rag"):
                assert node.module == "kvfusion_rag", f"{path.name} imports from {node.module}"


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("kvfusion_rag", ["torch", "transformers"]),
        ("kvfusion_rag.generator", ["langchain_core", "llama_index", "chromadb", "sentence_transformers", "peft"]),
        ("kvfusion_rag.data.formats", ["bm25s", "accelerate", "turbohtml", "sentence_transformers"]),
        ("kvfusion_rag.cluster", ["ray", "pyarrow", "pandas"]),
        ("kvfusion_rag.cli", ["torch", "transformers", "turbohtml", "ray"]),
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


def test_public_names_resolve():
    import kvfusion_rag

    for name in kvfusion_rag.__all__:
        assert getattr(kvfusion_rag, name) is not None
    with pytest.raises(AttributeError, match="no_such_name"):
        kvfusion_rag.no_such_name  # noqa: B018
