"""Dp and Dt by name: one set of weights with or without an adapter, or two sets."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from ..errors import InvalidInputError
from .backbone import Backbone, require_trained_on
from .locating import HUB_OPTIONS, locate_model


def load_decoders(
    model: str | Path | None,
    *,
    gguf_file: str | None,
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
    hub = {name: value for name, value in (model_kwargs or {}).items() if name in HUB_OPTIONS}
    where = locate_model(model, gguf_file=gguf_file, revision=revision, **hub)
    if adapter == "shipped":
        adapter = where.adapter if decoder is None else None
    if adapter is not None and decoder is not None:
        raise InvalidInputError("adapter and decoder are both given, but an answering decoder has one or the other.")
    backbone = Backbone.load(where, adapter=adapter, device=device, dtype=dtype, model_kwargs=model_kwargs)
    if decoder is None:
        return backbone, None
    found = locate_model(decoder, **hub)
    require_trained_on(Path(found.home), backbone)
    alike = str(backbone.dtype).removeprefix("torch.")  # it reads the base's keys
    return backbone, Backbone.load(found, device=device, dtype=alike, model_kwargs=model_kwargs)
