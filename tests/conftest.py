"""Fixtures shared by all tests: one embedded model, and Hypothesis without time limits."""

import pytest
from hypothesis import HealthCheck, settings

from kvfusion_rag import KVFusionGenerator

# Times are the benchmark's matter; the first example of a test may build a tokenizer.
settings.register_profile("ci", deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
settings.load_profile("ci")


@pytest.fixture(scope="session")
def embedded() -> KVFusionGenerator:
    """The model that ships with the package; its store fills up over the session."""
    return KVFusionGenerator.from_pretrained()
