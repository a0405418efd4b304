"""The numeric half of the support gate: measures at load time whether fusion is exact on a model.

Six laws are checked on a few random tokens. A model that ignores explicit positions, counts cache slots or rotates
keys late fails one of them, whatever its configuration says.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import torch
from torch.nn.functional import pad
from transformers import DynamicCache, PretrainedConfig
from transformers.cache_utils import DynamicLayer

from ..errors import UnsupportedModelError
from ..model.attention.ape import Ape
from ..model.backbone import Backbone
from ..model.document_cache import PositionedCache
from ..model.kv import DocumentKV
from ..model.positions import additive, block_mask, fused_positions, question_start
from ..model.support import configuration_checks
from ..model.tolerance import relative_error, tolerance_of
from ..schema import Check, GateReport
from .fused_cache import fuse
from .prefill import prefill
from .sampling import to_list

DOCUMENT_LENGTHS = (11, 7)
QUESTION_LENGTH = 5
LEAST_EMPTY_SLOTS = 512  # empty slots of the sixth law; more if the configuration names a longer distance
DISTANCES = ("sliding_window", "attention_chunk_size", "window_size", "floor_scale")  # of configurations, in tokens


def run_gate(
    backbone: Backbone, prefix: DocumentKV | None, ordinary_ids: Sequence[int], *, tokens_per_pass: int
) -> GateReport:
    """Measure the six laws.

    Args:
        prefix: KV of the model's shared prefix.
        ordinary_ids: token ids to draw from, without control tokens.
        tokens_per_pass: padded tokens of a prefill pass, as documents will be prefilled.

    Raises:
        UnsupportedModelError: a law does not hold. The message contains it with the measured numbers.
    """
    checks = (*configuration_checks(backbone.model.config), *_measure(backbone, prefix, ordinary_ids, tokens_per_pass))
    failed = [check for check in checks if not check.passed]
    if failed:
        raise UnsupportedModelError(
            f"{backbone.model_id!r} ({backbone.config.model_type}) failed the support gate: "
            f"{failed[0].name}: {failed[0].detail}."
        )
    return GateReport(backbone.model_id, checks)


def require_explicit_attention(
    backbone: Backbone, prefix: DocumentKV | None, ordinary_ids: Sequence[int], *, tokens_per_pass: int
) -> None:
    """Measure whether explicit attention, which mode "ape" and attribution need, is exact on this model.

    The model must have passed the gate. Arguments are those of :func:`run_gate`.

    Raises:
        UnsupportedModelError: the model's attention does more than softmax attention, or cannot be replaced.
    """
    checks = _probed(lambda: _Probe(backbone, prefix, ordinary_ids, tokens_per_pass).ape_checks())
    if failed := [check for check in checks if not check.passed]:
        raise UnsupportedModelError(
            f"{backbone.model_id!r} ({backbone.config.model_type}) cannot answer in mode 'ape' or measure attention: "
            f"{failed[0].name}: {failed[0].detail}; modes 'fusion' and 'concat' work."
        )


def _measure(
    backbone: Backbone, prefix: DocumentKV | None, ordinary_ids: Sequence[int], tokens_per_pass: int
) -> tuple[Check, ...]:
    def laws() -> tuple[Check, ...]:
        probe = _Probe(backbone, prefix, ordinary_ids, tokens_per_pass)
        return (
            probe.a_documents_kv_is_its_own(),
            probe.one_document_is_an_ordinary_pass(),
            probe.two_documents_are_one_block_masked_pass(),
            probe.order_does_not_matter(),
            probe.positions_are_honoured(),
            probe.empty_slots_do_not_matter(),
        )

    return _probed(laws)


def _probed(measure: Callable[[], tuple[Check, ...]]) -> tuple[Check, ...]:
    """Return the checks of ``measure``, or one failed check if the model raises."""
    try:
        return measure()
    except torch.OutOfMemoryError:
        raise  # this is not about the architecture
    except (ValueError, TypeError, RuntimeError, KeyError) as error:
        return (Check("forward passes over a fused cache", False, f"the model raises {str(error).rstrip('.')!r}"),)


class _Probe:
    """Two random documents and a question, answered fused and in one pass."""

    def __init__(
        self, backbone: Backbone, prefix: DocumentKV | None, ordinary_ids: Sequence[int], tokens_per_pass: int
    ) -> None:
        rng = torch.Generator().manual_seed(0)
        pool = torch.tensor(ordinary_ids)
        total = sum(DOCUMENT_LENGTHS) + QUESTION_LENGTH
        drawn: list[int] = to_list(pool[torch.randint(len(pool), (total,), generator=rng)])
        first, second = DOCUMENT_LENGTHS
        self.documents = [tuple(drawn[:first]), tuple(drawn[first : first + second])]
        self.question = drawn[first + second :]
        self.backbone, self.prefix = backbone, prefix
        self.prefix_ids = list(prefix.token_ids) if prefix else []
        self.tokens_per_pass = tokens_per_pass
        self.kvs = self._prefill(self.documents)
        self.tolerance = tolerance_of(backbone.dtype)

    @cached_property
    def fused(self) -> torch.Tensor:
        """Logits (1, V) of the question over both fused documents."""
        return self._fused(self.kvs)

    def a_documents_kv_is_its_own(self) -> Check:
        alone = self._prefill(self.documents[1:])[0]
        same = torch.equal(alone.keys, self.kvs[1].keys) and torch.equal(alone.values, self.kvs[1].values)
        detail = "the same bits" if same else "its bits differ when it is prefilled alone; try tokens_per_pass=1"
        return Check("a document's KV does not depend on its neighbours", same, detail)

    def one_document_is_an_ordinary_pass(self) -> Check:
        document = self.documents[0]
        ids = [*self.prefix_ids, *document, *self.question]
        mask = torch.ones(1, len(ids))
        ordinary = self._forward(ids, torch.arange(len(ids)), mask, DynamicCache(config=self.backbone.config))
        return self._compare("one fused document = ordinary pass", self._fused(self.kvs[:1]), ordinary)

    def two_documents_are_one_block_masked_pass(self) -> Check:
        ids = [*self.prefix_ids, *self.documents[0], *self.documents[1], *self.question]
        p = len(self.prefix_ids)
        positions = fused_positions(
            p, DOCUMENT_LENGTHS, question_start(p, None, max(DOCUMENT_LENGTHS)), QUESTION_LENGTH
        )
        mask = self._block_mask(DOCUMENT_LENGTHS)
        single = self._forward(ids, positions, mask, PositionedCache(torch.empty(1, 0, dtype=torch.long)))
        return self._compare("two fused documents = one block-masked pass", self.fused, single)

    def order_does_not_matter(self) -> Check:
        return self._compare("the order only changes logits by rounding", self.fused, self._fused(self.kvs[::-1]))

    def positions_are_honoured(self) -> Check:
        moved = not torch.equal(self.fused, self._fused(self.kvs, shift=3))
        detail = "the question's position changes the logits" if moved else "the model ignores explicit position ids"
        return Check("explicit positions are honoured", moved, detail)

    def empty_slots_do_not_matter(self) -> Check:
        config = self.backbone.config
        count = 1 + max([LEAST_EMPTY_SLOTS, *_distances(config)])
        context = fuse([self.kvs], self.backbone.device, [self.prefix])
        layers = [_SpacedLayer(*layer.states, count) for layer in context.layers]
        positions = pad(context.cache.positions, (0, count))
        mask = pad(context.mask, (0, count))
        found = self._ask(PositionedCache(positions, layers), mask)
        return self._compare(f"{count} empty slots before the question change nothing", found, self.fused)

    def _block_mask(self, document_lengths: Sequence[int]) -> torch.Tensor:
        mask = block_mask(len(self.prefix_ids), document_lengths, QUESTION_LENGTH)
        return additive(mask, self.backbone.dtype)[None, None]

    def ape_checks(self) -> tuple[Check, ...]:
        """Check that APE with T = S = 1 equals the model's own attention, and that other factors have an effect."""
        neutral = self._fused(self.kvs, ape=(1.0, 1.0))
        used = not torch.equal(neutral, self._fused(self.kvs, ape=(0.5, 0.5)))
        detail = "temperature and scale change the logits" if used else "its attention cannot be replaced"
        return (
            self._compare("APE with temperature and scale 1 = fusion", neutral, self.fused),
            Check("APE's attention is used", used, detail),
        )

    def _prefill(self, documents: list[tuple[int, ...]]) -> list[DocumentKV]:
        done = dict(prefill(self.backbone, documents, self.prefix, tokens_per_pass=self.tokens_per_pass))
        return [done[index] for index in range(len(documents))]

    def _fused(self, kvs: list[DocumentKV], shift: int = 0, ape: tuple[float, float] | None = None) -> torch.Tensor:
        context = fuse([kvs], self.backbone.device, [self.prefix])
        weighed = None if ape is None else Ape.over(context.mask, [len(self.prefix_ids)], *ape)
        start = self._start(kvs) + shift
        return self._ask(context.cache, context.mask, start=start, ape=weighed)

    def _start(self, kvs: list[DocumentKV]) -> int:
        return question_start(len(self.prefix_ids), None, max(kv.num_tokens for kv in kvs))

    def _ask(
        self, cache: DynamicCache, mask: torch.Tensor, *, start: int | None = None, ape: Ape | None = None
    ) -> torch.Tensor:
        """Return the logits of the question over a cache with the mask (1, K)."""
        start = self._start(self.kvs) if start is None else start
        positions = torch.arange(start, start + QUESTION_LENGTH)
        whole = torch.cat([mask, mask.new_ones(1, QUESTION_LENGTH)], dim=1)
        return self._forward(self.question, positions, whole, cache, ape)

    def _forward(
        self, ids: list[int], positions: torch.Tensor, mask: torch.Tensor, cache: DynamicCache, ape: Ape | None = None
    ) -> torch.Tensor:
        device = self.backbone.device
        mask = mask.to(device) if mask.dim() == 4 else mask.long().to(device)
        return self.backbone.forward(
            torch.tensor([ids], device=device),
            positions[None].to(device),
            mask,
            cache,
            torch.tensor([len(ids) - 1], device=device),
            adapter=False,  # the laws are about the base model; an adapter only changes the decoder
            ape=ape,
        )

    def _compare(self, name: str, found: torch.Tensor, expected: torch.Tensor) -> Check:
        error = relative_error(found, expected)
        passed = error <= self.tolerance  # False for NaN
        return Check(name, passed, f"relative error {error:.1e}, allowed {self.tolerance:.0e}")


class _SpacedLayer(DynamicLayer):
    """One layer of documents, with empty slots between them and what follows. They take memory only while it runs."""

    def __init__(self, keys: torch.Tensor, values: torch.Tensor, empty: int) -> None:
        super().__init__()  # pyright: ignore[reportUnknownMemberType]
        super().update(keys, values)  # pyright: ignore[reportUnknownMemberType]
        self._documents, self._empty = keys.shape[2], empty

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        keys, values = super().update(key_states, value_states)  # pyright: ignore[reportUnknownMemberType]
        return self._spaced(keys), self._spaced(values)

    def get_seq_length(self) -> int:
        return super().get_seq_length() + self._empty

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def _spaced(self, states: torch.Tensor) -> torch.Tensor:
        rows, heads, _, width = states.shape
        empty = states.new_zeros(rows, heads, self._empty, width)
        return torch.cat([states[:, :, : self._documents], empty, states[:, :, self._documents :]], dim=2)


def _distances(config: PretrainedConfig) -> list[int]:
    """Return the distances in tokens that a configuration names, since empty slots must exceed them."""
    values = [getattr(config, name, None) for name in DISTANCES]
    return [value for value in values if isinstance(value, int)]
