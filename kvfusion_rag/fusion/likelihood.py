"""Measures log p(text | document) of each token, each document read separately, several per forward pass."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..model.backbone import Backbone
from ..model.kv import DocumentKV, KVShape
from .fused_cache import FusedBuffer
from .prefill import kv_shape

LOGITS_AT_ONCE = 1 << 26  # 256 MB in float32

Documents = Sequence[DocumentKV | None]


@torch.inference_mode()
def token_log_probabilities(
    backbone: Backbone, prefix: DocumentKV | None, documents: Documents, ids: Sequence[int], *, given: int
) -> torch.Tensor:
    """Return the log-probability of each of the A ids behind ``given``, (D, A) float64 in nats, adapter off.

    The text directly follows its own document, so a row does not depend on the other documents.

    Args:
        prefix: KV in front of each document, or None.
        documents: KVs (L, H_kv, T_i, d) with at least one token each; None for the text without a document.
        ids: ids of the text, with at least one after the first ``given``.
        given: number of leading ids that are read but not scored, at least one.
    """
    scored = len(ids) - given
    rows = max(1, LOGITS_AT_ONCE // (scored * backbone.config.vocab_size))
    starts = range(0, len(documents), rows)
    return torch.cat([_of_rows(backbone, prefix, documents[start : start + rows], ids, given) for start in starts])


def _of_rows(
    backbone: Backbone, prefix: DocumentKV | None, documents: Documents, ids: Sequence[int], given: int
) -> torch.Tensor:
    before = 0 if prefix is None else prefix.num_tokens
    lengths = [before if document is None else before + document.num_tokens for document in documents]
    read = ids[:-1]
    device = backbone.device
    known = next((kv for kv in (*documents, prefix) if kv is not None), None)
    shape = kv_shape(backbone) if known is None else KVShape.of(known)
    buffer = FusedBuffer(lengths, shape, device, room=len(read))
    for row, document in enumerate(documents):
        if prefix is not None:
            prefix.copy_into(buffer.slots(row, 0, prefix.token_ids, 0))
        if document is not None:
            document.copy_into(buffer.slots(row, before, document.token_ids, before))
    context = buffer.context()
    count, scored = len(documents), len(ids) - given
    steps = torch.arange(len(read), device=device)
    columns = torch.arange(given - 1, len(read), device=device).repeat(count)  # (D A,)
    logits = backbone.forward(
        torch.tensor([read] * count, device=device),
        torch.tensor(lengths, device=device)[:, None] + steps,
        torch.cat([context.mask, context.mask.new_ones(count, len(read))], dim=1),
        context.cache,
        columns,
        rows=torch.arange(count, device=device).repeat_interleave(scored),
        adapter=False,
    )
    targets = torch.tensor([*ids[given:]] * count, device=device)
    chosen = logits.log_softmax(dim=-1).gather(1, targets[:, None])  # (D A, 1)
    return chosen.view(count, scored).double()
