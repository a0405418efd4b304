"""What a family is: the flags of a real configuration over small sizes, and random weights for it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from tiny import tokenizer
from transformers import CONFIG_MAPPING, PretrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

SIZES: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": 2,
}
WINDOW = 16  # tokens of a sliding window; the documents of the tests are longer
ENDS = (0, 1, 2)
LONGROPE = "positions below `original_max_position_embeddings`"
NTK = "positions below `max_position_embeddings`"
ABSENT: Any = object()  # as a flag: the configuration has no such size


@dataclass(frozen=True)
class Family:
    """A row of the compatibility table.

    Attributes:
        name: what people call it.
        model_type: the type in ``config.json``.
        example: a model on the hub with this structure.
        flags: what its configuration says besides :data:`SIZES`, or instead. :data:`ABSENT` leaves out a size.
        note: what a user should know.
    """

    name: str
    model_type: str
    example: str
    flags: Mapping[str, Any] = field(default_factory=dict)
    note: str = ""

    def config(self) -> PretrainedConfig:
        """Return the configuration with small sizes."""
        given = {**SIZES, **self.flags}
        return CONFIG_MAPPING[self.model_type](**{name: value for name, value in given.items() if value is not ABSENT})

    def network(self, seed: int = 0) -> PreTrainedModel:
        """Return a float32 model whose random weights are far from uniform attention, with biases and sinks."""
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            network = AutoModelForCausalLM.from_config(self.config(), dtype=torch.float32)
            with torch.no_grad():
                for name, parameter in network.named_parameters():
                    if parameter.dim() > 1:
                        parameter.normal_(std=0.1)
                    elif "norm" in name:
                        parameter.add_(0.1 * torch.randn_like(parameter))
                    else:
                        parameter.normal_(std=0.3)
                output = network.get_output_embeddings()
                for parameter in output.parameters():  # the logits of end tokens are 0, so no answer ends early
                    parameter[[*ENDS, tokenizer("byte-bpe").eos_token_id]] = 0
        return network.eval()


def rope(kind: str = "default", theta: float = 10_000.0, **parameters: Any) -> dict[str, Any]:
    """Return the RoPE parameters of a configuration."""
    return {"rope_type": kind, "rope_theta": theta, **parameters}


def layers(*kinds: str) -> list[str]:
    """Return the kinds of layers: ``full``, ``sliding`` or ``chunked`` attention,
    or another kind by its own name."""
    attention = {"full", "sliding", "chunked", "linear"}
    return [f"{kind}_attention" if kind in attention else kind for kind in kinds]
