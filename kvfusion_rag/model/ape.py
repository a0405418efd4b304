"""APE, Adaptive Parallel Encoding (arXiv 2502.05431): attention that reads documents sharper and weighs them less.

The question and the answer meet the logits of the documents' slots divided by a temperature T; the log-sum-exp of
these slots is multiplied by a scale S, and both parts are merged by their log-sum-exps (the paper's pseudo-code,
``ape_attention``). The authors' released code multiplies by S times T in place of S: its S = T = 0.9 is S = 0.81 here.
T alone would be keys divided by T, but S weighs by a sum that depends on the query, so it needs an attention of its
own (``attention.py``, *explicit*), which ``backbone.py`` switches on for single passes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch.nn.functional import pad


@dataclass(frozen=True, slots=True, eq=False)
class Ape:
    """What one decoding hands to every attention layer.

    Attributes:
        documents: (B, K) bool, which slots of the fused cache are documents; prefix and pads are not.
        temperature: T, above 0.
        scale: S, above 0.
    """

    documents: torch.Tensor
    temperature: float
    scale: float

    @classmethod
    def over(cls, mask: torch.Tensor, prefix_lengths: Sequence[int], temperature: float, scale: float) -> Ape:
        """APE over a fused context with mask (B, K), whose rows begin with prefixes of these lengths."""
        slots = torch.arange(mask.shape[1], device=mask.device)
        prefixes = torch.tensor(prefix_lengths, device=mask.device)
        return cls(mask.bool() & (slots >= prefixes[:, None]), temperature, scale)

    def keep(self, rows: Sequence[int]) -> Ape:
        """The same for these rows of the context alone."""
        return replace(self, documents=self.documents[rows])

    def adapt(self, logits: torch.Tensor) -> torch.Tensor:
        """Logits (B, H, Q, S) over all slots so far, those that may not be seen at -inf, as APE weighs them.

        One softmax over the outcome is the merge: a document's slot at a/T + (S - 1) LSE adds up to S LSE.
        """
        slots = pad(self.documents, (0, logits.shape[-1] - self.documents.shape[1]))[:, None, None]  # (B, 1, 1, S)
        tempered = logits / self.temperature
        lse = tempered.masked_fill(~slots, float("-inf")).logsumexp(dim=-1, keepdim=True)
        lse = lse.masked_fill(lse.isneginf(), 0.0)  # of who sees no document
        return torch.where(slots, tempered + (self.scale - 1) * lse, logits)
