"""Loads an adapter onto a model as peft does, but keeps the base weights.

peft's own ``load_adapter`` in transformers 5.23 leaves trained heads switched off and cannot read DoRA, so peft
itself loads here. Where peft changes base weights, the change is moved into the adapter, because documents are read
by the base model.
"""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch

from ...errors import ModelLoadError, model_load_errors
from ..fingerprint import digest_tensors
from ..pretrained import PreTrainedModel
from .base import base_of
from .kinds import changes_base, require_accepted_kind
from .location import WEIGHT_FILES, name_of

if TYPE_CHECKING:
    from peft import PeftConfig

# Imports of peft are inside functions, because they take a second, and are needed only for adapters.
Weights = dict[str, torch.Tensor]
SAME = 1e-2  # relative difference of a weight that was saved in another precision
_PREFIX = "base_model.model."  # of names in peft's files


def load_adapter(model: PreTrainedModel, folder: Path, model_id: str) -> str:
    """Load an adapter onto ``model``, switched on, and return the digest of its weights and settings.

    Raises:
        ModelLoadError: the adapter cannot be read, is of a kind that is not supported, or does not fit the model.
    """
    import peft

    library, name, base = cast(Any, peft), name_of(folder), base_of(folder)
    subject = f"the adapter {name!r}{f' of {base!r}' if base else ''} onto {model_id!r}"
    with model_load_errors(subject):
        config = library.PeftConfig.from_pretrained(str(folder))
        require_accepted_kind(config, name)
        if not any((folder / file).is_file() for file in WEIGHT_FILES):
            raise ModelLoadError(f"cannot load {subject}: {WEIGHT_FILES[0]} is missing in {str(folder)!r}.")
        weights: Weights = library.load_peft_weights(str(folder), device="cpu")
        settings = json.dumps(vars(config), sort_keys=True, default=_sorted_if_set)
        _separate_base_weights(config, weights, model, subject)
        initial = config.init_lora_weights if changes_base(config) else None
        if initial is not None:
            if getattr(model, "is_quantized", False):
                raise ModelLoadError(f"cannot load {subject}: {initial} needs base weights that are not quantized.")
            config.init_lora_weights = True
        config.inference_mode = True
        found, misfits = _attach(model, config, weights)
    if misfits:
        trained_on = "another base model" + (f", {base!r}" if base else "")
        raise ModelLoadError(
            f"cannot load the adapter {name!r} onto {model_id!r}: it was trained on {trained_on}; {len(misfits)} "
            f"weights do not fit, the first is {misfits[0]!r}."
        )
    if initial is not None:
        _subtract_initial_weights(model, str(initial))
    model.eval()
    return digest_tensors(found.items(), settings)


def _attach(model: PreTrainedModel, config: PeftConfig, weights: Weights) -> tuple[Weights, list[str]]:
    """Add an adapter to ``model``, and return its weights in the model with the names of those that do not fit."""
    import peft

    library = cast(Any, peft)

    with warnings.catch_warnings():  # about training, about other versions, and about sizes, which are checked here
        warnings.simplefilter("ignore")
        adapted = peft.PeftModel(model, config, autocast_adapter_dtype=False)
        try:
            result = library.set_peft_model_state_dict(adapted, weights, ignore_mismatched_sizes=True)
        except KeyError as error:  # the file lacks a module to save
            return {}, [str(error.args[0])]
    missed = set(result.missing_keys)
    loaded = {tensor.data_ptr() for name, tensor in adapted.state_dict().items() if name not in missed}
    # The model's own method would ask the hub for the configuration of the base model.
    found: Weights = library.get_peft_model_state_dict(adapted, save_embedding_layers=False)
    fits = {name for name, tensor in found.items() if name in weights and weights[name].shape == tensor.shape}
    missing = [n for n, tensor in found.items() if n not in fits and tensor.data_ptr() not in loaded]
    return found, sorted([*missing, *result.unexpected_keys])


def _base_name(key: str) -> str:
    """Return the name that a weight has in the base model, without the modules that peft puts around it."""
    parts = key.removeprefix(_PREFIX).split(".")
    return ".".join(part for part in parts if part not in ("base_layer", "original_module", "token_adapter"))


def _separate_base_weights(config: Any, weights: Weights, model: PreTrainedModel, subject: str) -> None:
    """Remove base weights from an adapter's file, since peft would load them into the base model.

    Files contain whole embeddings if the adapter changes them, or if the caller of peft wanted so. Changed ones become
    ``modules_to_save``, which are switched off for documents.

    Raises:
        ModelLoadError: the file has changed base weights that cannot be switched off.
    """
    base, vocabulary = model.state_dict(), cast(Any, model.config).get_text_config().vocab_size
    replaced: list[str] = list(getattr(config, "modules_to_save", None) or ())
    for key in [key for key in weights if _base_name(key) in base]:
        name = _base_name(key)
        rows, same_width = len(weights[key]), weights[key].shape[1:] == base[name].shape[1:]
        if same_width and rows != len(base[name]) == vocabulary:
            raise ModelLoadError(
                f"cannot load {subject}: its {name!r} has {rows} rows, but the base model has {vocabulary} tokens; "
                "adapters with a changed vocabulary are not supported."
            )
        if not same_width or (any(f".{module}." in f".{name}" for module in replaced) and key == _PREFIX + name):
            continue  # weights of another width are reported with the other weights that do not fit
        if torch.allclose(weights[key].float(), base[name].float().cpu(), rtol=SAME, atol=1e-6):
            del weights[key]
            continue
        module = name.rpartition(".")[0]
        if key != _PREFIX + name or name.endswith(".bias") or not hasattr(config, "modules_to_save"):
            raise ModelLoadError(
                f"cannot load {subject}: it also changes {name!r} of the base model, which cannot be switched off for "
                "documents."
            )
        replaced.append(module)
        config.modules_to_save = replaced
    if hasattr(config, "bias"):
        config.bias = "none"  # those of the file are the base model's


def _subtract_initial_weights(model: PreTrainedModel, initial: str) -> None:
    """Turn LoRA weights that were trained on a changed base into weights for the base itself.

    PiSSA and OLoRA take the initial weights A0, B0 from the base weight W, and train A, B on W - B0 A0. With twice the
    rank, [B, -B0] [A; A0] has the same effect on W.
    """
    for layer, name in _lora_layers(model):
        a = layer.lora_A[name].weight
        b = layer.lora_B[name].weight
        trained_a, trained_b = a.data, b.data
        base = layer.base_layer
        layer.base_layer = copy.deepcopy(base)  # which peft changes
        layer.olora_init(name) if initial.lower() == "olora" else layer.pissa_init(name, initial)
        layer.base_layer = base
        a.data = torch.cat([trained_a, a.data.to(trained_a)])
        b.data = torch.cat([trained_b, -b.data.to(trained_b)], dim=1)


def _lora_layers(model: PreTrainedModel) -> Iterator[tuple[Any, str]]:
    """Yield each layer with low-rank matrices, and the name of the adapter in it."""
    from peft.tuners.lora import LoraLayer

    for module in model.modules():
        if isinstance(module, LoraLayer):
            yield from ((module, name) for name in module.lora_A)


def _sorted_if_set(value: object) -> object:
    """Convert a value that ``json`` rejects. A set is sorted, because its order differs between runs."""
    return sorted(map(str, cast(set[object], value))) if isinstance(value, set | frozenset) else str(value)
