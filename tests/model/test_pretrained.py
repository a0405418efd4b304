"""Imports of other libraries print nothing that a user cannot act on."""

from __future__ import annotations

import logging
import os
import subprocess
import sys

import pytest

from kvfusion_rag.model.pretrained import without_torchao_warnings


def stderr_of(code: str, *arguments: object) -> str:
    """Run ``code`` in a new process that shows all warnings a user sees by default."""
    command = [sys.executable, "-W", "default", "-c", code, *map(str, arguments)]
    environment = os.environ | {"HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300, env=environment)
    return done.stderr


def test_loading_a_model_prints_nothing(model_folder):
    code = "import sys; from kvfusion_rag import KVFusionGenerator; KVFusionGenerator.from_pretrained(sys.argv[1])"
    assert stderr_of(code, model_folder) == ""


@pytest.mark.parametrize(
    "code",
    [
        "from kvfusion_rag.retrieval import SentenceTransformerEmbedder; SentenceTransformerEmbedder(device='cpu')",
        "from kvfusion_rag.training import train",
        "from langchain_kvfusion import ChatKVFusion",
        "from llama_index_kvfusion import KVFusionSynthesizer",
        "from kvfusion_rag.serving import create_app",
    ],
)
def test_importing_prints_nothing(code):
    assert stderr_of(code) == ""


def test_only_the_known_warnings_are_dropped_and_only_inside(caplog):
    torchao, pytree = logging.getLogger("torchao"), logging.getLogger("torch.utils._pytree")
    with without_torchao_warnings():
        torchao.warning("Failed to load %s: no CUDA", "_C.so")
        pytree.warning("Calling register_constant() on Enum subclasses is deprecated")
        torchao.warning("something else")
        pytree.warning("something else")
    torchao.warning("Failed to load %s: no CUDA", "_C.so")
    assert [record.getMessage() for record in caplog.records] == [
        "something else", "something else", "Failed to load _C.so: no CUDA",
    ]  # fmt: skip
