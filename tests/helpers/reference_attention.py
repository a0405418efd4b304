"""An independent reference: attention written out, in one pass over prefix, documents, question and answer.

Nothing here comes from the package. Each token of a row has an owner and a position, made by hand, and the attention
function decides from them who sees whom. Models call it through transformers' ``AttentionInterface``, under a name
that only tests use. No mask function is registered for that name, so transformers makes no mask of its own.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AttentionInterface, DynamicCache, PretrainedConfig, PreTrainedModel

NAME = "reference_of_tests"
PREFIX = -1
# Models that compute attention themselves. They take the mask as an argument, and all their layers are alike.
OWN_ATTENTION = frozenset({"bloom", "codegen", "falcon", "gpt_neo", "gptj", "mpt", "openai-gpt", "xglm"})


@dataclass(frozen=True)
class Row:
    """Tokens of one pass.

    Attributes:
        ids: (S,) token ids.
        owners: (S,) :data:`PREFIX`, the number of a document, or the number of documents for question and answer.
        positions: (S,) what the model takes for the place of each token.
        last_owner: owner of question and answer.
    """

    ids: torch.Tensor
    owners: torch.Tensor
    positions: torch.Tensor
    last_owner: int

    @classmethod
    def of(
        cls, prefix: Sequence[int], documents: Sequence[Sequence[int]], starts: Sequence[int], question: Sequence[int],
        question_start: int,
    ) -> Row:  # fmt: skip
        """Return a row of a prefix at position 0, documents that begin at ``starts``, and a question."""
        ids, owners, positions = list(prefix), [PREFIX] * len(prefix), list(range(len(prefix)))
        parts = [*zip(documents, starts, strict=True), (question, question_start)]
        for owner, (part, start) in enumerate(parts):
            ids += part
            owners += [owner] * len(part)
            positions += range(start, start + len(part))
        return cls(torch.tensor(ids), torch.tensor(owners), torch.tensor(positions), len(documents))

    @classmethod
    def contiguous(cls, ids: Sequence[int]) -> Row:
        """Return one ordinary text."""
        return cls.of((), (), (), ids, 0)

    @property
    def context(self) -> int:
        """Number of tokens in front of the question."""
        return int((self.owners != self.last_owner).sum())

    def sees(self, kind: str, reach: int | None) -> torch.Tensor:
        """Return (S, S) bool: whether the token of a row of the result sees the token of a column.

        Args:
            kind: kind of the layer, as in ``layer_types``.
            reach: window or chunk in positions, which full attention has not.
        """
        order = torch.arange(len(self.ids))
        asks, seen = self.owners[:, None], self.owners[None, :]
        allowed = (asks == self.last_owner) | (asks == seen) | (seen == PREFIX)
        allowed &= order[:, None] >= order[None, :]
        here, there = self.positions[:, None], self.positions[None, :]
        if kind == "sliding_attention":
            allowed &= here - there < reach
        elif kind == "chunked_attention":
            allowed &= here // reach == there // reach
        else:
            assert kind == "full_attention", kind
        return allowed


_ROW: ContextVar[Row] = ContextVar("row of the pass")
_WEIGHTS: ContextVar[list[torch.Tensor]] = ContextVar("weights of the pass")  # one tensor per layer


def layer_kind(config: PretrainedConfig, layer: int) -> tuple[str, int | None]:
    """Return the kind of a layer's attention, and its window or chunk in positions."""
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    kind = kinds[layer] if kinds else "sliding_attention" if window else "full_attention"
    return kind, config.attention_chunk_size if kind == "chunked_attention" else window


def reference_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return softmax(Q K^T scaling) V, (1, Q, H, d), over the tokens that each query sees, and the weights.

    Args:
        query: (1, H, Q, d), the last Q tokens of the row.
        key: (1, H_kv, S, d).
        value: (1, H_kv, S, d_v).
        softcap: limit of the logits, by tanh.
        s_aux: (H,) logits of the sinks, which take part of the attention and give nothing.
    """
    assert attention_mask is None, "the model made a mask of its own"
    row, queries, slots = _ROW.get(), query.shape[2], key.shape[2]
    kind, reach = layer_kind(module.config, getattr(module, "layer_idx", 0))  # type: ignore[arg-type]
    sees = row.sees(kind, reach)[slots - queries : slots, :slots]
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    logits = query.float() @ key.float().transpose(2, 3) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    logits = logits.masked_fill(~sees, float("-inf"))
    if s_aux is not None:
        sinks = s_aux.float()[None, :, None, None].expand(1, -1, queries, 1)
        logits = torch.cat([logits, sinks], dim=-1)
    weights = logits.softmax(dim=-1)[..., :slots]
    _WEIGHTS.get().append(weights)
    return (weights.to(value.dtype) @ value).transpose(1, 2).contiguous(), weights


def use_reference(network: PreTrainedModel) -> PreTrainedModel:
    """Make ``network`` compute attention by this module, and return it."""
    AttentionInterface.register(NAME, reference_attention)
    network.set_attn_implementation("eager" if network.config.model_type in OWN_ATTENTION else NAME)
    return network


@torch.no_grad()
def run(
    network: PreTrainedModel, row: Row, first: int = 0, cache: DynamicCache | None = None,
    weights: list[torch.Tensor] | None = None,
) -> torch.Tensor:  # fmt: skip
    """Return the logits (S - first, V) of the tokens from ``first`` on.

    Args:
        cache: keys and values of the tokens before ``first``; grows by the others.
        weights: receives the attention (1, H, S - first, S) of each layer.
    """
    extra: dict[str, Any] = {}
    if network.config.model_type in OWN_ATTENTION:
        sees = row.sees("full_attention", None)[first:]
        hidden = torch.finfo(torch.float32).min
        extra["attention_mask"] = torch.zeros(sees.shape).masked_fill(~sees, hidden)[None, None]
    with _pass_over(row, weights):
        out = network(
            input_ids=row.ids[None, first:],
            position_ids=row.positions[None, first:],
            use_cache=cache is not None,
            past_key_values=cache,
            **extra,
        )
    return out.logits[0].float()


def run_in_two_steps(reader: PreTrainedModel, answerer: PreTrainedModel, row: Row) -> torch.Tensor:
    """Return the logits (Q, V) of question and answer by ``answerer``, over keys and values that ``reader`` made."""
    context, cache = row.context, DynamicCache()
    before = Row(row.ids[:context], row.owners[:context], row.positions[:context], row.last_owner)
    run(reader, before, cache=cache)
    return run(answerer, row, first=context, cache=cache)


@contextmanager
def _pass_over(row: Row, weights: list[torch.Tensor] | None) -> Generator[None]:
    before = _ROW.set(row), _WEIGHTS.set([] if weights is None else weights)
    try:
        yield
    finally:
        _ROW.reset(before[0])
        _WEIGHTS.reset(before[1])
