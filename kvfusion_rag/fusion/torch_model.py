"""A model on torch and transformers: Dp and Dt, which share their weights or have their own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from transformers import PreTrainedTokenizerBase

from ..errors import InvalidInputError, UnsupportedModelError
from ..model.attention.ape import Ape
from ..model.backbone import Backbone
from ..model.kv import DocumentKV
from ..model.rope import PositionLimit
from ..schema import GateReport
from ..text.answer_format import AnswerFormat
from ..text.settings import ModelSettings
from .attention_shares import attention_shares
from .constraints import Constraint, ConstraintCompiler
from .decode import DecodingPlan, decode, log_probabilities
from .fused_cache import BufferPool, FusedBuffer, FusedContext
from .gate import require_explicit_attention, run_gate
from .interface import ApeFactors, Capabilities, Ids
from .likelihood import token_log_probabilities
from .prefill import TOKENS_PER_PASS, kv_shape, prefill, prefill_prefix
from .sampling import to_list


class TorchModel:
    """See :class:`~kvfusion_rag.fusion.interface.FusionModel`.

    Args:
        backbone: Dp, and Dt with its adapter on.
        decoder: Dt if it has its own weights (full fine-tuning).
        tokens_per_pass: padded tokens of one prefill pass. Default: a value for the device.

    Raises:
        UnsupportedModelError: the decoder belongs to another base model.
        InvalidInputError: the decoder has another dtype or device than the backbone.
    """

    def __init__(
        self, backbone: Backbone, decoder: Backbone | None = None, *, tokens_per_pass: int | None = None
    ) -> None:
        self.backbone, self.decoder = backbone, decoder or backbone
        _require_same_kvs(self.backbone, self.decoder)
        kind = "cpu" if backbone.device.type == "cpu" else "accelerator"
        self.tokens_per_pass = tokens_per_pass or TOKENS_PER_PASS[kind]
        self.kv_shape = kv_shape(backbone)
        self._pool = BufferPool()
        self._constraints = ConstraintCompiler(backbone.tokenizer, backbone.config.vocab_size, backbone.end_ids)
        self._has_explicit_attention = False  # until measured

    @property
    def model_id(self) -> str:
        return self.backbone.model_id

    @property
    def revision(self) -> str | None:
        return self.backbone.revision

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return self.backbone.tokenizer

    @property
    def settings(self) -> ModelSettings:
        return self.decoder.settings

    @property
    def base_settings(self) -> ModelSettings:
        return self.backbone.base_settings

    @property
    def context_window(self) -> int | None:
        return self.backbone.context_window

    @property
    def position_limit(self) -> PositionLimit:
        return self.backbone.position_limit

    @property
    def vocabulary_size(self) -> int:
        return self.backbone.config.vocab_size

    @property
    def end_ids(self) -> frozenset[int]:
        return self.backbone.end_ids

    @property
    def end_id(self) -> int | None:
        return self.backbone.end_id

    @property
    def max_new_tokens(self) -> int | None:
        return self.decoder.max_new_tokens

    @property
    def is_tuned(self) -> bool:
        return self.decoder is not self.backbone or self.backbone.has_adapter

    @property
    def device(self) -> torch.device:
        return self.backbone.device

    @property
    def capabilities(self) -> Capabilities:
        return Capabilities(self.backbone.takes_any_mask and self.decoder.takes_any_mask, attention=True)

    # Identity

    @property
    def weights_digest(self) -> str:
        return self.backbone.weights_digest

    @property
    def adapter_digest(self) -> str | None:
        return self.backbone.adapter_digest

    def fingerprint(self) -> str:
        return self.backbone.fingerprint()

    def portable_fingerprint(self) -> str:
        return self.backbone.portable_fingerprint()

    def environment(self) -> Mapping[str, str | None]:
        return self.backbone.environment()

    def identity(self) -> Mapping[str, str | None]:
        return {
            "model": self.backbone.fingerprint(),
            "adapter": self.adapter_digest,
            "decoder": None if self.decoder is self.backbone else self.decoder.fingerprint(),
            "dtype": str(self.backbone.dtype).removeprefix("torch."),
        }

    def reset_digest(self) -> None:
        self.backbone.digest_again()

    # Documents and answering

    def prefill(
        self, documents: Sequence[Ids], prefix: DocumentKV | None, starts: Sequence[int] | None = None
    ) -> Iterator[tuple[int, DocumentKV]]:
        return prefill(self.backbone, documents, prefix, tokens_per_pass=self.tokens_per_pass, starts=starts)

    def buffer(self, lengths: Sequence[int], *, room: int) -> FusedBuffer:
        return FusedBuffer(lengths, self.kv_shape, self.device, room=room, pool=self._pool)

    def plan(
        self, context: FusedContext, prefix_lengths: Sequence[int], *, tuned: bool, ape: ApeFactors | None
    ) -> DecodingPlan:
        attention = None if ape is None else Ape.over(context.mask, prefix_lengths, ape.temperature, ape.scale)
        return DecodingPlan(self.decoder if tuned else self.backbone, adapter=tuned, ape=attention)

    def constraint(self, format: AnswerFormat) -> Constraint:
        return self._constraints.compile(format)

    decode = staticmethod(decode)
    answer_likelihoods = staticmethod(log_probabilities)
    attention_shares = staticmethod(attention_shares)

    def token_likelihoods(
        self, prefix: DocumentKV | None, documents: Sequence[DocumentKV | None], ids: Sequence[int], *, given: int
    ) -> list[list[float]]:
        return to_list(token_log_probabilities(self.backbone, prefix, documents, ids, given=given))

    # Support

    def run_gate(self, prefix_ids: Ids, ordinary_ids: Sequence[int]) -> GateReport:
        prefix = prefill_prefix(self.backbone, prefix_ids)
        return run_gate(self.backbone, prefix, ordinary_ids, tokens_per_pass=self.tokens_per_pass)

    def require_explicit_attention(self, prefix_ids: Ids, ordinary_ids: Sequence[int]) -> None:
        if not self._has_explicit_attention:
            prefix = prefill_prefix(self.backbone, prefix_ids)
            require_explicit_attention(self.backbone, prefix, ordinary_ids, tokens_per_pass=self.tokens_per_pass)
            self._has_explicit_attention = True

    def release_memory(self) -> int:
        released = self._pool.clear()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        return released


def _require_same_kvs(backbone: Backbone, decoder: Backbone) -> None:
    shapes = [_cache_shape(model) for model in (backbone, decoder)]
    if shapes[0] != shapes[1]:
        raise UnsupportedModelError(
            f"{decoder.model_id!r} cannot read the keys and values of {backbone.model_id!r}: its layers, heads, width "
            f"and vocabulary are {shapes[1]}, not {shapes[0]}; it was tuned from another base model."
        )
    if (decoder.dtype, decoder.device) != (backbone.dtype, backbone.device):
        raise InvalidInputError(
            f"the decoder {decoder.model_id!r} is in {decoder.dtype} on {decoder.device}, but {backbone.model_id!r}, "
            f"whose keys it reads, is in {backbone.dtype} on {backbone.device}; load both with the same dtype and "
            "device."
        )


def _cache_shape(model: Backbone) -> tuple[int, ...]:
    """Return the sizes that must be equal for one model to read the other's KVs and token ids."""
    config = model.config
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    return config.num_hidden_layers, heads, config.hidden_size, config.vocab_size
