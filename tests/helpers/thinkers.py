"""Small models that reason before they answer: random ones, and some whose reasoning is known."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import tiny
from chat_families import family_tokenizer

from kvfusion_rag import KVFusionGenerator, MemoryStore
from kvfusion_rag.fusion.torch_model import TorchModel
from kvfusion_rag.model.backbone import Backbone
from kvfusion_rag.text.settings import default_settings

TAGGED, OPENED, CHANNELS = "chatml with reasoning", "reasoning that the prompt opens", "channels"


def loaded(name: str, network: Any = None, **changes: Any) -> KVFusionGenerator:
    tok = family_tokenizer(name)
    network = tiny.model("llama", max_position_embeddings=4096) if network is None else network
    settings = replace(default_settings(tok), **changes)
    return KVFusionGenerator(TorchModel(Backbone(network, tok, settings, model_id="thinker")), store=MemoryStore())


@cache
def random_model(name: str) -> KVFusionGenerator:
    return loaded(name)


def thinker(written: str, **changes: Any) -> KVFusionGenerator:
    """Return a model whose prompt opens the reasoning, and which continues it with ``written``."""
    tok = family_tokenizer(OPENED)
    [before, *_] = tok("\n", add_special_tokens=False)["input_ids"]
    chain = [before, *tok(written, add_special_tokens=False)["input_ids"], tok.eos_token_id]
    return loaded(OPENED, tiny.chained_model(chain), **changes)
