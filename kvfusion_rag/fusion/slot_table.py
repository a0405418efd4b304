"""Records which question owns which slot of a fused cache, and builds the inputs of each decoding step.

Several questions may share a row. Their tokens then lie side by side in it, and a mask keeps them apart.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..model.positions import PADDING, packed_mask
from .fused_cache import FusedContext


@dataclass(frozen=True, slots=True)
class StepInputs:
    """Inputs of one forward pass over R rows.

    Attributes:
        ids, positions: (R, Q).
        mask: (R, K + Q) padding mask, or (R, 1, Q, K + Q) bool.
        rows, columns: (n,) indices into ``ids`` of the n tokens whose next token is predicted.
    """

    ids: torch.Tensor
    positions: torch.Tensor
    mask: torch.Tensor
    rows: torch.Tensor
    columns: torch.Tensor


class SlotTable:
    """Slots written by N questions over the R rows of a context.

    If every question has its own row, a padding mask (R, S) is enough, and every attention implementation takes it.
    """

    def __init__(self, context: FusedContext, row_of: Sequence[int], visible: torch.Tensor | None) -> None:
        self._context, self._visible = context, visible
        self._row_of = list(row_of)
        self._padding_mask_suffices = visible is None and len(set(row_of)) == len(row_of)
        rows = context.mask.shape[0]
        self._written = torch.empty(rows, 0, dtype=torch.long, device=context.mask.device)  # owners; -1 for pads

    def add(self, open_ones: Sequence[int], tokens: Sequence[Sequence[int]], starts: Sequence[int]) -> StepInputs:
        """Return inputs with the tokens of open questions side by side in their rows, padded on the right."""
        rows = self._context.mask.shape[0]
        ids: list[list[int]] = [[] for _ in range(rows)]
        positions: list[list[int]] = [[] for _ in range(rows)]
        owners: list[list[int]] = [[] for _ in range(rows)]
        columns: list[int] = []
        for i, new_tokens, start in zip(open_ones, tokens, starts, strict=True):
            row = self._row_of[i]
            ids[row] += new_tokens
            positions[row] += range(start, start + len(new_tokens))
            owners[row] += [i] * len(new_tokens)
            columns.append(len(ids[row]) - 1)
        longest = max(map(len, ids))
        for row in range(rows):
            missing = longest - len(ids[row])
            ids[row] += [0] * missing
            positions[row] += (positions[row][-1:] or [0]) * missing  # pads stay at a position inside the window
            owners[row] += [PADDING] * missing
        device = self._context.mask.device
        owner = torch.tensor(owners, device=device)
        inputs = StepInputs(
            torch.tensor(ids, device=device),
            torch.tensor(positions, device=device),
            self._mask(owner),
            torch.tensor([self._row_of[i] for i in open_ones], device=device),
            torch.tensor(columns, device=device),
        )
        self._written = torch.cat([self._written, owner], dim=1)
        return inputs

    def keep(self, open_ones: Sequence[int]) -> list[int] | None:
        """Drop rows without an open question and return the kept rows in their new order, or None if all are kept."""
        used = {self._row_of[i] for i in open_ones}
        if len(used) == self._context.mask.shape[0]:
            return None
        movable = sorted(row for row in used if row >= len(used))
        kept = [row if row in used else movable.pop() for row in range(len(used))]
        self._context.keep(kept)
        self._written = self._written[kept]
        for i in open_ones:
            self._row_of[i] = kept.index(self._row_of[i])
        return kept

    def _mask(self, owner: torch.Tensor) -> torch.Tensor:
        context = self._context.mask
        if self._padding_mask_suffices:
            return torch.cat([context, (torch.cat([self._written, owner], dim=1) >= 0).long()], dim=1)
        if self._visible is not None:  # pads attend to their own row, so that their softmax is defined
            visible = self._visible[owner.clamp(min=0)]  # (R, Q, K)
            context = torch.where((owner >= 0)[..., None], visible, context.bool()[:, None])
        return packed_mask(context, owner, self._written)
