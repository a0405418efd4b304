"""Positions of tokens, RoPE or learned, and attention masks.

Training, evaluation and inference share these functions, so they cannot disagree. As in section 3.2 of the paper,
every document has positions p_1..p_n and the question starts at p_{n+1}. A *slot* is an index in the cache. A
*position* is the number that the model sees. The two are independent.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch

# Numbers in place of a question's own, for tokens that belong to no question or to all of them.
PADDING, SHARED = -1, -2


def document_positions(prefix_length: int, num_tokens: int) -> torch.Tensor:
    """Return the positions (T,) of one document: right after the shared prefix, regardless of other documents."""
    return torch.arange(prefix_length, prefix_length + num_tokens)


def question_start(prefix_length: int, passage_length: int | None, longest_document: int) -> int:
    """Return the position of the question's first token.

    The question starts ``passage_length`` tokens after the prefix, or after the longest document if that is longer.
    If there are no documents, it follows the prefix directly, as in ordinary generation.
    """
    if longest_document == 0:
        return prefix_length
    return prefix_length + max(passage_length or 0, longest_document)


def global_starts(prefix_length: int, document_lengths: Sequence[int]) -> list[int]:
    """Return the first positions of documents laid out one after another, then that of the question after them."""
    return list(accumulate(document_lengths, initial=prefix_length))


def fused_positions(
    prefix_length: int, document_lengths: Sequence[int], start: int, question_length: int
) -> torch.Tensor:
    """Return the positions (K + Q,) of prefix, documents and question in one row."""
    documents = [document_positions(prefix_length, n) for n in document_lengths]
    return torch.cat([torch.arange(prefix_length), *documents, torch.arange(start, start + question_length)])


def block_mask(prefix_length: int, document_lengths: Sequence[int], question_length: int) -> torch.Tensor:
    """Return the causal mask (K + Q, K + Q), bool, of the single pass that fusion is equivalent to.

    A document sees the prefix and itself. The question sees everything before it.
    """
    blocks = [-1] * prefix_length
    for block, length in enumerate(document_lengths):
        blocks += [block] * length
    blocks += [len(document_lengths)] * question_length
    owner = torch.tensor(blocks)
    same_block = owner[:, None] == owner[None, :]
    is_prefix = (owner == -1)[None, :]
    is_question = (owner == len(document_lengths))[:, None]
    causal = torch.ones(len(blocks), len(blocks), dtype=torch.bool).tril()
    return causal & (same_block | is_prefix | is_question)  # (K + Q, K + Q)


def causal_mask(mask: torch.Tensor, queries: int) -> torch.Tensor:
    """Return the mask (B, 1, Q, S), bool, of the last Q of S tokens.

    Args:
        mask: padding mask (B, S), or a mask (B, 1, Q, S), bool or additive, which is complete already.
        queries: Q.
    """
    if mask.dim() == 4:
        return mask == 0 if mask.is_floating_point() else mask
    slots = mask.shape[1]
    causal = torch.ones(queries, slots, dtype=torch.bool, device=mask.device).tril(slots - queries)
    return mask.bool()[:, None, None, :] & causal


def additive(mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Convert a bool mask into one that is added to attention logits, the form that every implementation accepts."""
    if mask.is_floating_point():
        return mask
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, torch.finfo(dtype).min)


def packed_mask(context: torch.Tensor, question_of: torch.Tensor, written: torch.Tensor | None = None) -> torch.Tensor:
    """Return the mask (B, 1, Q, K + W + Q), bool, of several questions that share one fused cache.

    Every question sees the documents and, causally, itself, but none of the other questions. All see the tokens of
    a prompt that they share, causally.

    Args:
        context: (B, K), 1 for real slots of the fused cache; or (B, Q, K) if they differ by question.
        question_of: (B, Q), number of the question that a token belongs to, or ``SHARED``. Padding has a number of its
            own, so that it sees something and its softmax is defined.
        written: (B, W), the same numbers for the W tokens that follow the fused cache from earlier passes.
    """
    length = question_of.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool, device=question_of.device).tril()
    keys = question_of[:, None, :]
    own = ((question_of[:, :, None] == keys) | (keys == SHARED)) & causal  # (B, Q, Q)
    documents = context.bool()
    parts = [documents if context.dim() == 3 else documents[:, None, :].expand(-1, length, -1), own]
    if written is not None:
        parts.insert(1, question_of[:, :, None] == written[:, None, :])
    return torch.cat(parts, dim=2)[:, None]
