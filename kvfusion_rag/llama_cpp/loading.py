"""Loads a GGUF file with its tokenizer, settings and adapter for llama.cpp."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, GenerationConfig

from ..errors import InvalidInputError, ModelLoadError
from ..fusion.load_options import OWN_OPTIONS, LoadKwargs, reject_options_of_other_engines, settings_changes
from ..model.adapters.libraries import require_adapter_libraries
from ..model.adapters.location import find_adapter
from ..model.backbone import end_ids
from ..model.fingerprint import digest_facts
from ..model.gguf.conversion_cache import gguf_digest
from ..model.gguf.header import read_header
from ..model.loading import adapter_settings
from ..model.location import ModelLocation, locate_model
from ..model.repository import read_tokenizer
from ..model.rope import PositionLimit
from ..text.settings import ModelSettings, load_settings
from .adapter import convert_adapter
from .context import CACHE_TYPES, ContextOptions
from .library import Weights, library
from .model import Description, LlamaCppModel

TORCH_ONLY = ("decoder", "dtype", "device", "tokens_per_pass", "model_kwargs")  # options
LLAMA_CPP_ONLY = OWN_OPTIONS["llama.cpp"]
SUFFIX = ".gguf"


def load_llama_cpp_model(model: str | Path | None, options: LoadKwargs) -> tuple[LlamaCppModel, ModelSettings]:
    """Load a GGUF file and return it with its settings, including the changes in ``options``.

    Raises:
        MissingDependencyError: llama-cpp-python is missing.
        ModelLoadError: the file or the adapter cannot be read, or the model has no GGUF file.
        UnsupportedModelError: llama.cpp cannot split the model's cache into documents, or cannot apply the adapter.
        InvalidInputError: an option is only for torch, or its value is not allowed.
    """
    given: dict[str, Any] = dict(options)
    _require_own_options(given)
    library()
    gguf_file, revision = given.get("gguf_file"), given.get("revision")
    location = locate_model(model, gguf_file=gguf_file, revision=revision, weights=False)
    if location.gguf is None:
        raise ModelLoadError(
            f"{location.model_id!r} has no GGUF file, which engine 'llama.cpp' reads; name a GGUF file, or use "
            "engine='torch'."
        )
    adapter = given.get("adapter", "shipped")
    adapter = location.adapter if adapter == "shipped" else adapter
    weights = Weights(location.gguf, gpu_layers=given.get("gpu_layers"))
    description, adapter_file = _describe(location, adapter)
    loaded = _load_adapter(weights, location, adapter_file)
    context = ContextOptions(torch.get_num_threads(), given.get("cache_type") or "f16")
    made = LlamaCppModel(weights, description, context, adapter=loaded)
    return made, replace(made.settings, **settings_changes(given))


def _require_own_options(given: Mapping[str, Any]) -> None:
    reject_options_of_other_engines(given, "llama.cpp")
    for name in TORCH_ONLY:
        if given.get(name) is not None:
            raise InvalidInputError(
                f"{name} is {given[name]!r}, but engine 'llama.cpp' has no such option; use gpu_layers and "
                "cache_type, or engine='torch'."
            )
    cache_type = given.get("cache_type")
    if cache_type is not None and cache_type not in CACHE_TYPES:
        raise InvalidInputError(f"cache_type is {cache_type!r}, but it must be one of {', '.join(CACHE_TYPES)}.")


def _describe(location: ModelLocation, adapter: str | Path | None) -> tuple[Description, Path | None]:
    """Return what the files say, and the folder or GGUF file of the adapter."""
    assert location.gguf is not None
    tokenizer = read_tokenizer(location)
    config = AutoConfig.from_pretrained(location.path)
    generation = GenerationConfig.from_pretrained(location.path)
    settings = base = load_settings(location.home, tokenizer, model_id=location.model_id)
    path, digest = None, None
    if adapter is not None and str(adapter).endswith(SUFFIX):
        path = Path(adapter)
        digest = gguf_digest(path)
        settings = adapter_settings(path.parent, base, tokenizer)
    elif adapter is not None:
        require_adapter_libraries()
        path = find_adapter(adapter)
        digest = digest_facts({file.name: file.read_bytes().hex() for file in sorted(path.glob("adapter_*"))})
        settings = adapter_settings(path, base, tokenizer)
    ends = end_ids(generation, tokenizer)
    description = Description(
        model_id=location.model_id,
        revision=location.revision,
        tokenizer=tokenizer,
        settings=settings,
        base_settings=base,
        position_limit=PositionLimit.of(config.get_text_config()),
        weights_digest=gguf_digest(location.gguf),
        adapter_digest=digest,
        end_ids=ends,
        end_id=next((i for i in (tokenizer.eos_token_id, *sorted(ends)) if isinstance(i, int)), None),
        max_new_tokens=generation.max_new_tokens,
    )
    return description, path


def _load_adapter(weights: Weights, location: ModelLocation, adapter: Path | None) -> Any:
    if adapter is None:
        return None
    if adapter.suffix == SUFFIX:
        return weights.add_adapter(adapter)
    assert location.gguf is not None
    config = AutoConfig.from_pretrained(location.path)
    architecture = str(read_header(location.gguf).metadata["general.architecture"])
    with tempfile.TemporaryDirectory() as folder:  # llama.cpp reads all of it
        file = Path(folder) / f"adapter{SUFFIX}"
        convert_adapter(adapter, file, architecture=architecture, config=config.get_text_config())
        return weights.add_adapter(file)
