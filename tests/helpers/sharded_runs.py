"""Trains in several processes, each case with whole weights and in shards. ``torchrun`` starts it with a folder."""

from __future__ import annotations

import gc
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tiny import save
from tiny_training import SETTINGS, rows

from kvfusion_rag.data.rows import QARow
from kvfusion_rag.model.loading import load_backbone
from kvfusion_rag.model.location import locate_model
from kvfusion_rag.training import TrainingConfig, train
from kvfusion_rag.training.processes import connect
from kvfusion_rag.training.shards import Shards

CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "without a store": {"store_bytes": 1},
    "unequal documents": {"unequal": True},
    "checkpointed layers": {"gradient_checkpointing": True, "accumulation": 2},
    "distilled": {"loss": "distill"},
    "joined": {"joined_share": 0.5},
    "tied head": {"architecture": "gpt2", "unequal": True},
    "windows": {"architecture": "gemma3"},
    "last layer only": {"targets": ("2.self_attn.q_proj",)},
    "bfloat16": {"dtype": "bfloat16", "dropout": 0.1},
}
STEPS = 3
# Whether weights are in shards before and after a run is resumed.
RESUMED = {"resumed-whole": (False, False), "resumed-shards": (True, True), "resumed-other": (True, False)}


def settings(**options: Any) -> tuple[TrainingConfig, dict[str, Any]]:
    """Return the configuration of a case, and the other arguments of ``train``."""
    others = {name: options.pop(name) for name in ("store_bytes", "dtype") if name in options}
    options = {"batch_size": 2, "max_steps": STEPS, "eval_every": 2, "rank": 4, "dropout": 0.0} | options
    return TrainingConfig(**options), others


def data(*, unequal: bool = False) -> list[QARow]:
    """Return eleven rows, so that a process has no batch in a step.

    If ``unequal``, every other row has one passage and the others nine.
    """
    made = rows(11, passages=9 if unequal else 3)
    return [replace(row, passages=row.gold) if unequal and number % 2 else row for number, row in enumerate(made)]


def base(folder: Path, architecture: str) -> Path:
    path = folder / architecture
    return path if path.exists() else save(path, architecture, settings=SETTINGS)


def live_bytes() -> int:
    """Return the bytes of all tensors in memory."""
    gc.collect()
    storages = {t.untyped_storage() for t in gc.get_objects() if isinstance(t, torch.Tensor)}
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def main(folder: Path) -> None:
    processes = connect(torch.device("cpu"))
    if processes.is_main_process:
        for architecture in ("llama", *(case["architecture"] for case in CASES.values() if "architecture" in case)):
            base(folder, architecture)
    processes.wait_for_everyone()
    backbone = load_backbone(locate_model(base(folder, "llama")), device="cpu")
    digest, whole = backbone.weights_digest, live_bytes()
    shards = Shards(backbone, torch.device("cpu"))
    memory = {"whole": whole, "kept": live_bytes(), "same_digest": digest == backbone.weights_digest}
    shards.finish()
    for name, case in CASES.items():
        options = dict(case)
        model = base(folder, options.pop("architecture", "llama"))
        made = data(unequal=options.pop("unequal", False))
        config, others = settings(**options)
        arguments = {"model": model, "dev": made[:3] * 7, "device": "cpu", "progress": False, **others}
        train(made, output=folder / name / "whole", config=config, **arguments)
        sharded = replace(config, shard_weights=True)
        train(made, output=folder / name / "shards", config=sharded, **arguments)
    for name, (first, second) in RESUMED.items():
        arguments = {"model": base(folder, "llama"), "output": folder / name, "device": "cpu", "progress": False}
        for steps, shard_weights in ((1, first), (STEPS, second)):
            config, _ = settings(max_steps=steps, shard_weights=shard_weights)
            train(data(), config=config, resume=True, **arguments)
    if processes.is_main_process:
        (folder / "memory.json").write_text(json.dumps(memory))
    processes.wait_for_everyone()
    processes.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
