"""Converts a GGUF file into a model folder (config, tokenizer, safetensors) with transformers' own GGUF reader.

Weights are dequantized: to float32 for models below a billion parameters, which keeps every value exact, and to
bfloat16 for larger ones. Tied embeddings are written once. The configuration does not mention quantization, since the
converted weights are dense.
"""

from __future__ import annotations

import logging
import sys
import threading
from collections.abc import Generator
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import Any, TextIO, cast

import torch
import transformers
from tokenizers import pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    GgufConfig,
    PretrainedConfig,
    PreTrainedTokenizerFast,
)

from ...errors import ModelLoadError, UnsupportedModelError, model_load_errors
from ...text.json_text import is_list
from ..pretrained import PreTrainedModel
from ..support import require_supported
from .header import GGUFHeader

logger = logging.getLogger(__name__)

PRE_TOKENIZER = "tokenizer.ggml.pre"
FLOAT32_BELOW = 1_000_000_000  # parameters
GPT2_SPLITS = {"gpt-2", "default", "phi-2", "mpt", "olmo", "jais"}  # the split that transformers falls back to
DIGIT_SPLITS = {"smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"}

_stderr_lock = threading.Lock()  # sys.stderr belongs to the whole process


def convert(file: Path, header: GGUFHeader, folder: Path, *, weights: bool = True) -> None:
    """Write the model of GGUF ``file`` into the empty ``folder``, or only its configuration and tokenizer.

    Raises:
        ModelLoadError: transformers cannot read the model or the tokenizer, or tensors are missing.
        OSError, SafetensorError: ``folder`` cannot be written to.
    """
    # The folder is empty, so transformers takes everything from the GGUF file and ignores the files beside it.
    source: dict[str, Any] = {"pretrained_model_name_or_path": str(folder), "gguf_file": str(file.absolute())}
    with _quiet_libraries():
        with model_load_errors(f"the configuration of {file.name!r}"):
            config = _configuration(source, header, file.name)
            require_supported(config, file.name)
            _require_enough_tensors(config, header, file.name)
        with model_load_errors(f"the tokenizer of {file.name!r}"):
            # The generic class keeps the tokenizer as the file describes it. A model's own class would rebuild it.
            tokenizer = cast(Any, PreTrainedTokenizerFast).from_pretrained(**source)
            is_known = _set_split(tokenizer, header)
        if weights:
            model = _load_weights(source, config, header, file.name)
            _add_end_of_turn(model.generation_config, header)
            cast(Any, model).save_pretrained(folder)
        else:
            generation = cast(Any, GenerationConfig).from_model_config(config)
            _add_end_of_turn(generation, header)
            cast(Any, config).save_pretrained(folder)
            generation.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    if not is_known:
        logger.warning(
            "%r names an unknown way to split text (%r): text is split as in GPT-2, so token ids may differ from "
            "those of the original tokenizer",
            file.name, header.metadata.get(PRE_TOKENIZER),
        )  # fmt: skip


def _load_weights(source: dict[str, Any], config: PretrainedConfig, header: GGUFHeader, name: str) -> PreTrainedModel:
    with model_load_errors(f"the weights of {name!r}"):
        loaded = cast(Any, AutoModelForCausalLM).from_pretrained(
            **source,
            config=config,
            dtype=storage_dtype(header),
            quantization_config=GgufConfig(dequantize=True),
            output_loading_info=True,
        )
        model, info = cast(tuple[PreTrainedModel, dict[str, Any]], loaded)
    if missing := sorted(info["missing_keys"]):
        raise ModelLoadError(
            f"cannot load the weights of {name!r}: {len(missing)} are missing, the first is {missing[0]!r}."
        )
    return model


def _configuration(source: dict[str, Any], header: GGUFHeader, name: str) -> PretrainedConfig:
    try:
        return cast(Any, AutoConfig).from_pretrained(**source)
    except ValueError as error:
        if "is not supported yet" not in str(error):
            raise
        raise UnsupportedModelError(
            f"{name!r} has the architecture {header.metadata['general.architecture']!r}, which transformers "
            f"{transformers.__version__} cannot convert from GGUF; load the model that the file was made from."
        ) from error


def storage_dtype(header: GGUFHeader) -> torch.dtype:
    """Return the precision of the converted weights."""
    return torch.float32 if header.parameters < FLOAT32_BELOW else torch.bfloat16


def _require_enough_tensors(config: PretrainedConfig, header: GGUFHeader, name: str) -> None:
    """Reject a model with more parameters than the file contains, before memory is allocated for it."""
    with torch.device("meta"):
        model = cast(Any, AutoModelForCausalLM).from_config(config)
    needed = sum(parameter.numel() for parameter in model.parameters())
    if needed > header.parameters:
        raise ModelLoadError(
            f"{name!r} is damaged: its metadata describes a model of {needed} parameters, but it contains "
            f"{header.parameters}."
        )


def _set_split(tokenizer: PreTrainedTokenizerFast, header: GGUFHeader) -> bool:
    """Set how text is split before byte-level BPE, and return whether the file's way to split is known.

    transformers falls back to GPT-2's split if it does not know the file's own.
    """
    backend, kind = tokenizer.backend_tokenizer, header.metadata.get(PRE_TOKENIZER, "default")
    is_gpt2 = isinstance(backend.pre_tokenizer, pre_tokenizers.ByteLevel)
    if header.metadata.get("tokenizer.ggml.model") != "gpt2" or not is_gpt2:
        return True
    if kind in DIGIT_SPLITS:
        parts = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        backend.pre_tokenizer = pre_tokenizers.Sequence(parts)  # type: ignore[assignment]
        return True
    return kind in GPT2_SPLITS


def _add_end_of_turn(settings: GenerationConfig | None, header: GGUFHeader) -> None:
    """Let the end-of-turn token end an answer too. transformers reads only the end-of-text token."""
    if settings is None:
        return
    configured = cast(Any, settings).eos_token_id
    ends = [*(configured if is_list(configured) else [configured]), header.token_id("eot")]
    settings.eos_token_id = list(dict.fromkeys(i for i in ends if i is not None)) or None


@contextmanager
def _quiet_libraries() -> Generator[None, None, None]:
    """Suppress progress bars and hints of other libraries.

    transformers' progress bar over GGUF tensors has no switch, so this thread's output to stderr is dropped.
    """
    hints = logging.getLogger("transformers")
    with _stderr_lock:
        level = hints.level
        hints.setLevel(logging.ERROR)
        try:
            with redirect_stderr(cast(TextIO, _OtherThreads(sys.stderr, threading.get_ident()))):
                yield
        finally:
            hints.setLevel(level)


class _OtherThreads:
    """A stream that drops the output of one thread."""

    def __init__(self, stream: TextIO, dropped: int) -> None:
        self._stream = stream
        self._dropped = dropped

    def write(self, text: str) -> int:
        return len(text) if threading.get_ident() == self._dropped else self._stream.write(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
