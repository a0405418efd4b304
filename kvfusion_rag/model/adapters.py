"""LoRA adapters: check the installed libraries, load an adapter onto a model, and check its base model.

Knows peft and the training record, but not how a model is loaded or called.
"""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
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
        MissingDependencyError: they are not compatible. The message lists the versions and the command that installs
            compatible ones.
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
    found: dict[str, str] = {}
    for name in ADAPTER_LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


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
    """Return JSON for a value that ``json`` rejects; a set is sorted, because its order differs between runs."""
    return sorted(map(str, value)) if isinstance(value, set | frozenset) else str(value)


@dataclass(frozen=True, slots=True)
class BaseRecord:
    """The base model that an adapter or decoder was trained on, as its training record names it.

    Attributes:
        trained: name of the adapter or decoder.
        model_id: name of the base model.
        digests: accepted digests of the base model's weights.
        dtype: precision of the only digest; None if the record lists digests for all precisions.
        same_family: accept other weights under the same name, such as another quantisation, with a warning.
    """

    trained: str
    model_id: object
    digests: list[object]
    dtype: str | None
    same_family: bool

    @classmethod
    def read(cls, folder: Path) -> BaseRecord | None:
        """Return the record in ``folder``, or None if there is none.

        Raises:
            ModelLoadError: the record cannot be read.
        """
        file = folder / RECORD_NAME
        if not file.is_file():
            return None
        with model_load_errors(f"the record of {folder.name!r}"):
            record = json.loads(file.read_text(encoding="utf-8"))
            digests, dtype = record.get("base_weights"), record.get("dtype")
            if isinstance(digests, list):
                dtype = None
            else:
                digests, dtype = [digests], str(dtype)
            same_family = record.get("same_family") is True
            return cls(folder.resolve().name, record.get("base_model"), digests, dtype, same_family)

    def require(self, model_id: str, dtype: torch.dtype, weights_digest: str) -> None:
        """Check that the record describes this base model.

        The shapes of weights do not distinguish two models of one family, so digests are compared. A single digest in
        another precision cannot be compared. Only the name is checked then.

        Raises:
            ModelLoadError: it was trained on another base model.
        """
        if weights_digest in self.digests:
            return
        precision = str(dtype).removeprefix("torch.")
        if self.dtype not in (None, precision):
            if self.model_id != model_id:
                logger.warning(
                    "%r was trained on %r in %s; the weights of %r in %s cannot be compared with it",
                    self.trained, self.model_id, self.dtype, model_id, precision,
                )  # fmt: skip
            return
        if self.model_id != model_id or not self.same_family:
            raise ModelLoadError(
                f"{self.trained!r} was trained on another base model: on {self.model_id!r}, but the weights of "
                f"{model_id!r} differ."
            )
        logger.warning("%r was trained on other weights of %r; answers may be worse here", self.trained, self.model_id)
