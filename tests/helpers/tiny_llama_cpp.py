"""Generators on llama.cpp over tiny random GGUF files, beside generators on torch over the same file."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import tiny
import tiny_gguf
import torch
from gguf import GGMLQuantizationType
from peft import LoraConfig, get_peft_model
from transformers import PreTrainedModel

from kvfusion_rag import Document, KVFusionGenerator
from kvfusion_rag.llama_cpp.context import ContextOptions
from kvfusion_rag.llama_cpp.library import Weights
from kvfusion_rag.llama_cpp.model import Description, LlamaCppModel
from kvfusion_rag.model.backbone import Backbone

DOCUMENTS = [
    Document("the river runs to the mill and the lamp is lit"),
    Document("a lamp on the pier", title="Lamp"),
    Document("every boat that comes to the pier in the evening waits for the river to rise again"),
    Document("the mill"),
]
QUESTION = "where is the lamp"


def model() -> PreTrainedModel:
    """Return a random model whose heads are wide enough for a quantised cache."""
    sizes = {"hidden_size": 128, "head_dim": 32, "intermediate_size": 128, "num_hidden_layers": 2}
    return tiny.model("llama", vocab_size=len(tiny_gguf.vocabulary()[0]), tie_word_embeddings=False, **sizes)


def save(folder: Path, *, kind: GGMLQuantizationType = GGMLQuantizationType.F32) -> Path:
    return tiny_gguf.write_gguf(folder / "tiny.gguf", model(), kind=kind)


def save_adapter(folder: Path, seed: int = 0, **settings: Any) -> Path:
    """Save a random LoRA adapter of the tiny model."""
    torch.manual_seed(seed)
    chosen = {"target_modules": "all-linear", "init_lora_weights": False, "r": 4, **settings}
    get_peft_model(model(), LoraConfig(**chosen)).save_pretrained(str(folder))
    return folder


def model_over(backbone: Backbone) -> LlamaCppModel:
    """Return a model on llama.cpp with the weights of a Llama on torch."""
    with tempfile.TemporaryDirectory() as folder:
        file = tiny_gguf.write_gguf(Path(folder) / "model.gguf", backbone.model)
        weights = Weights(file)
    description = Description(
        model_id=backbone.model_id,
        revision=None,
        tokenizer=backbone.tokenizer,
        settings=backbone.settings,
        base_settings=backbone.base_settings,
        position_limit=backbone.position_limit,
        weights_digest=backbone.weights_digest,
        adapter_digest=None,
        end_ids=backbone.end_ids,
        end_id=backbone.end_id,
        max_new_tokens=backbone.max_new_tokens,
    )
    return LlamaCppModel(weights, description, ContextOptions(1))


def load(file: Path, engine: str = "llama.cpp", **options: Any) -> KVFusionGenerator:
    return KVFusionGenerator.from_pretrained(file, engine=engine, **{"mode": "fusion", **options})


def logits_of(generator: KVFusionGenerator, question: str, documents: list[Document], **options: Any) -> torch.Tensor:
    """Return the logits (V,) of an answer's first token."""
    from kvfusion_rag.engine.calls import read_call
    from kvfusion_rag.engine.requests import Batch

    engine, found = generator._engine, []
    call = read_call(engine, question, documents, {"max_new_tokens": 1, **options})
    run = engine.runner.start(Batch.of(engine.runner.prepare(call.requests[0], call.decoding)))
    for _ in engine.runner.decode(run, call.decoding, on_logits=found.append):
        pass
    return found[0][0]


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())
