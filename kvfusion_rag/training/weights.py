"""The weights under training, updated in float32 whatever precision the model computes in.

An update that is small beside its weight is rounded away in bfloat16 (8 bits of mantissa), and so is a gradient that
is added up there. So the optimiser works on float32 copies with float32 gradients, and the model gets their rounded
values after each step. Weights that are float32 themselves are their own copies.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch.nn import Parameter


class MasterWeights:
    """Float32 copies of trained weights.

    Args:
        weights: the model's parameters by name.
    """

    def __init__(self, weights: Mapping[str, Parameter]) -> None:
        self._weights = dict(weights)
        self.copies: dict[str, Parameter] = {
            name: weight if weight.dtype == torch.float32 else Parameter(weight.detach().float())
            for name, weight in weights.items()
        }

    def take_gradients(self) -> None:
        """Add the weights' gradients to those of their copies, and clear them; after each backward pass."""
        for name, weight in self._weights.items():
            copy = self.copies[name]
            if copy is weight or weight.grad is None:
                continue
            gradient = weight.grad.float()
            copy.grad = gradient if copy.grad is None else copy.grad.add_(gradient)
            weight.grad = None

    def gradients(self) -> list[torch.Tensor]:
        """Those of all copies, in one order; zeros where no backward pass was made, as in a process without rows."""
        for copy in self.copies.values():
            if copy.grad is None:
                copy.grad = torch.zeros_like(copy)
        return [copy.grad for copy in self.copies.values() if copy.grad is not None]

    @torch.no_grad()
    def write_back(self) -> None:
        """Give the model the copies' values in its own precision; after each step."""
        for name, weight in self._weights.items():
            if self.copies[name] is not weight:
                weight.copy_(self.copies[name])
