"""Loads a model with its adapter or tuned decoder, and applies the caller's changes to its settings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, TypedDict

from ..errors import InvalidInputError
from ..model.loading import load_decoders
from ..schema import ModeChoice
from ..text.reasoning import Reasoning
from ..text.settings import LongDocuments, ModelSettings, Positions, is_count
from ..text.support import MinSupport
from .torch_model import TorchModel

EngineChoice = Literal["torch", "llama.cpp", "vllm", "auto"]
OWN_OPTIONS = {"llama.cpp": ("gpu_layers", "cache_type"), "vllm": ("max_model_len", "vllm_args")}  # by engine


class ModelKwargs(TypedDict, total=False):
    """Options that choose what is loaded, and how.

    Attributes:
        engine: "torch", "llama.cpp", which reads GGUF files (extra ``llama-cpp``), "auto", the faster of both in a
            short measurement, or "vllm", which answers many callers at once (``docs/engines.md``). Default: "torch".
        gpu_layers: layers that llama.cpp puts on a GPU. Default: all if it can use one.
        cache_type: precision of KVs in llama.cpp, "f16" or "q8_0". Default: "f16".
        max_model_len: tokens of documents, question and answer of one request together that vLLM takes. Default: the
            model's context window.
        vllm_args: further arguments of ``vllm serve``.
        gguf_file: name of a GGUF file in the folder or hub repository of the model.
        revision: branch, tag or commit of a hub model.
        adapter: folder or hub name of an adapter (peft) of the answering decoder. Documents are prefilled without it.
            "shipped" (the default) is the one that comes with the model.
        decoder: folder or hub name of an answering decoder with its own weights (full fine-tuning, as in the paper),
            instead of an adapter.
        device: "cpu", "cuda", ... Default: an accelerator if there is one.
        dtype: "float32", "bfloat16" or "float16". Default: float32 on a CPU, else the checkpoint's.
        tokens_per_pass: padded tokens of one prefill pass. Default: a value for the device.
        model_kwargs: passed on to ``AutoModelForCausalLM.from_pretrained``.
    """

    engine: EngineChoice
    gpu_layers: int | None
    cache_type: str | None
    max_model_len: int | None
    vllm_args: Sequence[str] | None
    gguf_file: str | None
    revision: str | None
    adapter: str | Path | Literal["shipped"] | None
    decoder: str | Path | None
    device: str | None
    dtype: str | None
    tokens_per_pass: int | None
    model_kwargs: Mapping[str, Any] | None


class SettingsKwargs(TypedDict, total=False):
    """Changes to the model's own settings, which ``ModelSettings`` describes. None keeps the model's value.

    Attributes:
        mode: "auto", "fusion", "concat" or "ape".
        prefix: text in front of the documents. It implies the fixed layout.
        chat_template_kwargs: variables of the model's chat template, such as ``enable_thinking``.
        max_new_tokens: default limit of an answer.
        reasoning: marks of the model's reasoning, if they cannot be found in its chat template.
        max_reasoning_tokens: default limit of the reasoning in front of an answer.
        min_support: support from which an answer counts as found, a number from 0 to 1 or "auto".
    """

    mode: ModeChoice | None
    prefix: str | None
    passage_length: int | None
    long_documents: LongDocuments | None
    positions: Positions | None
    ape_temperature: float | None
    ape_scale: float | None
    chat_template_kwargs: Mapping[str, Any] | None
    max_new_tokens: int | None
    reasoning: Reasoning | None
    max_reasoning_tokens: int | None
    min_support: MinSupport


class LoadKwargs(ModelKwargs, SettingsKwargs, total=False):
    """Options of ``KVFusionGenerator.from_pretrained``."""


def load_torch_model(model: str | Path | None, options: LoadKwargs) -> tuple[TorchModel, ModelSettings]:
    """Load a model and return it with its settings, including the changes in ``options``.

    Raises:
        ModelLoadError: the model, adapter or decoder cannot be read.
        UnsupportedModelError: fusion is not exact on this architecture.
        InvalidInputError: the value of an option is not allowed.
    """
    given: dict[str, Any] = dict(options)
    tokens_per_pass = given.get("tokens_per_pass")
    if tokens_per_pass is not None and not is_count(tokens_per_pass):
        raise InvalidInputError(
            f"tokens_per_pass is {tokens_per_pass!r}, but it must be a whole number of tokens above 0."
        )
    reject_options_of_other_engines(given, "torch")
    names = ("gguf_file", "revision", "decoder", "device", "dtype", "model_kwargs")
    backbone, decoder = load_decoders(
        model, adapter=given.get("adapter", "shipped"), **{name: given.get(name) for name in names}
    )
    loaded = TorchModel(backbone, decoder, tokens_per_pass=tokens_per_pass)
    return loaded, replace(loaded.settings, **settings_changes(given))


def reject_options_of_other_engines(given: Mapping[str, Any], engine: str) -> None:
    """Raise InvalidInputError if an option is given that only another engine has."""
    for other, names in OWN_OPTIONS.items():
        for name in names if other != engine else ():
            if given.get(name) is not None:
                raise InvalidInputError(f"{name} is {given[name]!r}, but only engine={other!r} has this option.")


def settings_changes(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the changes to a model's settings that are among the options of a caller."""
    changes = {name: given[name] for name in SettingsKwargs.__annotations__ if given.get(name) is not None}
    if "prefix" in changes:
        changes["layout"] = "fixed"
    return changes
