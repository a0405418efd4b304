"""One call from names and rows to a trained decoder: loads the models, makes the engine, runs the trainer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from ..backbone import Backbone
from ..engine import Engine
from ..errors import InvalidInputError
from ..generator import MAX_FUSED_TOKENS, locate_model
from ..qa import QARow
from ..store import MemoryStore
from .config import TrainingConfig
from .trainer import Progress, Trainer

DEFAULT_STORE_BYTES = 4 << 30


def train(
    rows: Sequence[QARow],
    *,
    output: str | Path,
    model: str | Path | None = None,
    dev: Sequence[QARow] = (),
    config: TrainingConfig | None = None,
    device: str | None = None,
    dtype: str | None = None,
    store_bytes: int = DEFAULT_STORE_BYTES,
    resume: bool = False,
    report: Callable[[Progress], None] | None = None,
) -> Progress:
    """Train the answering decoder Dt of ``model`` on rows of documents, question and answer.

    Args:
        rows: to train on; ``kvfusion build-data`` makes them.
        output: folder for ``best/`` (an adapter, or with ``config.full`` a model) and ``checkpoint/``.
        model: hub name or folder; the embedded model by default.
        dev: rows to choose the best checkpoint by (exact match).
        config: settings; the defaults are those of the preset "lora".
        store_bytes: memory for document KVs, kept across epochs as far as they fit.
        resume: go on from ``output/checkpoint`` if it is there.
        report: called after each evaluation.

    Raises:
        InvalidInputError: no rows, or the output holds another run and ``resume`` is not set.
        ModelLoadError, UnsupportedModelError: as ``KVFusionGenerator.from_pretrained``.
    """
    config, folder = config or TrainingConfig(), Path(output)
    if not rows:
        raise InvalidInputError("there are no rows to train on.")
    if not resume and (folder / "checkpoint").exists():
        raise InvalidInputError(f"{str(folder)!r} holds a training run already; name another folder, or resume it.")
    path, model_id = locate_model(model)
    base = Backbone.load(path, model_id=model_id, device=device, dtype=dtype)
    if base.settings.positions != "uniform":
        raise InvalidInputError(
            f"positions is {base.settings.positions!r} in the settings of {model_id!r}, but training reads documents "
            "at uniform positions."
        )
    decoder = Backbone.load(path, model_id=model_id, device=device, dtype=dtype) if config.full else None
    engine = Engine(
        base,
        base.settings,
        store=MemoryStore(store_bytes),
        namespace="",
        max_fused_tokens=MAX_FUSED_TOKENS,
        tokens_per_pass=None,
        decoder=decoder,
    )
    return Trainer(engine, rows, dev, config, folder).run(resume=resume, report=report)
