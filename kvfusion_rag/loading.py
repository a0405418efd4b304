"""Dp and Dt by name: one set of weights with or without an adapter, or two sets."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from .backbone import Backbone, require_trained_on
from .errors import InvalidInputError
from .locating import locate_model, shipped_adapter


def load_decoders(
    model: str | Path | None,
    *,
    revision: str | None,
    adapter: str | Path | Literal["shipped"] | None,
    decoder: str | Path | None,
    device: str | None,
    dtype: str | None,
    model_kwargs: Mapping[str, Any] | None,
) -> tuple[Backbone, Backbone | None]:
    """The backbone that prefills documents, and the decoder that answers where its weights are its own.

    Arguments are those of ``KVFusionGenerator.from_pretrained``.

    Raises:
        ModelLoadError: something cannot be read, or adapter or decoder belong to another base model.
        UnsupportedModelError: the architecture cannot be fused exactly.
        InvalidInputError: an argument is outside what is allowed.
    """
    path, model_id = locate_model(model)
    if adapter == "shipped":
        adapter = shipped_adapter(path) if decoder is None else None
    if adapter is not None and decoder is not None:
        raise InvalidInputError("adapter and decoder are both given, but an answering decoder has one or the other.")
    backbone = Backbone.load(
        path,
        model_id=model_id,
        revision=revision,
        adapter=adapter,
        device=device,
        dtype=dtype,
        model_kwargs=model_kwargs,
    )
    if decoder is None:
        return backbone, None
    folder, name = locate_model(decoder)
    require_trained_on(Path(folder), backbone)
    alike = str(backbone.dtype).removeprefix("torch.")  # it reads the base's keys
    return backbone, Backbone.load(folder, model_id=name, device=device, dtype=alike, model_kwargs=model_kwargs)
