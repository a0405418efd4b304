"""Float32 copies of the trained weights, for any precision of the model.

In bfloat16 (8 bits of mantissa), small updates and accumulated gradients are rounded away. So the optimiser works on
float32 copies with float32 gradients, and the model gets their rounded values after each step. Float32 weights are
their own copies.
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
        """Move the weights' gradients to their copies. Call it after each backward pass."""
        for name, weight in self._weights.items():
            copy = self.copies[name]
            if copy is weight or weight.grad is None:
                continue
            gradient = weight.grad.float()
            copy.grad = gradient if copy.grad is None else copy.grad.add_(gradient)
            weight.grad = None

    def gradients(self) -> list[torch.Tensor]:
        """Return the gradients of all copies in a fixed order, or zeros if there was no backward pass."""
        for copy in self.copies.values():
            if copy.grad is None:
                copy.grad = torch.zeros_like(copy)
        return [copy.grad for copy in self.copies.values() if copy.grad is not None]

    @torch.no_grad()
    def write_back(self) -> None:
        """Copy the values back into the model in its own precision. Call it after each step."""
        for name, weight in self._weights.items():
            if self.copies[name] is not weight:
                weight.copy_(self.copies[name])
