"""vLLM servers that several tests share, because starting one takes a minute."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from kvfusion_rag import KVFusionGenerator

ARGUMENTS = [
    "--enforce-eager",
    "--max-num-batched-tokens",
    "256",
    "--max-num-seqs",
    "64",
]  # long questions are divided


@pytest.fixture(scope="session", autouse=True)
def cache_of_vllm() -> Iterator[None]:
    """Let vLLM take 1 GiB for keys and values."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
        yield


@pytest.fixture(scope="session")
def store_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("store")


@pytest.fixture(scope="session")
def on_vllm(store_folder: Path) -> KVFusionGenerator:
    """The default model with its adapter on vLLM."""
    pytest.importorskip("vllm")
    return KVFusionGenerator.from_pretrained(
        engine="vllm", store=store_folder, vllm_args=ARGUMENTS, max_model_len=4096
    )


@pytest.fixture(scope="session")
def on_torch() -> KVFusionGenerator:
    """The same model on torch."""
    return KVFusionGenerator.from_pretrained()
