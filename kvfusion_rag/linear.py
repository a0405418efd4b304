"""Linear layers in float32 on AMD's processors, where torch's own library (MKL) has no kernels made for them.

oneDNN, which comes with torch too, is 1.2 to 2.7 times as fast there with a layer that is wide, and with others now
faster, now slower (``benchmarks/wide_layers.py``). Weights stay as and where they are.
Training is left to torch. Knows neither models nor text.
"""

from __future__ import annotations

import torch
from torch.nn.functional import linear

from .probe import device_name


class WideLinear(torch.nn.Linear):
    """``torch.nn.Linear`` over the same weights, by oneDNN in inference mode."""

    @classmethod
    def like(cls, layer: torch.nn.Linear) -> WideLinear:
        made = cls(layer.in_features, layer.out_features, bias=False, device="meta")
        made.weight, made.bias = layer.weight, layer.bias
        return made.train(layer.training)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Outputs (..., out_features) of inputs (..., in_features)."""
        if torch.is_inference_mode_enabled() and _is_plain(self.weight) and _is_plain(input):  # may have been moved
            return _onednn(input, self.weight, self.bias)
        return super().forward(input)


def use_onednn(model: torch.nn.Module) -> bool:
    """Put :class:`WideLinear` in place of a model's wide float32 layers where that is faster; whether it has some."""
    if device_name(torch.device("cpu")).startswith("AMD ") and has_onednn():
        widen(model)
    return any(isinstance(layer, WideLinear) for layer in model.modules())


def widen(model: torch.nn.Module) -> None:
    """Put :class:`WideLinear` in place of all layers that it is for.

    Quantised layers, and those with hooks or a forward pass of their own, stay.
    """
    for name, layer in list(model.named_modules()):
        if type(layer) is torch.nn.Linear and layer.out_features > layer.in_features and _is_bare(layer):
            model.set_submodule(name, WideLinear.like(layer))


def _onednn(input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """By what torch's compiler calls for frozen layers; there is no public name for it over plain weights."""
    return torch.ops.mkldnn._linear_pointwise(input, weight, bias, "none", [], "")


def has_onednn() -> bool:
    """Whether this torch can, and computes what it should: nobody promises what is not public."""
    if not (torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled):
        return False
    input, weight, bias = torch.ones(2, 3), torch.eye(5, 3), torch.arange(5.0)
    try:
        return torch.equal(_onednn(input, weight, bias), linear(input, weight, bias))
    except (AttributeError, RuntimeError, TypeError):  # there is none, or it is another one
        return False


def _is_plain(tensor: torch.Tensor) -> bool:
    is_dense = type(tensor) in (torch.Tensor, torch.nn.Parameter)
    return is_dense and tensor.dtype == torch.float32 and tensor.device.type == "cpu"


def _is_bare(layer: torch.nn.Linear) -> bool:
    has_hooks = layer._forward_hooks or layer._forward_pre_hooks or "forward" in vars(layer)  # accelerate's: the last
    return _is_plain(layer.weight) and not has_hooks
