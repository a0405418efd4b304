"""APE, Adaptive Parallel Encoding (arXiv 2502.05431): attention that is sharper on documents and weighs them less.

For the question and the answer, the logits of the documents' slots are divided by a temperature T, and the log-sum-exp
(LSE) of these slots is multiplied by a scale S. Both parts are then merged by their log-sum-exps, as in the paper's
pseudo-code (``ape_attention``). The authors' released code multiplies by S times T instead of S, so its S = T = 0.9 is
S = 0.81 here. Dividing keys by T would give the temperature, but the scale needs a sum that depends on the query. So
APE runs in explicit attention (``functions.py``), which ``backbone.py`` selects for single passes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch.nn.functional import pad


@dataclass(frozen=True, slots=True, eq=False)
class Ape:
    """The APE parameters of one decoding, for every attention layer.

    Attributes:
        documents: (B, K) bool, the slots of the fused cache that belong to documents, not to prefix or padding.
        temperature: T, above 0.
        scale: S, above 0.
    """

    documents: torch.Tensor
    temperature: float
    scale: float

    @classmethod
    def over(cls, mask: torch.Tensor, prefix_lengths: Sequence[int], temperature: float, scale: float) -> Ape:
        """Return APE over a fused cache with mask (B, K) whose rows begin with prefixes of these lengths."""
        slots = torch.arange(mask.shape[1], device=mask.device)
        prefixes = torch.tensor(prefix_lengths, device=mask.device)
        return cls(mask.bool() & (slots >= prefixes[:, None]), temperature, scale)

    def keep(self, rows: Sequence[int]) -> Ape:
        """Return APE over only these rows of the cache."""
        return replace(self, documents=self.documents[rows])

    def adapt(self, logits: torch.Tensor) -> torch.Tensor:
        """Return the logits (B, H, Q, S) over all slots so far, reweighted by APE. Hidden slots are at -inf.

        One softmax over the result is the merge: document logits a/T + (S - 1) LSE have the log-sum-exp S LSE.
        """
        slots = pad(self.documents, (0, logits.shape[-1] - self.documents.shape[1]))[:, None, None]  # (B, 1, 1, S)
        tempered = logits / self.temperature
        lse = tempered.masked_fill(~slots, float("-inf")).logsumexp(dim=-1, keepdim=True)
        lse = lse.masked_fill(lse.isneginf(), 0.0)  # for queries that see no document
        return torch.where(slots, tempered + (self.scale - 1) * lse, logits)
