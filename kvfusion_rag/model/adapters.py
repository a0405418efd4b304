"""LoRA adapters: check the installed libraries, load an adapter onto a model, and check its base model.

It knows about peft and the training record, but not how a model is loaded or called.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from transformers import PreTrainedModel

from ..errors import MissingDependencyError, ModelLoadError, model_load_errors
from ..text.settings import RECORD_NAME
from .fingerprint import digest_tensors

logger = logging.getLogger(__name__)

# The bounds of pyproject.toml for the libraries that adapters need.
ADAPTER_LIBRARIES = {"transformers": ">=5.18,<5.24", "peft": ">=0.20,<0.22", "torchao": ">=0.18,<0.19"}


def require_adapter_libraries() -> None:
    """Check that transformers accepts the installed peft, and that peft accepts torchao if it is installed.

    Raises:
        MissingDependencyError: the libraries are not compatible. The message lists the versions and the command that
            installs compatible ones.
    """
    try:
        # A version outside the bounds may lack these names.
        from peft.import_utils import is_torchao_available
        from transformers.integrations.peft import MIN_PEFT_VERSION
        from transformers.utils.peft_utils import check_peft_version

        check_peft_version(MIN_PEFT_VERSION)
        is_torchao_available()
    except (ImportError, ValueError) as error:
        installed = _installed_versions()
        needed = " ".join(f'"{name}{ADAPTER_LIBRARIES[name]}"' for name in installed)
        listed = ", ".join(f"{name} {number}" for name, number in installed.items())
        raise MissingDependencyError(
            f"no adapter can be used or trained, because the installed versions are not compatible: {listed} "
            f"({error}); run: pip install {needed}"
        ) from error


def _installed_versions() -> dict[str, str]:
    versions: dict[str, str] = {}
    for name in ADAPTER_LIBRARIES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return versions


def load_adapter(model: PreTrainedModel, folder: Path, model_id: str) -> str:
    """Load an adapter onto ``model`` and return the digest of its weights and settings.

    Raises:
        ModelLoadError: the adapter cannot be read, or its weights do not fit the model.
    """
    from peft import get_peft_model_state_dict  # slow to import, and needed only for adapters

    name = folder.resolve().name
    with model_load_errors(f"the adapter {name!r} onto {model_id!r}"):
        loaded = model.load_adapter(str(folder))
    if misfits := sorted(map(str, (*loaded.missing_keys, *loaded.unexpected_keys, *loaded.mismatched_keys))):
        raise ModelLoadError(
            f"cannot load the adapter {name!r} onto {model_id!r}: {len(misfits)} weights do not fit, the first is "
            f"{misfits[0]!r}; it was trained on another base model."
        )
    model.eval()
    settings = {key: vars(value) for key, value in model.peft_config.items()}
    facts = json.dumps(settings, sort_keys=True, default=_sorted_if_set)
    # The model's own method would ask the hub for the configuration of the base model.
    weights = get_peft_model_state_dict(model, save_embedding_layers=False)
    return digest_tensors(weights.items(), facts)


def _sorted_if_set(value: object) -> object:
    """Convert a value that ``json`` rejects. A set is sorted, because its order differs between runs."""
    return sorted(map(str, value)) if isinstance(value, set | frozenset) else str(value)


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
    file, trained = folder / RECORD_NAME, folder.resolve().name
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
