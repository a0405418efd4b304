"""The reasons why a model cannot be fused exactly, as far as its configuration shows them.

Each function returns a reason with advice, or None if its reason does not apply. ``checks.py`` puts them in order.
"""

from __future__ import annotations

import inspect
from collections.abc import Container
from typing import cast

from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, DynamicCache, PretrainedConfig
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer
from transformers.models.auto.modeling_auto import MODEL_FOR_MULTIMODAL_LM_MAPPING

from ..attention.windows import CHUNKED, FULL, SLIDING
from ..document_cache import PLACEHOLDERS
from ..pretrained import PreTrainedModel
from ..text_part import MULTIMODAL_TYPES

INSTEAD = "use a decoder with attention in every layer, such as Qwen3, Llama 3 or SmolLM3"

ATTENTION_LAYERS = {FULL, SLIDING, CHUNKED, "attention"}
SPARSE_LAYERS = {"indexed_attention", "compressed_sparse_attention", "heavily_compressed_attention"}
KV_SIZES = {"head_dim", "num_key_value_heads", "v_head_dim"}
STATELESS_LAYERS = {"mlp", "moe"}
RECURRENT_TYPES = {"rwkv", "xlstm"}  # their configurations do not list kinds of layers
ALIBI_TYPES = {"bloom", "mpt"}  # falcon has a flag
BIDIRECTIONAL_PREFIX_TYPES = {"paligemma"}
# Endings of class names in ``architectures`` that stand for a head other than one over the vocabulary.
OTHER_HEADS = ("ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering", "ForMultipleChoice",
               "ForRewardModel", "RewardModel", "ForMaskedLM")  # fmt: skip
LANGUAGE_MODEL_HEADS = ("LMHeadModel", "ModelWithLMHead", "ForConditionalGeneration")


def other_task(config: PretrainedConfig) -> str | None:
    """Return the reason if the model was made for another task than writing text."""
    if config.is_encoder_decoder:
        return (
            "it is an encoder-decoder model, whose documents are read by an encoder that has no cache to fuse, but "
            f"fusion needs a decoder-only model; {INSTEAD}"
        )
    for name in config.architectures or ():
        if name.endswith(OTHER_HEADS):
            return f"it is a classifier or reranker ({name}), which returns scores and no text; {INSTEAD}"
        if name.endswith("Model") and not name.endswith(LANGUAGE_MODEL_HEADS):
            return f"it has no head that writes text ({name}), as embedding models do not; {INSTEAD}"
    if not any(type(config) in mapping for mapping in (MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MULTIMODAL_LM_MAPPING)):
        return f"transformers has no language model of the type {config.model_type!r} that writes text; {INSTEAD}"
    return None


def sees_later_tokens(config: PretrainedConfig) -> str | None:
    """Return the reason if attention is not causal."""
    # Models that are also used as encoders have both fields. GPT-NeoX has only is_decoder, which it ignores.
    if hasattr(config, "add_cross_attention") and getattr(config, "is_decoder", True) is False:
        return f"it is an encoder (is_decoder is false), which attends to later tokens; {INSTEAD}"
    if getattr(config, "use_bidirectional_attention", None) in (True, "all") or (
        getattr(config, "is_causal", True) is False
    ):
        return f"it attends to later tokens (bidirectional attention), as embedding models do; {INSTEAD}"
    if config.model_type in BIDIRECTIONAL_PREFIX_TYPES:
        return f"all tokens of its prompt attend to each other, so a document's keys depend on the question; {INSTEAD}"
    return None


def no_keys_per_token(config: PretrainedConfig) -> str | None:
    """Return the reason if a layer keeps something else than keys and values of every token."""
    kinds = _layer_kinds(config)
    running = sorted(kinds - ATTENTION_LAYERS - SPARSE_LAYERS - STATELESS_LAYERS)
    if running or config.model_type in RECURRENT_TYPES:
        names = f" ({', '.join(running)})" if running else ""
        return (
            f"it has layers with one running state of all text{names} instead of keys and values of each token, so "
            f"documents that are read separately cannot be joined; {INSTEAD}"
        )
    if kinds & SPARSE_LAYERS or getattr(config, "index_topk", None) or getattr(config, "index_topk_blocks", None):
        return (
            "a sparse indexer chooses the tokens that each layer attends to, and its own cache is not fused; "
            f"{INSTEAD}"
        )
    if getattr(config, "cross_attention_layers", None):
        return f"some of its layers attend to an image (cross-attention) and have no keys of the text; {INSTEAD}"
    if not hasattr(config, "num_hidden_layers"):
        return f"it has several stacks of layers instead of one, whose caches cannot be fused; {INSTEAD}"
    if getattr(config, "global_head_dim", None) or KV_SIZES & set(getattr(config, "per_layer_attributes", None) or ()):
        return f"number or width of its keys differ between layers, but a document's KV has one shape; {INSTEAD}"
    return None


def other_cache(config: PretrainedConfig) -> str | None:
    """Return the reason if the implementation takes another cache than keys and values of each token."""
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        return f"transformers cannot load it as a text model alone; {INSTEAD}"
    if "past_key_values" not in _arguments(config):
        return f"its implementation in transformers takes no cache of keys and values; {INSTEAD}"
    layers = [layer for layer in DynamicCache(config=config).layers if not isinstance(layer, PLACEHOLDERS)]
    if any(type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer) for layer in layers):
        return f"its cache has other contents than keys and values of each token; {INSTEAD}"
    return None


def counts_slots(config: PretrainedConfig) -> str | None:
    """Return the reason if positions are counted in the cache, where documents lie one after another."""
    if config.model_type in ALIBI_TYPES or getattr(config, "alibi", False):
        return (
            "its ALiBi bias counts the tokens between question and document, so the order of documents would matter; "
            f"{INSTEAD}"
        )
    if "position_ids" not in _arguments(config):
        return f"its implementation in transformers takes no positions, so documents cannot share them; {INSTEAD}"
    return None


def unmeasured_text_part(config: PretrainedConfig) -> str | None:
    """Return the reason if the model is multimodal, and its text model has not been compared with the whole."""
    if config.model_type in MULTIMODAL_TYPES:
        return None
    return (
        f"it is multimodal ({config.model_type}), and its text model has not been shown to give the same logits; "
        f"{INSTEAD}"
    )


def _layer_kinds(config: PretrainedConfig) -> set[str]:
    names = ("layer_types", "layers_block_type", "block_types")
    return {str(kind) for name in names for kind in getattr(config, name, None) or ()}


def _arguments(config: PretrainedConfig) -> Container[str]:
    """Return the names of the arguments that the model's forward declares. It ignores all others."""
    model = cast(type[PreTrainedModel], MODEL_FOR_CAUSAL_LM_MAPPING[type(config)])
    return inspect.signature(model.forward).parameters
