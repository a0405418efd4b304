"""Orders the rows of an epoch into steps and batches, and keeps rows with the same documents together.

Questions in a batch that share documents share one fused cache, so groups are shuffled as wholes and split only if
they are larger than a batch. If no rows share documents, an epoch is a plain shuffle in slices.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Sequence

import torch

Step = list[list[int]]  # batches, each of row numbers


def epoch_steps(documents: Sequence[Hashable], *, batch_size: int, batches_per_step: int, seed: int) -> list[Step]:
    """Return all steps of one epoch over all processes. Equal arguments give equal steps.

    Args:
        documents: key of each row's documents, equal for rows with the same documents.
        batch_size: maximum rows per batch.
        batches_per_step: full batches per step. If batches are not full, a step can have more batches, but not more
            rows.
        seed: seed of the order of groups and of the rows in them.
    """
    rng = torch.Generator().manual_seed(seed)
    groups: defaultdict[Hashable, list[int]] = defaultdict(list)
    for row, shared in enumerate(documents):
        groups[shared].append(row)
    members = list(groups.values())
    pieces: list[list[int]] = []
    for number in torch.randperm(len(members), generator=rng).tolist():
        group = _shuffled(members[number], rng)
        pieces += [group[n : n + batch_size] for n in range(0, len(group), batch_size)]
    return [
        [[row for piece in batch for row in piece] for batch in pack(step, batch_size)]
        for step in pack(pieces, batch_size * batches_per_step)
    ]


def pack(pieces: Sequence[list[int]], room: int) -> list[list[list[int]]]:
    """Pack pieces, none longer than ``room``, into bins of that size: each into the fullest bin with enough room.

    Bins are in the order of their first pieces.
    """
    bins: list[list[list[int]]] = []
    with_room: defaultdict[int, list[int]] = defaultdict(list)  # numbers of the bins by their free room
    for piece in pieces:
        left = min((left for left, open_bins in with_room.items() if open_bins and left >= len(piece)), default=None)
        if left is None:
            left = room
            with_room[left].append(len(bins))
            bins.append([])
        number = with_room[left].pop()
        bins[number].append(piece)
        with_room[left - len(piece)].append(number)
    return bins


def _shuffled(rows: list[int], rng: torch.Generator) -> list[int]:
    return rows if len(rows) == 1 else [rows[n] for n in torch.randperm(len(rows), generator=rng).tolist()]
