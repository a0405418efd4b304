"""Frozen weights in shards: each process keeps a part of every layer, and all gather a layer when a pass comes to it.

``fully_shard`` of torch is not used. It replaces the parameters that Dp and Dt share, and needs equal passes in all
processes, whose documents differ in number.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import distributed
from torch.nn import Module, ModuleList, Parameter

from ..errors import InvalidInputError, UnsupportedModelError
from ..model.backbone import Backbone
from ..model.pretrained import PreTrainedModel

logger = logging.getLogger(__name__)

_ALIGNMENT = 16  # bytes; a tensor must begin at a multiple of its element size


class Shards:
    """The frozen weights of a backbone's embeddings, layers and head, of which each process keeps an equal part.

    A pass goes through these places in order, and its backward pass in reverse. Only the weights of one place are
    whole at a time. All other weights (norms, adapters) stay whole.

    Gathering needs all processes, but their passes differ in number. So each process announces the turn of its place,
    and all gather for the earliest turn, even those that come to another place. Turns of forward passes are earlier
    than those of backward passes. So a process that is behind catches up, and then all continue together.

    Args:
        backbone: a model whose weights are still whole, and that has no adapter yet. Its digest is computed before
            they are split.
        device: where passes are computed. The model is moved there place by place.

    Raises:
        InvalidInputError: the weights are quantized.
        UnsupportedModelError: the architecture does not have its layers in one list.
    """

    def __init__(self, backbone: Backbone, device: torch.device) -> None:
        if backbone.quantized:
            raise InvalidInputError(
                f"the weights of {backbone.model_id!r} are quantized, but only plain ones can be split into shards; "
                "train without shard_weights."
            )
        backbone.keep_digest()
        model, prefill_decoder = backbone.model, backbone.prefill_decoder
        answering = [*_places(model, backbone.model_id), model.get_output_embeddings()]
        prefilling = _places(prefill_decoder, backbone.model_id)
        model.requires_grad_(False)
        self._places = _split(answering, device)
        for tree in (model, prefill_decoder):
            tree.to(device=device)  # type: ignore[call-arg]  # in place: the weights that are not in shards
        backbone.device = device
        self._whole: _Weights | None = None
        self._control = distributed.new_group(backend="gloo")  # an accelerator's own would wait for its kernels
        _log_memory(set(self._places))
        for place, module in [*enumerate(answering), *enumerate(prefilling)]:
            module.register_forward_pre_hook(self._forward_hook(place))
            module.register_forward_hook(self._backward_hook(place))

    def finish(self) -> None:
        """Take part in gathering until all processes are here.

        Call it before any other collective operation. At the end, no weights are whole.
        """
        self._drop()
        end = 2 * len(self._places)
        while (turn := self._earliest(end)) != end:
            weights = self._weights_of(turn)
            weights.gather()
            weights.drop()

    def _forward_hook(self, place: int) -> Callable[..., None]:
        return lambda module, inputs: self._enter(place)

    def _backward_hook(self, place: int) -> Callable[..., None]:
        turn = 2 * len(self._places) - 1 - place

        def hook(module: Module, inputs: Any, output: Any) -> None:
            hidden = output if isinstance(output, torch.Tensor) else output[0]
            if hidden.requires_grad:  # its gradient is known only when the next place no longer needs its weights
                hidden.register_hook(lambda gradient: self._enter(turn))

        return hook

    def _enter(self, turn: int) -> None:
        """Gather the weights of a turn, and drop those of the place before."""
        wanted = self._weights_of(turn)
        if self._whole is wanted:
            return
        self._drop()
        while self._whole is None:
            weights = self._weights_of(self._earliest(turn))
            weights.gather()
            if weights is wanted:
                self._whole = weights
            else:
                weights.drop()

    def _drop(self) -> None:
        if self._whole is not None:
            self._whole.drop()
            self._whole = None

    def _weights_of(self, turn: int) -> _Weights:
        return self._places[min(turn, 2 * len(self._places) - 1 - turn)]

    def _earliest(self, turn: int) -> int:
        """Return the earliest turn of all processes, if this one announces ``turn``."""
        earliest = torch.tensor(turn)
        distributed.all_reduce(earliest, distributed.ReduceOp.MIN, group=self._control)
        return int(earliest)


class _Weights:
    """Parameters in one buffer of bytes, which is empty except between :meth:`gather` and :meth:`drop`.

    The buffer keeps its identity, so what autograd saved of the parameters is valid again after the next gathering.
    """

    def __init__(self, parameters: Sequence[Parameter], device: torch.device) -> None:
        processes, rank = distributed.get_world_size(), distributed.get_rank()
        starts, size = [], 0
        for parameter in parameters:
            starts.append(size)
            size += -(-parameter.nbytes // _ALIGNMENT) * _ALIGNMENT
        kept = -(-size // (_ALIGNMENT * processes)) * _ALIGNMENT
        self.total_bytes = kept * processes
        self._buffer = torch.zeros(self.total_bytes, dtype=torch.uint8, device=device)
        for parameter, start in zip(parameters, starts, strict=True):
            part = self._buffer[start : start + parameter.nbytes].view(parameter.dtype).view(parameter.shape)
            part.copy_(parameter.detach())
            parameter.data = part
        self._shard = self._buffer[kept * rank : kept * (rank + 1)].clone()
        self.drop()

    def gather(self) -> None:
        self._buffer.untyped_storage().resize_(self.total_bytes)
        # Older versions of torch have the function only under its former name, about which newer ones warn.
        name = "all_gather_single" if hasattr(distributed, "all_gather_single") else "all_gather_into_tensor"
        getattr(distributed, name)(self._buffer, self._shard)

    def drop(self) -> None:
        self._buffer.untyped_storage().resize_(0)


def _log_memory(weights: Iterable[_Weights]) -> None:
    total, processes = sum(one.total_bytes for one in weights) / 1e9, distributed.get_world_size()
    logger.info("each of %d processes keeps %.3f of %.3f GB of weights", processes, total / processes, total)


def _split(modules: Sequence[Module], device: torch.device) -> list[_Weights]:
    """Return the weights of each module, which are split and moved. A head can have those of the embeddings."""
    found: list[_Weights] = []
    owners: dict[Parameter, _Weights] = {}
    for module in modules:
        parameters = list(module.parameters())
        weights = owners.get(parameters[0]) or _Weights(parameters, device)
        owners |= dict.fromkeys(parameters, weights)
        found.append(weights)
    return found


def _places(decoder: PreTrainedModel, model_id: str) -> list[Module]:
    """Return the input embeddings and the layers of a decoder, in the order in which a pass comes to them.

    Raises:
        UnsupportedModelError: the layers are not in one list.
    """
    number = decoder.config.num_hidden_layers
    layers = next((m for m in decoder.modules() if isinstance(m, ModuleList) and len(m) == number), None)
    if layers is None:
        raise UnsupportedModelError(
            f"{model_id!r} ({decoder.config.model_type}) has no list of its {number} layers, so its weights "
            "cannot be split into shards; train without shard_weights."
        )
    return [decoder.get_input_embeddings(), *layers]
