"""Linear layers in float32 on AMD's processors, where torch's own library (MKL) has no kernels made for them.

oneDNN comes with torch too. With AVX-512, which MKL does not use on these processors, it is up to twice as fast with
layers that are not tiny. Without, it is up to 2.7 times as fast with a layer that is wide (more outputs than inputs),
and up to 1.6 times with any other large one while rows are few (``benchmarks/linear_layers.py``). Weights stay as and
where they are. Training is left to torch. Knows neither models nor text.
"""

from __future__ import annotations

import sys

import torch
from torch.nn.functional import linear

from .hardware import device_name

SMALL = 1 << 16  # weights from which on oneDNN is faster with AVX-512; below, its calls cost more than they save
LARGE = 1 << 19  # weights from which on it is faster for a single row, and without AVX-512 for a few
FEW = 64  # rows
RULE = f"onednn: wide; {LARGE} weights, up to {FEW} rows; with AVX-512 {SMALL} weights"  # part of documents' keys


class OneDNNLinear(torch.nn.Linear):
    """``torch.nn.Linear`` over the same weights, by oneDNN in inference mode if that is faster."""

    rows: range  # numbers of rows with which oneDNN is faster

    @classmethod
    def like(cls, layer: torch.nn.Linear) -> OneDNNLinear:
        made = cls(layer.in_features, layer.out_features, bias=False, device="meta")
        made.weight, made.bias = layer.weight, layer.bias
        made.rows = _faster_rows(layer)
        return made.train(layer.training)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Outputs (..., out_features) of inputs (..., in_features)."""
        is_faster = input.numel() // self.in_features in self.rows
        is_plain = _is_plain(self.weight) and _is_plain(input)  # the layer may have been moved
        if is_faster and is_plain and torch.is_inference_mode_enabled():
            return onednn(input, self.weight, self.bias)
        return super().forward(input)


def use_onednn(model: torch.nn.Module) -> bool:
    """Put :class:`OneDNNLinear` in place of layers on processors where it is faster; whether the model has any now."""
    if device_name(torch.device("cpu")).startswith("AMD ") and has_onednn():
        replace_layers(model)
    return any(isinstance(layer, OneDNNLinear) for layer in model.modules())


def replace_layers(model: torch.nn.Module) -> None:
    """Put :class:`OneDNNLinear` in place of all float32 layers on the CPU for which it is faster.

    Quantised layers, and those with hooks or a forward pass of their own, stay.
    """
    for name, layer in list(model.named_modules()):
        if type(layer) is torch.nn.Linear and _faster_rows(layer) and _is_bare(layer):
            model.set_submodule(name, OneDNNLinear.like(layer))


def onednn(input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """A layer by what torch's compiler calls for frozen ones; there is no public name for it over plain weights."""
    return torch.ops.mkldnn._linear_pointwise(input, weight, bias, "none", [], "")


def has_onednn() -> bool:
    """Whether this torch can, and computes what it should: nobody promises what is not public."""
    if not (torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled):
        return False
    input, weight, bias = torch.ones(2, 3), torch.eye(5, 3), torch.arange(5.0)
    try:
        return torch.equal(onednn(input, weight, bias), linear(input, weight, bias))
    except (AttributeError, RuntimeError, TypeError):  # there is none, or it is another one
        return False


def has_avx512() -> bool:
    """Whether torch's kernels use AVX-512 here."""
    return torch.backends.cpu.get_cpu_capability() == "AVX512"


def _faster_rows(layer: torch.nn.Linear) -> range:
    """Numbers of rows with which oneDNN is faster; empty if it never is."""
    weights = layer.in_features * layer.out_features
    if layer.out_features > layer.in_features:
        return range(1, sys.maxsize)
    if weights >= SMALL and has_avx512():
        return range(1 if weights >= LARGE else 2, sys.maxsize)
    return range(1, FEW + 1) if weights >= LARGE else range(0)


def _is_plain(tensor: torch.Tensor) -> bool:
    is_dense = type(tensor) in (torch.Tensor, torch.nn.Parameter)
    return is_dense and tensor.dtype == torch.float32 and tensor.device.type == "cpu"


def _is_bare(layer: torch.nn.Linear) -> bool:
    has_hooks = layer._forward_hooks or layer._forward_pre_hooks or "forward" in vars(layer)  # accelerate's: the last
    return _is_plain(layer.weight) and not has_hooks
