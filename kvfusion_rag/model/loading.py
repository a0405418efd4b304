"""Load models: the backbone that prefills documents, and the answering decoder if it has its own weights.

Uses transformers' own loaders. Remote code stays off.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, cast

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedTokenizerBase

from ..errors import InvalidInputError, ModelLoadError, model_load_errors
from ..text.settings import FILE_NAME, ModelSettings, load_settings
from .adapters.base import require_same_base
from .adapters.libraries import require_adapter_libraries
from .adapters.location import CONFIG_FILE, find_adapter, name_of
from .backbone import Backbone
from .hardware import SLOW, choose_device, choose_dtype, slowness
from .location import HUB_OPTIONS, ModelLocation, locate_model
from .pretrained import PreTrainedModel
from .repository import read_config, read_tokenizer, repository_errors
from .support import require_supported
from .text_part import TEXT_WEIGHTS, text_part, without_load_report

logger = logging.getLogger(__name__)

# Options that are separate arguments here, or that transformers would ignore.
RESERVED_OPTIONS = (
    "config", "dtype", "torch_dtype", "revision", "gguf_file", "trust_remote_code", "adapter_kwargs"
)  # fmt: skip
# Where transformers looks for an adapter beside a model's weights, which it would apply to documents too.
NOWHERE = {"subfolder": "no-adapter", "local_files_only": True}


def load_decoders(
    model: str | Path | None,
    *,
    gguf_file: str | None,
    revision: str | None,
    adapter: str | Path | Literal["shipped"] | None,
    decoder: str | Path | None,
    device: str | None,
    dtype: str | None,
    model_kwargs: Mapping[str, Any] | None,
) -> tuple[Backbone, Backbone | None]:
    """Return the backbone that prefills documents, and the answering decoder or None if the backbone answers.

    Arguments are those of ``KVFusionGenerator.from_pretrained``.

    Raises:
        ModelLoadError: a file cannot be read, or the adapter or decoder belongs to another base model.
        UnsupportedModelError: the architecture cannot be fused exactly.
        InvalidInputError: the value of an argument is not allowed.
    """
    hub = {name: value for name, value in (model_kwargs or {}).items() if name in HUB_OPTIONS}
    location = locate_model(model, gguf_file=gguf_file, revision=revision, **hub)
    if adapter == "shipped":
        adapter = location.adapter if decoder is None else None
        if adapter is None and (Path(location.path) / CONFIG_FILE).is_file():
            logger.warning(
                "the adapter beside the weights of %s is not used, because they may contain it already; if they do "
                "not, pass adapter=%r", location.model_id, location.path,
            )  # fmt: skip
    if adapter is not None and decoder is not None:
        raise InvalidInputError("adapter and decoder are both given, but an answering decoder has only one of them.")
    backbone = load_backbone(location, adapter=adapter, device=device, dtype=dtype, model_kwargs=model_kwargs)
    if decoder is None:
        return backbone, None
    decoder_location = locate_model(decoder, **hub)
    backbone.require_base_of(Path(decoder_location.home))
    same_dtype = str(backbone.dtype).removeprefix("torch.")  # the decoder reads the keys of the base model
    return backbone, load_backbone(decoder_location, device=device, dtype=same_dtype, model_kwargs=model_kwargs)


def load_backbone(
    location: ModelLocation,
    *,
    adapter: str | Path | None = None,
    device: str | None = None,
    dtype: str | None = None,
    model_kwargs: Mapping[str, Any] | None = None,
) -> Backbone:
    """Load one model with its tokenizer, settings and optional adapter.

    Args:
        location: result of ``locate_model``.
        adapter: folder or hub name of an adapter; see ``find_adapter``.
        device: "cpu", "cuda", "cuda:1" or "mps". The default is an accelerator if there is one.
        dtype: "float32", "bfloat16" or "float16". The default is float32 on a CPU, else the checkpoint's own.
        model_kwargs: options of ``AutoModelForCausalLM.from_pretrained``. Those in ``HUB_OPTIONS`` are ignored here,
            since ``location`` has them.

    Raises:
        ModelLoadError: the model, tokenizer or adapter cannot be read.
        UnsupportedModelError: the architecture cannot be fused exactly.
        MissingDependencyError: there is an adapter, and the installed transformers and peft are not compatible.
    """
    if adapter is not None:
        require_adapter_libraries()
        adapter = find_adapter(adapter, **location.hub)
    torch_device = choose_device(device)
    torch_dtype = choose_dtype(dtype, torch_device)
    if torch_device.type == "cpu" and isinstance(torch_dtype, torch.dtype) and slowness(torch_dtype) > SLOW:
        logger.warning("this processor has no instructions for %s: float32 is many times faster here", dtype)
    began = time.perf_counter()
    kwargs = {name: value for name, value in (model_kwargs or {}).items() if name not in HUB_OPTIONS}
    if reserved := sorted(kwargs.keys() & set(RESERVED_OPTIONS)):
        raise InvalidInputError(
            f"model_kwargs contains {reserved[0]!r}, but it must not; see KVFusionGenerator.from_pretrained."
        )
    model_id, hub = location.model_id, {"revision": location.revision, **location.hub}
    whole = read_config(location)
    config = _text_config(whole, kwargs, model_id)  # checked before gigabytes are read
    is_text_part = config is not whole
    tokenizer = read_tokenizer(location)
    with model_load_errors(f"the settings of {model_id!r}"):
        base_settings = load_settings(location.home, tokenizer, model_id=model_id, **hub)
        settings = base_settings if adapter is None else adapter_settings(adapter, base_settings, tokenizer)
    weights = _load_weights(location, config, torch_device, torch_dtype, kwargs, is_text_part=is_text_part)
    if adapter is not None:
        require_same_base(adapter, weights, model_id, exact=location.path == location.home)
    _log_loading(weights, model_id, time.perf_counter() - began)
    return Backbone(
        weights,
        tokenizer,
        settings,
        model_id=model_id,
        revision=getattr(whole, "_commit_hash", None) or location.revision,
        adapter=adapter,
        base_settings=base_settings,
        is_text_part=is_text_part,
    )


def _log_loading(weights: PreTrainedModel, model_id: str, seconds: float) -> None:
    facts = (weights.dtype, weights.device, torch.get_num_threads())
    logger.info("loaded %s in %.1f s: %s on %s, %d CPU threads", model_id, seconds, *facts)


def _text_config(whole: PretrainedConfig, kwargs: dict[str, Any], model_id: str) -> PretrainedConfig:
    """Return the configuration of the text model, with the fields that are among ``kwargs``, which lose them."""
    require_supported(whole, model_id)
    config = text_part(whole)
    with model_load_errors(f"the configuration of {model_id!r}"):
        for name in kwargs.keys() & config.to_dict().keys():
            setattr(config, name, kwargs.pop(name))
    require_supported(config, model_id)
    return config


def adapter_settings(adapter: Path, base_settings: ModelSettings, tokenizer: PreTrainedTokenizerBase) -> ModelSettings:
    """Return the settings that an adapter was trained with."""
    if (adapter / FILE_NAME).is_file():
        return load_settings(str(adapter), tokenizer, model_id=name_of(adapter))
    return replace(base_settings, tuned_concat=True)  # made by other software, so trained on ordinary prompts


def _load_weights(
    location: ModelLocation,
    config: PretrainedConfig,
    device: torch.device,
    dtype: torch.dtype | str,
    options: Mapping[str, Any],
    *,
    is_text_part: bool,
) -> PreTrainedModel:
    names = {"key_mapping": TEXT_WEIGHTS} if is_text_part else {}
    report = without_load_report() if is_text_part else nullcontext()
    with repository_errors(location, "weights"), report:
        loaded = cast(Any, AutoModelForCausalLM).from_pretrained(
            location.path,
            config=config,
            dtype=dtype,
            output_loading_info=True,
            adapter_kwargs=NOWHERE,
            **{**location.options, **names, **options},
        )
        model, info = cast(tuple[PreTrainedModel, dict[str, Any]], loaded)
        if "device_map" not in options:
            model.to(device=device)  # type: ignore[call-arg]  # in place
    if missing := sorted(info["missing_keys"]):
        raise ModelLoadError(
            f"cannot load the weights of {location.model_id!r}: {len(missing)} are missing in the checkpoint, the "
            f"first is {missing[0]!r}; it is incomplete or belongs to another architecture."
        )
    return model
