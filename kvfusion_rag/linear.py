"""Linear layers in float32 on AMD's processors, where torch's own library (MKL) has no kernels made for them.

oneDNN, which comes with torch too, reads a wide layer's weights 1.5 to 2.7 times as fast there (measured with up to 64
rows; 1.2 times with 1,024), and about as fast those of layers that are not wide. Weights stay as and where they are.
Training is left to torch. Knows neither models nor text.
"""

from __future__ import annotations

import torch

from .probe import device_name

# What inductor, torch's compiler, calls for frozen layers; there is no public name for it over plain weights.
_OPERATOR = "_linear_pointwise"


class WideLinear(torch.nn.Linear):
    """``torch.nn.Linear`` over the same weights, by oneDNN in inference mode."""

    @classmethod
    def like(cls, layer: torch.nn.Linear) -> WideLinear:
        made = cls(layer.in_features, layer.out_features, bias=False, device="meta")
        made.weight, made.bias = layer.weight, layer.bias
        return made.train(layer.training)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Outputs (..., out_features) of inputs (..., in_features)."""
        if not torch.is_inference_mode_enabled():
            return super().forward(input)
        return torch.ops.mkldnn._linear_pointwise(input, self.weight, self.bias, "none", [], "")


def use_onednn(model: torch.nn.Module) -> bool:
    """Put :class:`WideLinear` in place of a model's wide float32 layers where that is faster; whether it was."""
    if not (device_name(torch.device("cpu")).startswith("AMD ") and hasattr(torch.ops.mkldnn, _OPERATOR)):
        return False
    return widen(model) > 0


def widen(model: torch.nn.Module) -> int:
    """Put :class:`WideLinear` in place of all layers that it is for; how many those were.

    Layers of other classes (quantised ones, adapters, hooks of accelerate) have a forward pass of their own and stay.
    """
    found = [name for name, layer in model.named_modules() if _is_wide(layer)]
    for name in found:
        model.set_submodule(name, WideLinear.like(model.get_submodule(name)))  # type: ignore[arg-type]
    return len(found)


def _is_wide(layer: torch.nn.Module) -> bool:
    if type(layer) is not torch.nn.Linear or hasattr(layer, "_hf_hook"):
        return False
    weight = layer.weight
    is_plain = type(weight) is torch.nn.Parameter and weight.dtype == torch.float32 and weight.device.type == "cpu"
    return is_plain and layer.out_features > layer.in_features
