"""The kinds of files that can be read, by their suffixes."""

from __future__ import annotations

from pathlib import PurePath
from typing import Literal

Kind = Literal[
    "text",
    "markdown",
    "code",
    "html",
    "pdf",
    "word",
    "slides",
    "workbook",
    "table",
    "book",
    "mail",
    "notebook",
    "gzip",
]

_CODE = (
    *("asm", "bash", "bat", "c", "cc", "cfg", "clj", "cmake", "cpp", "cs", "css", "cxx", "dart", "el", "erl", "ex"),
    *("exs", "f90", "fish", "fs", "go", "gradle", "graphql", "groovy", "h", "hh", "hpp", "hs", "hxx", "ini", "java"),
    *(
        "jl",
        "js",
        "jsx",
        "kt",
        "kts",
        "less",
        "lisp",
        "lua",
        "m",
        "mjs",
        "ml",
        "mli",
        "mm",
        "php",
        "pl",
        "pm",
        "proto",
    ),
    *("ps1", "py", "pyi", "r", "rb", "rs", "s", "sass", "scala", "scm", "scss", "sh", "sql", "svelte", "swift", "tf"),
    *("toml", "ts", "tsx", "vb", "vhdl", "vue", "yaml", "yml", "zig", "zsh"),
)
DOCUMENTS: dict[str, Kind] = {
    ".txt": "text",
    ".text": "text",
    ".log": "text",
    ".rst": "text",
    ".tex": "text",
    ".md": "markdown",
    ".markdown": "markdown",
    ".html": "html",
    ".htm": "html",
    ".xhtml": "html",
    ".pdf": "pdf",
    ".docx": "word",
    ".pptx": "slides",
    ".xlsx": "workbook",
    ".csv": "table",
    ".tsv": "table",
    ".epub": "book",
    ".eml": "mail",
    ".ipynb": "notebook",
    ".gz": "gzip",
}
KINDS: dict[str, Kind] = {**DOCUMENTS, **{f".{suffix}": "code" for suffix in _CODE}}
KNOWN_TYPES = f"{', '.join(DOCUMENTS)} and source code"


def kind_of(path: PurePath) -> Kind | None:
    """Return the kind of a file by its suffix, or None if no reader knows it."""
    return KINDS.get(path.suffix.lower())
