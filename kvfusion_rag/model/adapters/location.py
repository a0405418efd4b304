"""Finds the folder of one adapter: a folder, one of several adapters in a folder, or a hub repository."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

from ...errors import InvalidInputError, ModelLoadError, model_load_errors
from ...home import expanded
from ...text.json_text import is_a
from ...text.settings import FILE_NAME, RECORD_NAME

CONFIG_FILE = "adapter_config.json"  # as peft names it
WEIGHT_FILES = ("adapter_model.safetensors", "adapter_model.bin")


def find_adapter(adapter: str | Path, **hub: Any) -> Path:
    """Return the folder that contains ``adapter_config.json``.

    peft saves several adapters of one model in one folder: "default" in the folder itself, and every other one in a
    sub-folder of its name. A folder is its own adapter if it has one, else its only sub-folder with an adapter.

    Args:
        adapter: folder, hub repository ("user/name"), or one of several adapters in either ("user/name/adapter").
        hub: options of transformers' loaders; of these, token, cache_dir and local_files_only are used.

    Raises:
        ModelLoadError: there is no adapter, or there are several. The message lists them.
        InvalidInputError: ``adapter`` is not a name.
    """
    if not is_a(adapter, str, Path) or not str(adapter).strip():
        raise InvalidInputError(f"adapter is {adapter!r}, but it must be a folder, a hub name or None.")
    path = expanded(adapter)
    if path.is_dir():
        return _one_in(path, str(adapter))
    if names := _adapters_in(path.parent):
        raise ModelLoadError(
            f"the folder {str(path.parent)!r} has no adapter {path.name!r}; its adapters are {', '.join(names)}."
        )
    parts = str(adapter).split("/")
    if isinstance(adapter, Path) or path.is_absolute() or str(adapter).startswith((".", "~")) or len(parts) < 2:
        raise ModelLoadError(f"there is no folder {str(adapter)!r} to load an adapter from.")
    return _downloaded("/".join(parts[:2]), "/".join(parts[2:]), hub)


def name_of(folder: Path) -> str:
    """Return the name to show for an adapter or decoder: the folder's, or the repository's in the hub's cache."""
    place = folder.resolve()
    if place.parent.name != "snapshots":
        return place.name
    return place.parent.parent.name.removeprefix("models--").replace("--", "/")


def _one_in(folder: Path, shown: str) -> Path:
    if (folder / CONFIG_FILE).is_file():
        return folder
    names = _adapters_in(folder)
    if not names:
        raise ModelLoadError(f"the folder {shown!r} has no adapter: {CONFIG_FILE} is missing.")
    if len(names) > 1:
        raise ModelLoadError(
            f"{shown!r} has several adapters ({', '.join(names)}); name one, as in adapter={f'{shown}/{names[0]}'!r}."
        )
    return folder / names[0]


def _adapters_in(folder: Path) -> list[str]:
    return sorted(file.parent.name for file in folder.glob(f"*/{CONFIG_FILE}"))


def _downloaded(repository: str, name: str, hub: dict[str, Any]) -> Path:
    """Return the folder of an adapter in the hub's cache. Other adapters of the repository are not downloaded."""
    import huggingface_hub

    download = cast(Any, huggingface_hub).snapshot_download
    options = {key: hub[key] for key in ("token", "cache_dir", "local_files_only") if key in hub}
    shown = f"{repository}/{name}".rstrip("/")
    with model_load_errors(f"the adapter {shown!r}"):
        snapshot = Path(download(repository, allow_patterns=[f"*{CONFIG_FILE}"], **options))
        if name and not (snapshot / name / CONFIG_FILE).is_file():
            names = ", ".join(_adapters_in(snapshot)) or "not in sub-folders"
            raise ModelLoadError(f"{repository!r} has no adapter {name!r}; its adapters are {names}.")
        inside = _one_in(snapshot / name, shown).relative_to(snapshot)
        files = [(inside / file).as_posix() for file in (CONFIG_FILE, *WEIGHT_FILES, FILE_NAME, RECORD_NAME)]
        return Path(download(repository, allow_patterns=files, **options)) / inside
