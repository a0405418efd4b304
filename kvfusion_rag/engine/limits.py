"""What does not fit: prompts into a model's window, settings and tokenizers to its weights, batches into memory.

Each refusal says what was wrong, what is allowed and what helps. Keeps no state.
"""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from ..errors import ContextLimitError, InvalidInputError, MemoryLimitError, UnsupportedModelError
from ..model.backbone import Backbone
from ..schema import Mode
from ..text.encoder import PromptEncoder
from ..text.settings import ModelSettings, Positions

_SHORTAGE = ("can't allocate memory", "out of memory", "alloc_failed")  # CPU; CUDA, MPS; cuBLAS


def require_fit(backbone: Backbone, decoder: Backbone, encoder: PromptEncoder, settings: ModelSettings) -> None:
    """Refuse settings, decoders and tokenizers that no question could be asked with.

    Raises:
        UnsupportedModelError: the decoder or the tokenizer belongs to another model.
        InvalidInputError: prefix and passage length leave no room for a question; or the decoder has another dtype or
            device.
    """
    window, rows = backbone.context_window, backbone.config.vocab_size
    if (shapes := [_cache_shape(b) for b in (backbone, decoder)])[0] != shapes[1]:
        raise UnsupportedModelError(
            f"{decoder.model_id!r} cannot read the keys and values of {backbone.model_id!r}: layers, heads, width and "
            f"vocabulary are {shapes[1]} against {shapes[0]}; it was tuned from another base."
        )
    if (decoder.dtype, decoder.device) != (backbone.dtype, backbone.device):
        raise InvalidInputError(
            f"the decoder {decoder.model_id!r} is in {decoder.dtype} on {decoder.device}, but {backbone.model_id!r}, "
            f"whose keys it reads, in {backbone.dtype} on {backbone.device}; load both alike."
        )
    prefix, passage = len(encoder.prefix_ids), settings.passage_length or 1
    if window is not None and prefix + passage + 2 > window:
        raise InvalidInputError(
            f"the prefix has {prefix} tokens and passage_length is {passage}, but {backbone.model_id} has {window} "
            "positions for them, the question and the answer."
        )
    if encoder.plain.largest_id >= rows:
        raise UnsupportedModelError(
            f"the tokenizer of {backbone.model_id!r} gives ids up to {encoder.plain.largest_id}, but the model has "
            f"{rows} embeddings; it belongs to another model."
        )


def room_left(
    backbone: Backbone, *, before: int, question_tokens: int, new_tokens: int, mode: Mode, positions: Positions
) -> int | None:
    """Return the tokens that an answer may have behind ``before`` positions and a question; None if no limit is known.

    Raises:
        ContextLimitError: they are fewer than ``new_tokens``.
    """
    window = backbone.context_window
    if window is None or before + question_tokens + new_tokens <= window:
        return None if window is None else window - before - question_tokens
    hint = "; modes 'fusion' and 'ape' let documents share positions" if mode == "concat" else ""
    if mode == "fusion" and positions == "global":
        hint = "; with positions='uniform' documents share positions"
    raise ContextLimitError(
        f"prefix and documents take {before} positions, the question {question_tokens} and the answer up to "
        f"{new_tokens}, but {backbone.model_id} has {window}; shorten one of them{hint}."
    )


@contextmanager
def memory_errors(device: torch.device, *, questions: int, tokens: int) -> Iterator[None]:
    """Where memory runs out in between, raise MemoryLimitError.

    Args:
        questions, tokens: that were answered together, and of documents in the longest row.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        traceback.clear_frames(error.__traceback__)  # whoever keeps the error would keep the failed pass's tensors
        raise MemoryLimitError(
            f"{device} has not enough memory for {questions} question(s) over {tokens} document tokens; pass fewer or "
            "shorter documents, or load the model in a smaller dtype."
        ) from error


def is_out_of_memory(error: Exception) -> bool:
    """Allocators have an exception of their own; a CPU's, a driver's and a library's have only their messages."""
    told = str(error).lower()
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(sign in told for sign in _SHORTAGE)


def _cache_shape(backbone: Backbone) -> tuple[int, ...]:
    """What two models must share for one to read the other's keys and values, and the same token ids."""
    config = backbone.config
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    return config.num_hidden_layers, heads, config.hidden_size, config.vocab_size
