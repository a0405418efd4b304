"""Which folder or hub name a model is loaded from, and the adapter that its folder may carry. Loads nothing."""

from __future__ import annotations

from pathlib import Path

from .errors import InvalidInputError, ModelLoadError

EMBEDDED_MODEL = Path(__file__).parent / "pretrained"


def locate_model(model: str | Path | None) -> tuple[str, str]:
    """Folder or hub name to load, and the name to show for it."""
    if model is None:
        return str(EMBEDDED_MODEL), "kvfusion-embedded"
    if not isinstance(model, str | Path):
        raise InvalidInputError(f"model is {model!r}, but it must be a hub name, a folder or None.")
    if isinstance(model, str) and not model.strip():
        raise InvalidInputError(f"model is {model!r}, but it must be a hub name, a folder or None.")
    try:
        folder = Path(model).expanduser()
    except RuntimeError as error:
        raise ModelLoadError(f"there is no folder {str(model)!r} to load a model from: {error}") from error
    if folder.is_dir():
        return str(folder), folder.resolve().name
    if isinstance(model, Path) or folder.is_absolute() or str(model).startswith("."):
        raise ModelLoadError(f"there is no folder {str(model)!r} to load a model from.")
    return model, model


def shipped_adapter(folder: str | Path) -> Path | None:
    """The adapter that a model folder carries in ``adapter/``, if it does."""
    found = Path(folder) / "adapter"
    return found if (found / "adapter_config.json").is_file() else None
