"""Adapters as peft saves them, and what peft's own model computes with them, in two explicit steps."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from peft import PeftConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel

from kvfusion_rag.fusion.fused_cache import fuse
from kvfusion_rag.fusion.prefill import prefill
from kvfusion_rag.model.backbone import Backbone
from kvfusion_rag.model.kv import DocumentKV
from kvfusion_rag.model.loading import load_backbone
from kvfusion_rag.model.location import locate_model

DOCUMENTS = [(11, 12, 13, 40, 41, 42, 43), (50, 11, 52, 60)]
QUESTION = [12, 71, 11, 72, 13]


def load(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def trained(base: Path, config: PeftConfig, *, scale: float = 0.1) -> PeftModel:
    """Return peft's model with an adapter whose weights were all moved at random, as if trained."""
    torch.manual_seed(0)
    adapted = get_peft_model(load(base), config)
    return move(adapted, scale)


def move(adapted: PeftModel, scale: float = 0.1) -> PeftModel:
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(scale * torch.randn(parameter.shape))
    return adapted.eval()


def reader(base: Path, adapter: str | Path | None = None) -> Backbone:
    """Return the model under test."""
    return load_backbone(locate_model(base), adapter=adapter, dtype="float32", device="cpu")


def document_kvs(bone: Backbone) -> list[DocumentKV]:
    done = dict(prefill(bone, DOCUMENTS, None, tokens_per_pass=64))
    return [done[index] for index in range(len(DOCUMENTS))]


def fused(bone: Backbone, *, adapter: bool = True) -> torch.Tensor:
    """Return logits (1, V) of the question over both fused documents."""
    kvs = document_kvs(bone)
    context = fuse([kvs], bone.device)
    return _logits(bone, QUESTION, max(kv.num_tokens for kv in kvs), context.cache, context.mask, adapter=adapter)


def joined(bone: Backbone) -> torch.Tensor:
    """Return logits (1, V) of one joined prompt, as mode "concat" reads it."""
    ids = _joined_ids()
    cache = DynamicCache(config=bone.config)
    return _logits(bone, ids, 0, cache, torch.ones(1, 0, dtype=torch.long), adapter=True)


def _logits(
    bone: Backbone, ids: Sequence[int], start: int, cache: DynamicCache, slots: torch.Tensor, *, adapter: bool
) -> torch.Tensor:
    positions = torch.arange(start, start + len(ids))[None]
    mask = torch.cat([slots, torch.ones(1, len(ids), dtype=torch.long)], dim=1)
    last = torch.tensor([len(ids) - 1])
    return bone.forward(torch.tensor([list(ids)]), positions, mask, cache, last, adapter=adapter)


@torch.no_grad()
def two_steps(base: PreTrainedModel, adapted: torch.nn.Module) -> torch.Tensor:
    """Return the logits that :func:`fused` must have: the base reads each document, ``adapted`` the question."""
    caches = [base(input_ids=torch.tensor([ids]), use_cache=True).past_key_values for ids in DOCUMENTS]
    slots = DynamicCache(config=base.config)
    for layer in range(base.config.num_hidden_layers):
        keys, values = (
            torch.cat([getattr(cache.layers[layer], part) for cache in caches], dim=2) for part in ("keys", "values")
        )
        slots.update(keys, values, layer)
    start = max(len(ids) for ids in DOCUMENTS)
    return adapted(
        input_ids=torch.tensor([QUESTION]),
        position_ids=torch.arange(start, start + len(QUESTION))[None],
        attention_mask=torch.ones(1, sum(map(len, DOCUMENTS)) + len(QUESTION), dtype=torch.long),
        past_key_values=slots,
    ).logits[:, -1]


@torch.no_grad()
def one_pass(adapted: torch.nn.Module) -> torch.Tensor:
    """Return the logits (1, V) that :func:`joined` must have."""
    return adapted(input_ids=torch.tensor([_joined_ids()])).logits[:, -1]


def _joined_ids() -> list[int]:
    return [*(i for ids in DOCUMENTS for i in ids), *QUESTION]


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())
