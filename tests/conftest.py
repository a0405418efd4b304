"""Fixtures shared by all tests: one embedded model, and Hypothesis without time limits."""

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


@pytest.fixture(scope="session")
def embedded() -> KVFusionGenerator:
    """The model that ships with the package; its store fills up over the session."""
    return KVFusionGenerator.from_pretrained()
