"""Checks that an adapter or decoder was trained on the model that it is loaded onto.

The training record of this package contains a digest of the base weights. Other software only names the base model.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import safe_open
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ...errors import ModelLoadError, model_load_errors
from ...text.settings import RECORD_NAME
from ..pretrained import PreTrainedModel
from ..tolerance import relative_error
from .location import CONFIG_FILE, name_of

logger = logging.getLogger(__name__)

COMPARED_MATRICES = 8  # of a named base model; another fine-tuning of the same model differs in nearly all
QUANTIZATION = (
    0.5  # relative difference that rounding to few bits may cause; two unrelated models differ by more than 1
)


def require_trained_on(folder: Path, model_id: str, dtype: torch.dtype, weights_digest: Callable[[], str]) -> None:
    """Check the training record in ``folder``, if there is one, against the base model.

    The shapes of weights do not distinguish two models of one family, so digests are compared. A record contains one
    digest, or a list of digests for all precisions. One digest in another precision cannot be compared, so only the
    name is checked. With ``"same_family": true``, other weights of the same name, such as another quantization, are
    accepted with a warning.

    Args:
        folder: folder of an adapter or decoder.
        model_id: name of the base model.
        weights_digest: computes the digest of the base model's weights.

    Raises:
        ModelLoadError: the record cannot be read, or names another base model.
    """
    file, trained = folder / RECORD_NAME, name_of(folder)
    if not file.is_file():
        return
    with model_load_errors(f"the record of {trained!r}"):
        record = json.loads(file.read_text(encoding="utf-8"))
        recorded, trained_on, trained_in = (record.get(key) for key in ("base_weights", "base_model", "dtype"))
        same_family = record.get("same_family") is True
    precision, has_list = str(dtype).removeprefix("torch."), isinstance(recorded, list)
    if weights_digest() in (recorded if has_list else [recorded]):
        return
    if trained_in != precision and not has_list:
        if trained_on != model_id:
            logger.warning(
                "%r was trained on %r in %s; the weights of %r in %s cannot be compared with it",
                trained, trained_on, trained_in, model_id, precision,
            )  # fmt: skip
        return
    if trained_on != model_id or not same_family:
        raise ModelLoadError(
            f"{trained!r} was trained on another base model: on {trained_on!r}, but the weights of {model_id!r} "
            "differ."
        )
    logger.warning("%r was trained on other weights of %r; answers may be worse here", trained, trained_on)


def base_of(folder: Path) -> str | None:
    """Return the base model that peft's settings in ``folder`` name, if any.

    Raises:
        ModelLoadError: the settings cannot be read.
    """
    with model_load_errors(f"the adapter {name_of(folder)!r}"):
        named = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8")).get("base_model_name_or_path") or None
        if not isinstance(named, str | None):
            raise ValueError(f"base_model_name_or_path is {named!r:.100}, but it must be a text")
        return named


def require_same_base(folder: Path, model: PreTrainedModel, model_id: str, *, exact: bool) -> None:
    """Check the base model that an adapter without training record names.

    If it is a folder on this machine, some of its matrices are compared with those of ``model``. A name alone proves
    nothing, since copies have other names, so a different name is only logged.

    Args:
        exact: whether equal models have equal bits. False if ``model`` was a GGUF file.

    Raises:
        ModelLoadError: the weights differ.
    """
    named, trained = base_of(folder), name_of(folder)
    if named is None or (folder / RECORD_NAME).is_file():
        return
    difference = _difference(Path(named), model)
    if difference is None:
        if Path(named).name.lower() != model_id.split("/")[-1].lower():
            logger.warning("the adapter %r names the base model %r, but it is used with %r", trained, named, model_id)
    elif difference > (0 if exact else QUANTIZATION):
        raise ModelLoadError(
            f"{trained!r} was trained on another base model: on {named!r}, but the weights of {model_id!r} differ."
        )


def _difference(folder: Path, model: PreTrainedModel) -> float | None:
    """Return the largest relative difference in a sample of matrices; None if there is none to compare."""
    try:
        files = sorted(folder.glob("*.safetensors"))
    except (OSError, ValueError):  # the name of no folder, such as one with more characters than a name may have
        return None
    if not files:
        return None
    weights = {name: weight for name, weight in model.state_dict().items() if _is_plain_matrix(weight)}
    with (
        model_load_errors(f"the base model {str(folder)!r} of the adapter"),
        cast(Any, safe_open(files[0], "pt")) as saved,
    ):
        names = sorted(weights.keys() & set(saved.keys()))
        sample = names[:: max(1, len(names) // COMPARED_MATRICES)]
        return max((_relative(weights[name].cpu(), saved.get_tensor(name)) for name in sample), default=None)


def _is_plain_matrix(weight: torch.Tensor) -> bool:
    return weight.dim() == 2 and weight.is_floating_point() and not is_traceable_wrapper_subclass(weight)


def _relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    if found.shape != expected.shape:
        return torch.inf
    return relative_error(found.float(), expected.to(found.dtype).float())
