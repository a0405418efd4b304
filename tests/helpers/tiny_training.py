"""Tiny rows, engines and trainers for tests of training."""

from __future__ import annotations

import copy
import random
from pathlib import Path

import pytest
import torch
from tiny import WORDS, backbone

from kvfusion_rag import MemoryStore
from kvfusion_rag.data.rows import Passage, QARow
from kvfusion_rag.engine.engine import Engine, EngineOptions
from kvfusion_rag.fusion.torch_model import TorchModel
from kvfusion_rag.model.backbone import Backbone
from kvfusion_rag.text.settings import ModelSettings
from kvfusion_rag.training.config import TrainingConfig
from kvfusion_rag.training.examples import Batch, collate, encode_row
from kvfusion_rag.training.loss import fusion_loss
from kvfusion_rag.training.progress import Progress
from kvfusion_rag.training.trainer import Trainer

VOCABULARY = WORDS.split()
SETTINGS = ModelSettings(prefix="<|im_start|>", document_template="{text}\n", passage_length=24, max_new_tokens=8)
ARCHITECTURES = ("llama", "gemma3", "minicpm3", "gpt2", "bert")


def rows(number: int, passages: int = 3, seed: int = 0) -> list[QARow]:
    """Return rows whose gold passage contains the colour of a thing, among passages about other things."""
    rng = random.Random(seed)
    made = []
    for i in range(number):
        colour = rng.choice(["red", "blue", "green", "grey"])
        others = [Passage(" ".join(rng.choices(VOCABULARY, k=6))) for _ in range(passages - 1)]
        both = [*others, Passage(f"thing {i} is {colour}", gold=True)]
        rng.shuffle(both)
        made.append(
            QARow(str(i), f"of what colour is thing {i}", (colour,), tuple(both), evidence=f"thing {i} is {colour}")
        )
    return made


def shared(sizes: list[int], seed: int = 0, passages: int = 3, *, rotated: bool = True) -> list[QARow]:
    """Return for each size as many questions on the same passages, which differ in length.

    With ``rotated``, they differ in the order of passages too.
    """
    made = []
    for group, (size, row) in enumerate(zip(sizes, rows(len(sizes), passages, seed), strict=True)):
        for n in range(size):
            first = n % passages if rotated else 0
            order = row.passages[first:] + row.passages[:first]
            question = " ".join([row.question, "please", *["now"] * n])
            made.append(QARow(f"{group}-{n}", question, row.answers if n % 2 else ("grey red",), order))
    return made


def engine(
    architecture: str = "llama",
    *,
    store: MemoryStore | None = None,
    full: bool = False,
    dtype: torch.dtype = torch.float32,
    **changes,
) -> Engine[TorchModel]:
    base = backbone(architecture, dtype, settings=SETTINGS, **changes)
    decoder = None
    if full:
        decoder = Backbone(copy.deepcopy(base.model), base.tokenizer, SETTINGS, model_id="decoder")
    return Engine(TorchModel(base, decoder), SETTINGS, store=store, options=EngineOptions(max_fused_tokens=100_000))


def batch_of(made: Engine[TorchModel], data: list[QARow], **options) -> Batch:
    options = {"evidence": False, "joined": False} | options
    return collate([encode_row(row, made, end_id=made.model.decoder.end_id, **options) for row in data])


def trainer(
    tmp_path: Path, made: Engine[TorchModel], data: list[QARow], dev: list[QARow] | None = None, **config
) -> Trainer:
    settings = {"batch_size": 4, "learning_rate": 2e-3, "epochs": 50, "dropout": 0.0} | config
    return Trainer(made, data, dev or [], TrainingConfig(**settings), tmp_path / "run")


def train_interrupted(run: Trainer) -> None:
    """Train until the first checkpoint, as if the run was killed there."""
    with pytest.raises(KeyboardInterrupt):
        run.run(report=_interrupt)


def _interrupt(progress: Progress) -> None:
    raise KeyboardInterrupt


def gradients(made: Engine[TorchModel], batches: list[Batch]) -> tuple[float, dict[str, torch.Tensor]]:
    """Return the summed loss of ``batches``, and the gradients by weight."""
    made.model.decoder.model.zero_grad()
    loss = torch.stack([fusion_loss(made, batch) for batch in batches]).sum()
    loss.backward()
    found = {n: p.grad.clone() for n, p in made.model.decoder.model.named_parameters() if p.grad is not None}
    return float(loss.detach()), found


def assert_same_gradients(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys() and len(found) > 10
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-3, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
