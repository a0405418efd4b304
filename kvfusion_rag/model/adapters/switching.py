"""Which decoder has the adapter: Dp never has it, and Dt has it switched on or off for each pass.

Both are trees of modules over the same weights, so documents can be read while questions are answered.
"""

from __future__ import annotations

import copy
from typing import cast

from ..pretrained import PreTrainedModel


def prefill_decoder(model: PreTrainedModel) -> PreTrainedModel:
    """Return Dp: a copy of the modules of ``model`` without its head, with the same parameters and buffers.

    Call it before an adapter is added to ``model``.
    """
    found = cast(object, model.get_decoder())  # in some models, ``decoder`` is the name of the head itself
    decoder = found if isinstance(found, PreTrainedModel) else cast(PreTrainedModel, model.base_model)
    tensors = [*decoder.parameters(), *decoder.buffers()]
    return copy.deepcopy(decoder, {id(tensor): tensor for tensor in tensors})


class AdapterSwitch:
    """Switches the adapter of Dt, including modules that it replaces, which transformers' own method forgets.

    The caller holds the lock of Dt.
    """

    def __init__(self, model: PreTrainedModel, *, is_on: bool) -> None:
        self._model, self._is_on = model, is_on

    def turn(self, on: bool) -> None:
        """Switch the adapter on or off."""
        if on != self._is_on:
            set_adapter(self._model, on)
            self._is_on = on

    def added(self) -> None:
        """Note that an adapter was added, which peft leaves switched on."""
        self._is_on = True


def set_adapter(model: PreTrainedModel, on: bool) -> None:
    """Switch all modules of an adapter on or off."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    for module in model.modules():
        if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper):
            module.enable_adapters(on)
