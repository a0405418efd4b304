"""Where tokens stand: RoPE or learned position ids, and the mask that fusion is equal to.

Pure functions on numbers, used by training, evaluation and inference alike, so that the three cannot
disagree (paper section 3.2: every document at p_1..p_n, the question from p_{n+1} on). A *slot* is an index
in the cache, a *position* is what the model is told; the two are independent.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch


def document_positions(prefix_length: int, num_tokens: int) -> torch.Tensor:
    """Positions (T,) of one document: right after the shared prefix, whatever other documents there are."""
    return torch.arange(prefix_length, prefix_length + num_tokens)


def question_start(prefix_length: int, passage_length: int | None, longest_document: int) -> int:
    """Position of the question's first token.

    ``passage_length`` (tokens) if every document fits into it, else the longest document's length. Without
    documents the question follows the prefix at once, as in plain generation.
    """
    if longest_document == 0:
        return prefix_length
    return prefix_length + max(passage_length or 0, longest_document)


def global_starts(prefix_length: int, document_lengths: Sequence[int]) -> list[int]:
    """Where documents begin that stand one after another, and last of all the question behind them."""
    return list(accumulate(document_lengths, initial=prefix_length))


def fused_positions(
    prefix_length: int, document_lengths: Sequence[int], start: int, question_length: int
) -> torch.Tensor:
    """Positions (K + Q,) of prefix, documents and question laid out in one row."""
    documents = [document_positions(prefix_length, n) for n in document_lengths]
    return torch.cat([torch.arange(prefix_length), *documents, torch.arange(start, start + question_length)])


def block_mask(prefix_length: int, document_lengths: Sequence[int], question_length: int) -> torch.Tensor:
    """What may attend to what, (K + Q, K + Q) bool, in the single pass that fusion is equal to.

    A document sees the prefix and itself; the question sees everything before it. Causal everywhere.
    """
    blocks = [-1] * prefix_length
    for block, length in enumerate(document_lengths):
        blocks += [block] * length
    blocks += [len(document_lengths)] * question_length
    owner = torch.tensor(blocks)
    same_block = owner[:, None] == owner[None, :]
    seen_by_all = (owner == -1)[None, :]
    is_question = (owner == len(document_lengths))[:, None]
    causal = torch.ones(len(blocks), len(blocks), dtype=torch.bool).tril()
    return causal & (same_block | seen_by_all | is_question)  # (K + Q, K + Q)


def additive(mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A bool mask as what is added to attention logits, the one form that every attention implementation takes.

    One that is additive already is returned as it is.
    """
    if mask.is_floating_point():
        return mask
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, torch.finfo(dtype).min)


def packed_mask(context: torch.Tensor, question_of: torch.Tensor, written: torch.Tensor | None = None) -> torch.Tensor:
    """What the tokens of questions that share one fused context may attend to, (R, 1, Q, K + W + Q) bool.

    Every question sees the documents and, causally, itself, but none of the questions beside it.

    Args:
        context: (R, K), 1 where a slot of the fused context is real; or (R, Q, K), where that differs by question.
        question_of: (R, Q), number of the question that a token belongs to; pads have a number of their own, so
            that they see something and their softmax is defined.
        written: (R, W), the same of the tokens behind the context that were read or written before.
    """
    length = question_of.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool, device=question_of.device).tril()
    own = (question_of[:, :, None] == question_of[:, None, :]) & causal  # (R, Q, Q)
    documents = context.bool()
    parts = [documents if context.dim() == 3 else documents[:, None, :].expand(-1, length, -1), own]
    if written is not None:
        parts.insert(1, question_of[:, :, None] == written[:, None, :])
    return torch.cat(parts, dim=2)[:, None]
