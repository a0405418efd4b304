"""Converts a LoRA adapter in peft's format into llama.cpp's.

The scale of each module is multiplied into its second matrix. llama.cpp stores queries and keys of Llama with the two
halves of each rotated pair side by side, so rows of their adapters are moved in the same way.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch

from ..errors import UnsupportedModelError, model_load_errors

MOVES_ROWS = {"llama": True, "qwen2": False, "qwen3": False}  # by architecture: whether queries and keys are moved
PREFIX = "base_model.model."
PARTS = {".lora_A.weight": "lora_a", ".lora_B.weight": "lora_b"}
# Settings of peft that change more than the two matrices of a linear layer.
PLAIN: Mapping[str, Any] = {
    "peft_type": "LORA", "bias": "none", "use_dora": False, "fan_in_fan_out": False, "lora_bias": False,
    "modules_to_save": None, "trainable_token_indices": None, "target_parameters": None, "layer_replication": None,
}  # fmt: skip
PLAIN_STARTS = (True, False, "gaussian", "eva", "orthogonal")  # initial matrices; all others change the base weights


def convert_adapter(folder: Path, file: Path, *, architecture: str, config: Any) -> None:
    """Write the adapter in ``folder`` as the GGUF ``file``.

    Args:
        architecture: the base model's, as its GGUF file names it.
        config: transformers' configuration of the base model.

    Raises:
        ModelLoadError: the adapter cannot be read.
        UnsupportedModelError: llama.cpp cannot apply an adapter of this kind.
    """
    from peft import PeftConfig, load_peft_weights

    name = folder.name
    with model_load_errors(f"the adapter {name!r}"):
        settings: Any = PeftConfig.from_pretrained(str(folder))
        weights: dict[str, torch.Tensor] = load_peft_weights(str(folder), device="cpu")
    _require_plain(settings, name, architecture)
    names = gguf.get_tensor_name_map(_architecture(architecture), config.num_hidden_layers)
    writer = gguf.GGUFWriter(file, architecture)
    writer.add_string("general.type", "adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", 0.0)  # the scale is in the matrices
    for key in sorted(weights):
        module, suffix = next((key.removesuffix(end), end) for end in PARTS if key.endswith(end))
        module = module.removeprefix(PREFIX)
        target = names.get_name(f"{module}.weight", try_suffixes=(".weight",))
        if target is None:
            raise UnsupportedModelError(f"llama.cpp has no weights for the module {module!r} of the adapter {name!r}.")
        matrix = weights[key].float()
        if suffix == ".lora_B.weight":
            matrix = matrix * _scale(settings, module)
            if MOVES_ROWS[architecture] and module.endswith(("q_proj", "k_proj")):
                heads = config.num_attention_heads if module.endswith("q_proj") else config.num_key_value_heads
                matrix = _moved(matrix, heads)
        writer.add_tensor(f"{target}.weight.{PARTS[suffix]}".replace(".weight.weight", ".weight"), _array(matrix))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _require_plain(settings: Any, name: str, architecture: str) -> None:
    misfits = {key: getattr(settings, key, plain) for key, plain in PLAIN.items()}
    misfits = {key: value for key, value in misfits.items() if str(value).split(".")[-1] != str(PLAIN[key])}
    if settings.init_lora_weights not in PLAIN_STARTS:
        misfits["init_lora_weights"] = settings.init_lora_weights
    if misfits:
        key, value = next(iter(misfits.items()))
        raise UnsupportedModelError(
            f"llama.cpp cannot apply the adapter {name!r}, because it was made with {key}={value!r}; use "
            "engine='torch'."
        )
    if architecture not in MOVES_ROWS:
        raise UnsupportedModelError(
            f"adapters for the architecture {architecture!r} cannot be converted for llama.cpp, only those for "
            f"{', '.join(MOVES_ROWS)}; pass a GGUF file made by llama.cpp's convert_lora_to_gguf.py."
        )


def _architecture(name: str) -> Any:
    return next(number for number, known in gguf.MODEL_ARCH_NAMES.items() if known == name)


def _scale(settings: Any, module: str) -> float:
    """Return peft's factor of a module: alpha / rank, or alpha / sqrt(rank)."""
    from peft.utils.other import get_pattern_key

    rank = settings.rank_pattern.get(get_pattern_key(settings.rank_pattern.keys(), module), settings.r)
    alpha = settings.alpha_pattern.get(get_pattern_key(settings.alpha_pattern.keys(), module), settings.lora_alpha)
    return alpha / (rank**0.5 if settings.use_rslora else rank)


def _moved(matrix: torch.Tensor, heads: int) -> torch.Tensor:
    """Return rows (H d, r) with the i-th and the (d / 2 + i)-th row of each head side by side."""
    rows, rank = matrix.shape
    return matrix.view(heads, 2, rows // heads // 2, rank).transpose(1, 2).reshape(rows, rank)


def _array(matrix: torch.Tensor) -> np.ndarray:
    return matrix.contiguous().numpy()
