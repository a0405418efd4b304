"""Fixtures shared by all tests: the default model, a cache of converted models, and Hypothesis without time limits."""

from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, settings

from kvfusion_rag import KVFusionGenerator

# Times are the benchmark's matter; the first example of a test may build a tokenizer.
settings.register_profile("ci", deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
settings.load_profile("ci")


def pytest_configure() -> None:
    """Models of a few thousand weights run fastest on one thread: threads that wait for each other slow them down."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def kvfusion_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Cache of converted GGUF files that lasts for the session: converting the default model takes half a minute."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KVFUSION_HOME", str(tmp_path_factory.mktemp("kvfusion-home")))
        yield


@pytest.fixture(scope="session")
def embedded() -> KVFusionGenerator:
    """The default model; its store fills up over the session."""
    return KVFusionGenerator.from_pretrained()
