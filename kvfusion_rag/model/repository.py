"""Reads the configuration and the tokenizer of a model, and explains why a repository cannot be loaded.

The explanations are sought only after a loader of transformers has failed, except for embedding models, which would
load without an error. No code from a repository is run.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import transformers
from transformers import CONFIG_MAPPING, AutoConfig, AutoTokenizer, PretrainedConfig, PreTrainedTokenizerBase

from ..errors import KVFusionError, ModelLoadError, UnsupportedModelError, model_load_errors
from ..text.json_text import is_list, is_mapping, parse_json
from ..text.settings import cached_model_file
from .gguf.header import LFS_POINTER
from .location import ModelLocation
from .support.refusals import INSTEAD

CONFIG, ADAPTER, PIPELINE, MODULES = "config.json", "adapter_config.json", "model_index.json", "modules.json"
CHAT_TEMPLATES = ("chat_template.json", "processor_config.json")  # of processors; tokenizers have their own files
WEIGHTS = ("*.safetensors", "pytorch_model*.bin")
ADAPTER_WEIGHTS = "adapter_model"


def read_config(location: ModelLocation) -> PretrainedConfig:
    """Return the configuration of a model.

    Raises:
        ModelLoadError: there is no configuration, or it cannot be read.
        UnsupportedModelError: the repository has something else than a model that writes text.
    """
    with repository_errors(location, "configuration"):
        config = cast(Any, AutoConfig).from_pretrained(location.path, **location.options)
    _require_no_embeddings(location)
    return config


def read_tokenizer(location: ModelLocation) -> PreTrainedTokenizerBase:
    """Return the tokenizer of a model, with the chat template of its processor if it has none of its own.

    Raises:
        ModelLoadError: the tokenizer cannot be read.
    """
    with repository_errors(location, "tokenizer"):
        tokenizer = cast(Any, AutoTokenizer).from_pretrained(location.path, **location.options)
        for name in CHAT_TEMPLATES:
            if tokenizer.chat_template is None:
                tokenizer.chat_template = (_json_file(location, name) or dict[str, Any]()).get("chat_template")
    return tokenizer


@contextmanager
def repository_errors(location: ModelLocation, part: str) -> Generator[None, None, None]:
    """Turn any error while ``part`` of a model is loaded into ours, with the cause if the files show it."""
    try:
        with model_load_errors(f"the {part} of {location.model_id!r}"):
            yield
    except ModelLoadError as error:
        explained = _explanation(location, str(error.__cause__))
        if explained is None:
            raise
        raise explained from error


def _explanation(location: ModelLocation, message: str) -> KVFusionError | None:
    """Return the error that names the cause of a failure with ``message``, or None if the files do not show it."""
    name, folder = repr(location.model_id), Path(location.path, location.hub.get("subfolder") or "")
    if (pointer := _lfs_pointer(folder)) is not None:
        return ModelLoadError(
            f"{pointer!r} of {name} is a Git LFS pointer, not the file itself; run 'git lfs pull' in the model's "
            "folder, or download the model again."
        )
    config, adapter = _json_file(location, CONFIG), _json_file(location, ADAPTER)
    if is_mapping(adapter) and (config is None or _has_no_weights(folder)):
        base = adapter.get("base_model_name_or_path") or "its base model"
        return ModelLoadError(
            f"{location.path!r} has only an adapter, for {base!r}; load the base model with it: "
            f"from_pretrained({base!r}, adapter={location.path!r}), or --model and --adapter."
        )
    if config is None and _json_file(location, PIPELINE) is not None:
        return UnsupportedModelError(f"{name} is a diffusion pipeline, which writes no text ({PIPELINE}); {INSTEAD}.")
    if folder.is_dir() and not (folder / CONFIG).is_file():
        return ModelLoadError(f"the folder {location.path!r} has no {CONFIG}, so it is not a model of transformers.")
    kind = config.get("model_type") if is_mapping(config) else None
    if not isinstance(kind, str | None):
        return ModelLoadError(f"{CONFIG} of {name} has the model_type {kind!r:.100}, but it must be a text.")
    needs_code = is_mapping(config) and "auto_map" in config and kind not in CONFIG_MAPPING
    if needs_code or "trust_remote_code" in message:
        return UnsupportedModelError(
            f"{name} needs code from its own repository (auto_map), which is never run because it is untrusted; "
            f"{INSTEAD}."
        )
    if kind is not None and kind not in CONFIG_MAPPING:
        return UnsupportedModelError(
            f"{name} has the model_type {kind!r}, which transformers {transformers.__version__} does not know; "
            f"{INSTEAD}."
        )
    return None


def _require_no_embeddings(location: ModelLocation) -> None:
    """Reject embedding models, which may have the architecture of a model that writes text."""
    modules = _json_file(location, MODULES)
    modules = modules if is_list(modules) else []
    kinds = [str(module.get("type")) for module in modules if is_mapping(module)]
    if any(kind.endswith(".Pooling") for kind in kinds):
        raise UnsupportedModelError(
            f"{location.model_id!r} is an embedding model ({MODULES}), which was trained to return vectors and not to "
            f"answer; pass it as --embedding-model, and as the model {INSTEAD}."
        )


def _lfs_pointer(folder: Path) -> str | None:
    """Return the name of a file in ``folder`` in whose place there is a Git LFS pointer."""
    for file in sorted(folder.glob("*")) if folder.is_dir() else ():
        if file.is_file() and file.stat().st_size < 1024 and file.read_bytes().startswith(LFS_POINTER):
            return file.name
    return None


def _has_no_weights(folder: Path) -> bool:
    files = [file for pattern in WEIGHTS for file in folder.glob(pattern)]
    return folder.is_dir() and all(file.name.startswith(ADAPTER_WEIGHTS) for file in files)


def _json_file(location: ModelLocation, name: str) -> Any:
    """Return the contents of a file of the repository, or None if it is missing or not JSON."""
    try:
        path = cached_model_file(location.path, name, revision=location.revision, **location.hub)
        return None if path is None else parse_json(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError):  # also if there is no such repository
        return None
