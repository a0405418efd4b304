"""Settings of a training run, with the paper's as a named preset. Plain data."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, get_args

from ..errors import InvalidInputError
from ..text.settings import Layout, is_count

Loss = Literal["answer", "distill"]


@dataclass(frozen=True, slots=True)
class TrainingConfig:
    """How the answering decoder Dt is trained.

    Attributes:
        full: whether to train all weights of a second copy (the paper) instead of a LoRA adapter.
        rank: rank of the LoRA matrices.
        alpha: LoRA's scale, which is divided by ``rank``.
        dropout: share (0 to 1) of LoRA's inputs that are dropped in training.
        targets: names of the modules that get an adapter, or "all-linear".
        loss: "answer" is the cross entropy of the row's answer (the paper). "distill" is the KL divergence, on the
            answer's tokens, of the trained decoder over all fused passages from the base model over the gold passages
            only.
        layout: "fixed" uses the templates of the settings, "prompt" the question in the model's own chat template.
        epochs: passes over the rows.
        max_steps: maximum number of steps, even if epochs are left.
        batch_size: rows per forward pass and process.
        accumulation: forward passes per optimiser step.
        learning_rate: highest learning rate, reached after ``warmup`` and followed by a cosine decay to 0.
        warmup: share (0 to 1) of all steps in which the learning rate rises.
        weight_decay: AdamW's weight decay.
        betas: AdamW's decay rates of its moving averages.
        max_grad_norm: norm to which longer gradients are cut.
        evidence: whether to train on the sentence that contains the answer too.
        joined_share: share (0 to 1) of rows that are read as one joined prompt. Above 0, the trained decoder is also
            used in mode ``concat``. With 1, it is fine-tuned on joined prompts only, the control that the paper lacks,
            and dev rows are answered in mode ``concat``.
        gradient_checkpointing: whether to compute layers again in the backward pass instead of keeping their
            activations. The steps are the same, but need less memory and more time.
        shard_weights: whether each of several processes keeps only a part of the frozen base weights, and gathers one
            layer at a time. The steps are the same, but need less memory and more time. Only for LoRA.
        eval_every: steps between two evaluations on the dev rows; the checkpoint with the best exact match is kept.
        seed: seed of the order of rows and of everything random.
    """

    full: bool = False
    rank: int = 16
    alpha: int = 32
    dropout: float = 0.05
    targets: tuple[str, ...] = ("all-linear",)
    loss: Loss = "answer"
    layout: Layout = "fixed"
    epochs: int = 2
    max_steps: int | None = None
    batch_size: int = 8
    accumulation: int = 1
    learning_rate: float = 2e-4
    warmup: float = 0.05
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    max_grad_norm: float = 1.0
    evidence: bool = False
    joined_share: float = 0.0
    gradient_checkpointing: bool = False
    shard_weights: bool = False
    eval_every: int = 100
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("rank", "alpha", "epochs", "batch_size", "accumulation", "eval_every"):
            if not is_count(getattr(self, name)):
                raise InvalidInputError(f"{name} is {getattr(self, name)!r}, but it must be a whole number from 1.")
        if not (self.max_steps is None or is_count(self.max_steps)):
            raise InvalidInputError(f"max_steps is {self.max_steps!r}, but it must be a whole number from 1, or None.")
        for name in ("dropout", "warmup", "joined_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise InvalidInputError(f"{name} is {getattr(self, name)!r}, but it must be a share from 0 to 1.")
        for name in ("learning_rate", "max_grad_norm"):
            if not 0 < getattr(self, name) < math.inf:
                raise InvalidInputError(f"{name} is {getattr(self, name)!r}, but it must be a number above 0.")
        for name, kind in (("loss", Loss), ("layout", Layout)):
            if getattr(self, name) not in get_args(kind):
                allowed = " or ".join(map(repr, get_args(kind)))
                raise InvalidInputError(f"{name} is {getattr(self, name)!r}, but it must be {allowed}.")
        if self.loss == "distill" and self.evidence:
            raise InvalidInputError(
                "evidence is true and loss is 'distill', but the base model's answers have no evidence; set only one."
            )
        if self.full and self.shard_weights:
            raise InvalidInputError(
                "full and shard_weights are both true, but only frozen weights can be split into shards; train a LoRA "
                "adapter, or without shard_weights."
            )
        if not 0 <= self.weight_decay < math.inf:
            raise InvalidInputError(f"weight_decay is {self.weight_decay!r}, but it must be a number from 0.")
        if not (isinstance(self.seed, int) and 0 <= self.seed < 1 << 31):
            raise InvalidInputError(f"seed is {self.seed!r}, but it must be a whole number from 0 to 2,147,483,647.")


PRESETS: dict[str, TrainingConfig] = {
    "lora": TrainingConfig(),
    # Paper, section 4.1: full fine-tuning, 2e-5 with cosine and 5 % warm-up, batches of 64, two epochs, evidence.
    "paper": TrainingConfig(full=True, learning_rate=2e-5, batch_size=2, accumulation=32, epochs=2, evidence=True),
}


def preset(name: str, **changes: Any) -> TrainingConfig:
    """Return a named preset with changes. None values change nothing.

    Raises:
        InvalidInputError: the preset or a setting is unknown, or a value is not allowed.
    """
    if name not in PRESETS:
        raise InvalidInputError(f"preset is {name!r}, but it must be one of {sorted(PRESETS)}.")
    allowed = {f.name for f in fields(TrainingConfig)}
    if unknown := sorted(changes.keys() - allowed):
        raise InvalidInputError(f"the training setting is {unknown[0]!r}, but it must be one of {sorted(allowed)}.")
    return replace(PRESETS[name], **{key: value for key, value in changes.items() if value is not None})
