"""Dp: token ids -> document KVs, by the frozen base model (adapter off), without the LM head.

Matrix kernels round differently for different shapes, so a document's bits would depend on how many others
were prefilled beside it. Here every forward pass over a length bucket has one fixed shape: a document's
keys and values are then a function of its own ids alone, whatever stood in the store before. Padding is on
the right, where causal attention cannot see it, and is cut off again.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence

import torch

from ..model.backbone import Backbone
from ..model.kv import DocumentKV, KVShape
from ..model.support import routes_tokens

LENGTH_BUCKET = 32  # tokens; padded lengths are multiples of it
TOKENS_PER_PASS = {"cpu": 128, "accelerator": 4096}  # from here on, wider passes gain little on a CPU


def prefill(
    backbone: Backbone,
    token_ids: Sequence[tuple[int, ...]],
    prefix: DocumentKV | None,
    *,
    tokens_per_pass: int,
    starts: Sequence[int] | None = None,
) -> Iterator[tuple[int, DocumentKV]]:
    """Prefill each document alone, at the positions after the prefix (paper section 3.2) or from its own start on.

    Args:
        token_ids: ids (T_i,) of each document, none empty, each within the model's window.
        prefix: KV that every document sees, or ``None``.
        tokens_per_pass: padded tokens that one forward pass aims at.
        starts: position of each document's first token; by default right after the prefix.

    Yields:
        (index in ``token_ids``, DocumentKV) pass by pass, shortest documents first, with tensors of their own.
    """
    if routes_tokens(backbone.config):
        tokens_per_pass = 1  # experts are given tokens of all rows, so a document has to be a pass of its own
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
    """KV of a prefix at positions 0..p-1, or ``None`` for an empty one; outside the store, for measurements."""
    if not prefix_ids:
        return None
    return _prefill_pass(backbone, [prefix_ids], None, 1, len(prefix_ids))[0]


def kv_shape(backbone: Backbone) -> KVShape:
    """Shape of the KVs that this model makes, read off those of one token."""
    return KVShape.of(_prefill_pass(backbone, [(0,)], None, 1, 1)[0])


def padded_length(num_tokens: int, backbone: Backbone, prefix: DocumentKV | None) -> int:
    """Length of the bucket (tokens) for a document: a multiple of 32, cut at the model's last position."""
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
    """One forward pass of exactly (rows, length) tokens; rows beyond the documents are filler."""
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
