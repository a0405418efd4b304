"""Trains a decoder in one call: loads the models, builds the engine, runs the trainer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from ..data.rows import QARow
from ..data.writing import make_folder
from ..engine.engine import Engine
from ..errors import InvalidInputError
from ..fusion.torch_model import TorchModel
from ..model.adapters.libraries import require_adapter_libraries
from ..model.backbone import Backbone
from ..model.hardware import choose_device
from ..model.loading import load_backbone
from ..model.location import ModelLocation, locate_model
from ..store import MemoryStore
from .checkpoint import recover
from .config import TrainingConfig
from .examples import require_trainable
from .processes import connect, sole_run
from .progress import LOSSES, Progress
from .shards import Shards
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
    progress: bool = True,
) -> Progress:
    """Train the answering decoder Dt of ``model`` on rows of documents, question and answer.

    Args:
        rows: rows to train on, as ``kvfusion build-data`` makes them.
        output: folder for ``best/`` (an adapter, or a model with ``config.full``), ``checkpoint/``, ``losses.json``.
        model, gguf_file: as in ``KVFusionGenerator.from_pretrained``.
        dev: rows for choosing the best checkpoint by exact match.
        config: settings; by default those of the preset "lora".
        store_bytes: bytes of memory for document KVs, which are kept across epochs if they fit.
        dtype: "float32" or "bfloat16", whose weights are updated through float32 copies; by default float32 on CPU,
            else the checkpoint's own.
        resume: whether to resume from ``output/checkpoint`` if it exists. ``epochs`` and ``max_steps`` can then be
            higher.
        files: sources of the rows, for the record in ``best/training.json``.
        report: function that is called after each evaluation.
        progress: show a progress bar.

    Raises:
        InvalidInputError: there are no rows or a row cannot be trained on, or the output contains a run that is not
            to be resumed or has other rows or settings. Another run has the folder. Other processes are not connected
            to this one, or have other rows, settings or checkpoints. ``config.shard_weights`` needs several processes.
        ModelLoadError, UnsupportedModelError: as in ``KVFusionGenerator.from_pretrained``.
        MissingDependencyError: the installed transformers and peft cannot train an adapter together.
    """
    config, folder = config or TrainingConfig(), Path(output)
    if not config.full:
        require_adapter_libraries()  # before the model is loaded and rows are encoded
    processes = connect(choose_device(device), shard_weights=config.shard_weights)
    if device is None and processes.num_processes > 1:
        device = str(processes.device)  # each process has its own accelerator
    if not rows:
        raise InvalidInputError("there are no rows to train on.")
    for row in rows:
        require_trainable(row, f"row {row.id!r}", config.loss)
    make_folder(folder, "output")
    with sole_run(folder) if processes.is_main_process else nullcontext():
        if processes.is_main_process:
            recover(folder / "checkpoint")
            recover(folder / "best")
        processes.wait_for_everyone()
        _require_own_folder(folder, resume=resume)
        engine, shards = _load_engine(locate_model(model, gguf_file=gguf_file), config, device, dtype, store_bytes)
        trainer = Trainer(engine, rows, dev, config, folder, files=files, shards=shards)
        return trainer.run(resume=resume, report=report, progress=progress)


def require_uniform_positions(base: Backbone) -> None:
    """Raise InvalidInputError if the model's settings place documents in a way that cannot be trained."""
    if base.settings.positions != "uniform":
        raise InvalidInputError(
            f"positions is {base.settings.positions!r} in the settings of {base.model_id!r}, but it must be 'uniform' "
            "for training."
        )


def _load_engine(
    location: ModelLocation, config: TrainingConfig, device: str | None, dtype: str | None, store_bytes: int
) -> tuple[Engine[TorchModel], Shards | None]:
    """Return an engine with Dp and Dt, and the shards of its weights if ``config`` asks for them."""
    place = {"device_map": "cpu"} if config.shard_weights else None  # an accelerator may not have room for the whole
    base = load_backbone(location, device=device, dtype=dtype, model_kwargs=place)
    require_uniform_positions(base)
    shards = Shards(base, choose_device(device)) if config.shard_weights else None
    decoder = load_backbone(location, device=device, dtype=dtype) if config.full else None
    return Engine(TorchModel(base, decoder), base.settings, store=MemoryStore(store_bytes)), shards


def _require_own_folder(folder: Path, *, resume: bool) -> None:
    """Raise InvalidInputError if training would overwrite a previous run."""
    has_checkpoint = (folder / "checkpoint").exists()
    if has_checkpoint and not resume:
        raise InvalidInputError(f"{str(folder)!r} already contains a training run; name another folder, or resume it.")
    leftover = next((name for name in ("best", LOSSES) if (folder / name).exists()), None)
    if leftover is not None and not has_checkpoint:
        raise InvalidInputError(
            f"{str(folder)!r} contains {leftover} of a run, but no checkpoint to resume from; name another folder."
        )
