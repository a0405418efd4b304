"""Moves stored keys to other positions, by rotating them as RoPE would."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import PretrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from ..errors import UnsupportedModelError
from ..model.rope import rope_settings

# Kinds of RoPE whose rotations depend on the position alone. The others also depend on the length of the input.
FIXED_KINDS = ("default", "linear", "llama3", "yarn")


@dataclass(frozen=True, slots=True)
class KeyRotation:
    """The rotations of a model.

    Attributes:
        frequencies: (r/2,) float64, radians per position of the first r numbers of a key.
    """

    frequencies: torch.Tensor

    @classmethod
    def of(cls, config: PretrainedConfig) -> KeyRotation:
        """Return the rotations of a text configuration.

        Raises:
            UnsupportedModelError: they differ between layers, or depend on the length of the input.
        """
        settings = rope_settings(config)
        kinds = [str(rope.get("rope_type", "default")) for rope in settings]
        if len(kinds) != 1 or kinds[0] not in FIXED_KINDS:
            raise UnsupportedModelError(
                f"the RoPE of {config.model_type!r} is {' and '.join(kinds) or 'missing'}, but keys can only be moved "
                f"with one of {', '.join(FIXED_KINDS)}; use engine='torch'."
            )
        if kinds[0] == "default":
            width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
            rotated = int(width * settings[0].get("partial_rotary_factor", 1.0))
            exponents = torch.arange(0, rotated, 2, dtype=torch.float64) / rotated
            return cls(float(settings[0]["rope_theta"]) ** -exponents)
        frequencies, _ = ROPE_INIT_FUNCTIONS[kinds[0]](config, torch.device("cpu"))
        return cls(frequencies.double())

    def moved(self, keys: torch.Tensor, shift: int) -> torch.Tensor:
        """Return keys (..., d) as they would be ``shift`` positions later, rounded once to their dtype."""
        if shift == 0:
            return keys
        half = len(self.frequencies)
        angles = shift * self.frequencies
        cos, sin = (part.to(keys.device, torch.float32) for part in (angles.cos(), angles.sin()))
        first, second = keys[..., :half].float(), keys[..., half : 2 * half].float()
        turned = [first * cos - second * sin, second * cos + first * sin]
        return torch.cat([*(part.to(keys.dtype) for part in turned), keys[..., 2 * half :]], dim=-1)
