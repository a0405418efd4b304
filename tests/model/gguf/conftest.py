"""A GGUF file, its converted folder, and an empty cache for each test."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from gguf import GGMLQuantizationType
from tiny_gguf import write_gguf

from kvfusion_rag.model.gguf import convert as gguf_convert
from kvfusion_rag.model.gguf.conversion_cache import MANIFEST, converted_folder


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    """Folder of an empty cache. The first conversion creates it."""
    monkeypatch.setenv("KVFUSION_HOME", str(tmp_path / "home"))
    return tmp_path / "home" / "gguf"


@pytest.fixture(scope="session")
def file(tmp_path_factory) -> Path:
    """A GGUF file in a folder of its own."""
    return write_gguf(tmp_path_factory.mktemp("model") / "tiny.Q8_0.gguf", kind=GGMLQuantizationType.Q8_0)


@pytest.fixture(scope="session")
def converted(file, tmp_path_factory) -> Path:
    """The converted folder of ``file``, in another cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KVFUSION_HOME", str(tmp_path_factory.mktemp("converted")))
        return converted_folder(file)


@pytest.fixture
def entry(cache, converted) -> Path:
    """The folder of ``file`` in the cache of this test."""
    return Path(shutil.copytree(converted, cache / converted.name))


@pytest.fixture
def conversions(converted, monkeypatch) -> list[str]:
    """Replace conversion by a copy of ``converted``, and collect the names of the files to convert."""
    names: list[str] = []

    def copy(file: Path, header: object, folder: Path, *, weights: bool) -> None:
        names.append(file.name)
        shutil.copytree(converted, folder, ignore=shutil.ignore_patterns(MANIFEST), dirs_exist_ok=True)

    monkeypatch.setattr(gguf_convert, "convert", copy)
    return names


@pytest.fixture
def names(cache) -> Callable[[], list[str]]:
    """Function that lists the cache, without locks and digests."""
    return lambda: sorted(p.name for p in cache.glob("*") if p.suffix != ".lock" and p.name != "digests")
