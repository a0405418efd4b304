"""Dp: computes document KVs from token ids with the frozen base model (adapter off), without the LM head.

Matrix kernels round differently for different shapes, so a document's bits would depend on the number of documents
beside it. Here every forward pass over a length bucket has one fixed shape, so a document's KV only depends on its own
ids. Padding is on the right, where causal attention ignores it, and is cut off again.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence

import torch

from ..model.backbone import Backbone
from ..model.kv import DocumentKV, KVShape
from ..model.support import routes_tokens

LENGTH_BUCKET = 32  # tokens; padded lengths are multiples of it
TOKENS_PER_PASS = {"cpu": 128, "accelerator": 4096}  # wider passes gain little on a CPU


def prefill(
    backbone: Backbone,
    token_ids: Sequence[tuple[int, ...]],
    prefix: DocumentKV | None,
    *,
    tokens_per_pass: int,
    starts: Sequence[int] | None = None,
) -> Iterator[tuple[int, DocumentKV]]:
    """Prefill each document separately, at the positions behind the prefix (paper section 3.2) or at its own start.

    Args:
        token_ids: ids (T_i,) of each document, not empty and within the context window.
        prefix: KV that every document attends to, or None.
        tokens_per_pass: target for the padded tokens of one forward pass.
        starts: position of each document's first token. Default: right behind the prefix.

    Yields:
        (index in ``token_ids``, DocumentKV) pass by pass, shortest documents first. The tensors are copies.
    """
    if routes_tokens(backbone.config):
        tokens_per_pass = 1  # experts receive tokens of all rows, so each document needs its own pass
    buckets: defaultdict[int, list[int]] = defaultdict(list)
    for index, ids in enumerate(token_ids):
        buckets[padded_length(len(ids), backbone, prefix)].append(index)
    for length, members in sorted(buckets.items()):
        rows = max(1, tokens_per_pass // length)
        for start in range(0, len(members), rows):
            batch = members[start : start + rows]
            places = None if starts is None else [starts[i] for i in batch]
            kvs = _prefill_pass(backbone, [token_ids[i] for i in batch], prefix, rows, length, places)
            yield from zip(batch, kvs, strict=True)


def prefill_prefix(backbone: Backbone, prefix_ids: tuple[int, ...]) -> DocumentKV | None:
    """Return the KV of a prefix at positions 0..p-1 without using the store, or None if the prefix is empty."""
    if not prefix_ids:
        return None
    return _prefill_pass(backbone, [prefix_ids], None, 1, len(prefix_ids))[0]


def kv_shape(backbone: Backbone) -> KVShape:
    """Return the shape of this model's KVs, measured on one token."""
    return KVShape.of(_prefill_pass(backbone, [(0,)], None, 1, 1)[0])


def padded_length(num_tokens: int, backbone: Backbone, prefix: DocumentKV | None) -> int:
    """Return the padded length of a document in tokens: a multiple of 32 within the context window."""
    length = -(-num_tokens // LENGTH_BUCKET) * LENGTH_BUCKET
    if backbone.context_window is None:
        return length
    return min(length, backbone.context_window - (prefix.num_tokens if prefix else 0))


def _prefill_pass(
    backbone: Backbone,
    documents: list[tuple[int, ...]],
    prefix: DocumentKV | None,
    rows: int,
    length: int,
    starts: list[int] | None = None,
) -> list[DocumentKV]:
    """Run one forward pass of exactly (rows, length) tokens. Rows beyond the documents are filler."""
    ids = torch.zeros(rows, length, dtype=torch.long)
    for row, document in enumerate(documents):
        ids[row, : len(document)] = torch.tensor(document)
    filler = rows - len(documents)
    places = None if starts is None else [*starts, *[0] * filler]
    keys, values = backbone.prefill(ids, prefix, places)  # (L, rows, H_kv, length, d) each
    return [
        DocumentKV(keys[:, row, :, : len(document)].clone(), values[:, row, :, : len(document)].clone(), document)
        for row, document in enumerate(documents)
    ]
