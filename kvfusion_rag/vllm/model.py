"""The part of a model on torch, which reads documents, and what vLLM needs to load the model for answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import UnsupportedModelError
from ..fusion.interface import Capabilities, Ids
from ..fusion.torch_model import TorchModel
from ..model.backbone import Backbone


@dataclass(frozen=True, slots=True)
class VllmFiles:
    """What vLLM loads, and how long its requests may be.

    Attributes:
        model: folder or hub name.
        revision: of a hub model.
        adapter, adapter_rank: folder of the LoRA adapter, and its rank. None: no adapter.
        max_model_len: tokens of documents, question and answer of one request together.
        max_positions: ``max_position_embeddings`` that replaces the model's own, or None.
        arguments: further arguments of ``vllm serve``.
    """

    model: str
    revision: str | None
    adapter: Path | None
    adapter_rank: int
    max_model_len: int
    max_positions: int | None
    arguments: tuple[str, ...]


class VllmModel(TorchModel):
    """A model whose answers come from vLLM (``VllmRunner``).

    torch prefills documents, chooses among them (focus) and measures what answers came from.

    Args:
        backbone: Dp, with the adapter if there is one.
        files: what vLLM loads.
        tokens_per_pass: padded tokens of one prefill pass. Default: a value for the device.
    """

    def __init__(self, backbone: Backbone, files: VllmFiles, *, tokens_per_pass: int | None = None) -> None:
        super().__init__(backbone, tokens_per_pass=tokens_per_pass)
        self.files = files

    @property
    def capabilities(self) -> Capabilities:
        return Capabilities(super().capabilities.shared_rows, attention=False)

    def require_explicit_attention(self, prefix_ids: Ids, ordinary_ids: Sequence[int]) -> None:
        raise UnsupportedModelError(
            "vLLM neither returns attention weights nor lets them be changed, so mode 'ape' and attribution by "
            "attention need engine='torch'; attribution by effects works."
        )
