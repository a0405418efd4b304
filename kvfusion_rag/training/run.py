"""One call from names and rows to a trained decoder: loads the models, makes the engine, runs the trainer."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from accelerate import PartialState

from ..data.rows import QARow
from ..engine.engine import Engine
from ..errors import InvalidInputError
from ..generator import MAX_FUSED_TOKENS
from ..model.adapters import require_adapter_libraries
from ..model.hardware import choose_device
from ..model.loading import load_backbone
from ..model.location import locate_model
from ..store import MemoryStore
from .checkpoint import recover
from .config import TrainingConfig
from .examples import require_trainable
from .progress import LOSSES, Progress
from .trainer import Trainer

DEFAULT_STORE_BYTES = 4 << 30


def train(
    rows: Sequence[QARow],
    *,
    output: str | Path,
    model: str | Path | None = None,
    gguf_file: str | None = None,
    dev: Sequence[QARow] = (),
    config: TrainingConfig | None = None,
    device: str | None = None,
    dtype: str | None = None,
    store_bytes: int = DEFAULT_STORE_BYTES,
    resume: bool = False,
    files: Mapping[str, Any] | None = None,
    report: Callable[[Progress], None] | None = None,
) -> Progress:
    """Train the answering decoder Dt of ``model`` on rows of documents, question and answer.

    Args:
        rows: to train on; ``kvfusion build-data`` makes them.
        output: folder for ``best/`` (an adapter, or with ``config.full`` a model), ``checkpoint/`` and
            ``losses.json``.
        model, gguf_file: as ``KVFusionGenerator.from_pretrained`` takes them.
        dev: rows to choose the best checkpoint by (exact match).
        config: settings; the defaults are those of the preset "lora".
        store_bytes: memory for document KVs, kept across epochs as far as they fit.
        dtype: "float32" or "bfloat16", whose weights are updated through float32 copies; by default float32 on CPU,
            else the checkpoint's own.
        resume: go on from ``output/checkpoint`` if it is there; ``epochs`` and ``max_steps`` may then be higher.
        files: where the rows come from, for the record in ``best/training.json``.
        report: called after each evaluation.

    Raises:
        InvalidInputError: no rows, or one that nothing can be learned from; the output holds a run and ``resume`` is
            not set, or it holds one of other rows or settings.
        ModelLoadError, UnsupportedModelError: as ``KVFusionGenerator.from_pretrained``.
        MissingDependencyError: an adapter is to be trained, and the installed transformers and peft do not fit.
    """
    config, folder = config or TrainingConfig(), Path(output)
    if not config.full:
        require_adapter_libraries()  # before the model is loaded and rows are encoded
    processes = PartialState(cpu=choose_device(device).type == "cpu")
    if device is None and processes.num_processes > 1:
        device = str(processes.device)  # each process has an accelerator of its own
    if not rows:
        raise InvalidInputError("there are no rows to train on.")
    for row in rows:
        require_trainable(row, f"row {row.id!r}", config.loss)
    if processes.is_main_process:
        recover(folder / "checkpoint")
        recover(folder / "best")
    processes.wait_for_everyone()
    _require_output(folder, resume=resume)
    _make_folder(folder)
    where = locate_model(model, gguf_file=gguf_file)
    base = load_backbone(where, device=device, dtype=dtype)
    if base.settings.positions != "uniform":
        raise InvalidInputError(
            f"positions is {base.settings.positions!r} in the settings of {base.model_id!r}, but training reads "
            "documents at uniform positions."
        )
    decoder = load_backbone(where, device=device, dtype=dtype) if config.full else None
    engine = Engine(
        base,
        base.settings,
        store=MemoryStore(store_bytes),
        namespace="",
        max_fused_tokens=MAX_FUSED_TOKENS,
        tokens_per_pass=None,
        decoder=decoder,
    )
    return Trainer(engine, rows, dev, config, folder, files=files).run(resume=resume, report=report)


def _require_output(folder: Path, *, resume: bool) -> None:
    """Nothing of a former run may be written over."""
    if resume and (folder / "checkpoint").exists():
        return
    if folder.is_file():
        raise InvalidInputError(f"{str(folder)!r} is a file, but a run is written into a folder.")
    if (folder / "checkpoint").exists():
        raise InvalidInputError(f"{str(folder)!r} holds a training run already; name another folder, or resume it.")
    if (folder / "best").exists():
        raise InvalidInputError(
            f"{str(folder)!r} holds a trained decoder, but no checkpoint to go on from; name another folder."
        )
    if (folder / LOSSES).exists():
        raise InvalidInputError(
            f"{str(folder)!r} holds the {LOSSES} of a run, but no checkpoint to go on from; name another folder."
        )


def _make_folder(folder: Path) -> None:
    """Now, so that a folder that cannot be written to costs no training."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InvalidInputError(f"{str(folder)!r} cannot be made: {error.strerror or error}.") from error
    if not os.access(folder, os.W_OK | os.X_OK):
        raise InvalidInputError(f"{str(folder)!r} cannot be written to; name another folder.")
