"""The share of attention that each document received while an answer was decoded."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch

from ..model.attention.weights import AttentionSum
from .decode import DecodingPlan
from .fused_cache import FusedContext
from .interface import Question, Span
from .slot_table import StepInputs

WEIGHTS_AT_ONCE = 1 << 26  # attention weights of one layer


@torch.inference_mode()
def attention_shares(
    plan: DecodingPlan,
    context: FusedContext,
    question: Question,
    answer: Sequence[int],
    spans: Sequence[Sequence[Span]],
    *,
    before_pass: Callable[[], None],
) -> list[float]:
    """Return each document's mean share, over layers and heads, of the attention that chose the answer's tokens.

    Args:
        context: fused context of one row. It cannot be used again.
        answer: token ids of the answer.
        spans: slots (start, end) of the pieces of each document.
        before_pass: called before each forward pass; it may raise.
    """
    device = plan.decoder.device
    attention = AttentionSum(max((end for group in spans for _, end in group), default=0), device)
    ids, first = [*question.ids, *answer[:-1]], len(question.ids) - 1
    fused = context.mask.shape[1]
    step = max(1, WEIGHTS_AT_ONCE // ((fused + len(ids)) * plan.decoder.config.num_attention_heads))
    cuts = [0, *([first] if first else []), *range(first + step, len(ids), step), len(ids)]
    mask = torch.cat([context.mask, context.mask.new_ones(1, len(ids))], dim=1)
    for start, end in pairwise(cuts):
        before_pass()
        inputs = StepInputs(
            torch.tensor([ids[start:end]], device=device),
            torch.arange(question.start + start, question.start + end, device=device)[None],
            mask[:, : fused + end],
            torch.tensor([0], device=device),
            torch.tensor([end - start - 1], device=device),
        )
        plan.logits(context, inputs, attention if start >= first else None)
    return attention.shares(spans)
