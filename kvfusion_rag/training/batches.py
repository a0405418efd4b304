"""Which rows a step reads together: an epoch's order, with rows on the same documents kept side by side.

A fused context is paid for once by all questions in a batch that share it, so groups are shuffled as wholes and cut
only where they are larger than a batch. Pure functions on numbers of rows; knows neither texts nor tensors but
torch's random numbers. Where no rows share documents, an epoch is a plain shuffle in slices.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Sequence

import torch

Step = list[list[int]]  # batches, each of row numbers


def epoch_steps(documents: Sequence[Hashable], *, batch_size: int, batches_per_step: int, seed: int) -> list[Step]:
    """All steps of one epoch, over all processes; the same arguments give the same steps.

    Args:
        documents: for each row something that is equal where the documents are.
        batch_size: most rows of a batch.
        batches_per_step: full batches that a step has room for. Groups that leave room in their batches can make a
            step of more batches, never of more rows.
        seed: of groups' order and of the rows' order in them.
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
    """Pieces, none longer than ``room``, put into bins of that room: each into the fullest one that still takes it.

    Bins are in the order of their first pieces.
    """
    bins: list[list[list[int]]] = []
    with_room: defaultdict[int, list[int]] = defaultdict(list)  # numbers of the bins that have so much left
    for piece in pieces:
        left = min((left for left, found in with_room.items() if found and left >= len(piece)), default=None)
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
