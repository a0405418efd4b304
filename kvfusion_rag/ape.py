"""APE, Adaptive Parallel Encoding (arXiv 2502.05431): attention that reads documents sharper and weighs them less.

The question and the answer meet the logits of the documents' slots divided by a temperature T; the log-sum-exp of
these slots is multiplied by a scale S, and both parts are merged by their log-sum-exps (the paper's pseudo-code,
``ape_attention``). The authors' released code multiplies by S times T in place of S: its S = T = 0.9 is S = 0.81 here.
T alone would be keys divided by T, but S weighs by a sum that depends on the query, so it needs an attention of its
own. That is registered with transformers under its own name; ``backbone.py`` switches it on for single passes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.nn.functional import pad
from transformers import AttentionInterface, AttentionMaskInterface

from .attention import explicit_attention, explicit_mask

NAME = "kvfusion_ape"


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
    def over(cls, mask: torch.Tensor, prefix_length: int, temperature: float, scale: float) -> Ape:
        """APE over a fused context with mask (B, K), whose first slots are the shared prefix."""
        documents = mask.to(torch.bool, copy=True)
        documents[:, :prefix_length] = False
        return cls(documents, temperature, scale)

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


def register() -> str:
    """Make attention and mask known to transformers, as often as it is called; returns their name."""
    AttentionInterface.register(NAME, _attention)
    AttentionMaskInterface.register(NAME, explicit_mask)
    return NAME


def _attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor,
    *,
    scaling: float,
    ape: Ape,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Output (B, Q, H, d) of queries (B, H, Q, d) over keys and values (B, H_kv, S, d), mask (B, 1, Q, S) bool.

    That the model passes on all that its attention needs is measured by the gate (``gate.require_ape``).
    """
    return explicit_attention(query, key, value, attention_mask, scaling, ape.adapt)[0], None
