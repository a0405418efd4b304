"""The training loop of the answering decoder Dt, as the paper trains it, with a LoRA adapter or in full.

For each step: the documents' keys and values from the frozen Dp (kept in the store across epochs where they
fit), RES, loss on the answer, update of Dt alone. Several processes share the rows of a step and sum their
gradients. Knows rows and engines; examples, loss and checkpoints are in their own modules.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from peft import LoraConfig
from tqdm import tqdm
from transformers import get_cosine_schedule_with_warmup

from .. import __version__
from ..decoding import DecodingOptions
from ..engine import Engine
from ..errors import InvalidInputError
from ..evaluation.metrics import exact_match
from ..qa import QARow
from .batches import Step, epoch_steps
from .checkpoint import load_state, save_decoder, save_state
from .config import TrainingConfig
from .examples import Batch, Example, collate, encode_row, encode_rows
from .loss import fusion_loss

logger = logging.getLogger(__name__)

EVAL_BATCH = 16


@dataclass(slots=True)
class Progress:
    """What a run has done: its steps, its losses (step, nats a token), its dev scores (step, exact match in %)."""

    step: int = 0
    losses: list[tuple[int, float]] = field(default_factory=list)
    scores: list[tuple[int, float]] = field(default_factory=list)

    @property
    def best(self) -> float | None:
        return max((score for _, score in self.scores), default=None)


class Trainer:
    """One training run.

    Args:
        engine: its backbone is Dp; its decoder is Dt: the same backbone for LoRA, a second one for full training.
        rows: to train on.
        dev: to choose the checkpoint by; without any, the last one is kept.
        config: all settings.
        output: folder that gets ``best/`` (what ``from_pretrained`` loads) and ``checkpoint/`` (to go on from).

    Raises:
        InvalidInputError: not one row fits into the model's window.
    """

    def __init__(
        self, engine: Engine, rows: Sequence[QARow], dev: Sequence[QARow], config: TrainingConfig, output: Path
    ) -> None:
        self._processes = PartialState(cpu=engine.decoder.device.type == "cpu")
        torch.manual_seed(config.seed)  # fresh adapters and dropout draw from torch's own generator
        self.config = config
        self.output = output
        self._engine = engine
        self._dev = list(dev)
        self.examples = self._encode(rows)
        self._prepare_decoder()
        self.weights = {n: p for n, p in engine.decoder.model.named_parameters() if p.requires_grad}
        self._optimizer = torch.optim.AdamW(
            self.weights.values(), lr=config.learning_rate, betas=config.betas, weight_decay=config.weight_decay
        )
        self._plan = self._plan_steps()
        self.total_steps = len(self._plan)
        self._schedule = get_cosine_schedule_with_warmup(
            self._optimizer, round(config.warmup * self.total_steps), self.total_steps
        )
        self.progress = Progress()

    def run(self, *, resume: bool = False, report: Callable[[Progress], None] | None = None) -> Progress:
        """Train to the end. With ``resume``, go on from ``checkpoint/`` if there is one."""
        if resume and (self.output / "checkpoint").is_dir():
            self._load_state()
        began = time.perf_counter()
        hidden = not self._processes.is_main_process
        total, done = self.total_steps, self.progress.step
        with tqdm(total=total, initial=done, desc="train", unit="step", delay=1, disable=hidden) as bar:
            for batches, tokens in self._steps():
                loss = self._step(batches, tokens)
                self.progress.step += 1
                self.progress.losses.append((self.progress.step, loss))
                bar.set_postfix(loss=f"{loss:.3f}")
                bar.update()
                if self.progress.step % self.config.eval_every == 0 or self.progress.step == self.total_steps:
                    self._checkpoint(time.perf_counter() - began)
                    if report is not None:
                        report(self.progress)
        return self.progress

    def _encode(self, rows: Sequence[QARow]) -> list[Example]:
        end_id = self._engine.decoder.end_id
        if end_id is None:
            raise InvalidInputError(
                "the model has no end token, so its answers would never end; set the tokenizer's eos_token."
            )
        joined = torch.Generator().manual_seed(self.config.seed)

        def encode(row: QARow) -> Example:
            is_joined = float(torch.rand((), generator=joined)) < self.config.joined_share
            return encode_row(row, self._engine, end_id=end_id, evidence=self.config.evidence, joined=is_joined)

        examples, left_out = encode_rows(rows, encode)
        if left_out:
            logger.warning("%d of %d rows do not fit and were left out: %s", len(left_out), len(rows), left_out[0][1])
        if not examples:
            raise InvalidInputError(
                f"not one of the {len(rows)} rows can be trained on; the model's window is too small."
            )
        return examples

    def _prepare_decoder(self) -> None:
        """Mark the weights to train: those of a fresh adapter, or all of a second model."""
        decoder, config = self._engine.decoder, self.config
        if config.full == (decoder is self._engine.backbone):
            raise InvalidInputError(
                "full training needs a decoder of its own beside the frozen prefill decoder, and LoRA needs one model "
                "for both."
            )
        if not config.full:
            targets = config.targets[0] if config.targets == ("all-linear",) else list(config.targets)
            decoder.add_adapter(
                LoraConfig(r=config.rank, lora_alpha=config.alpha, lora_dropout=config.dropout, target_modules=targets)
            )
        decoder.model.train()

    def _plan_steps(self) -> list[Step]:
        """The rows of every step of the run, over all processes."""
        config = self.config
        documents = [tuple(example.documents) or number for number, example in enumerate(self.examples)]
        steps: list[Step] = []
        for epoch in range(config.epochs):
            steps += epoch_steps(
                documents,
                batch_size=config.batch_size,
                batches_per_step=config.accumulation * self._processes.num_processes,
                seed=config.seed + epoch,
            )
            if config.max_steps is not None and len(steps) >= config.max_steps:
                return steps[: config.max_steps]
        return steps

    def _steps(self) -> Iterator[tuple[list[Batch], int]]:
        """This process's batches of each step still to do, and the target tokens of all processes together."""
        for step in self._plan[self.progress.step :]:
            mine = step[self._processes.process_index :: self._processes.num_processes]
            batches = [collate([self.examples[row] for row in rows]) for rows in mine]
            yield batches, sum(len(self.examples[row].target) for rows in step for row in rows)

    def _step(self, batches: list[Batch], tokens: int) -> float:
        """One optimiser step; returns the loss in nats a token, over all processes."""
        self._optimizer.zero_grad()
        total = torch.zeros((), device=self._engine.decoder.device)
        for batch in batches:
            loss = fusion_loss(self._engine, batch) / tokens
            loss.backward()
            total += loss.detach()
        self._sum_over_processes([total, *self._gradients()])
        torch.nn.utils.clip_grad_norm_(self.weights.values(), self.config.max_grad_norm)
        self._optimizer.step()
        self._schedule.step()
        return float(total)

    def _gradients(self) -> list[torch.Tensor]:
        for weight in self.weights.values():
            if weight.grad is None:  # a process without rows in this step
                weight.grad = torch.zeros_like(weight)
        return [weight.grad for weight in self.weights.values() if weight.grad is not None]

    def _sum_over_processes(self, tensors: Sequence[torch.Tensor]) -> None:
        if self._processes.num_processes > 1:
            for tensor in tensors:
                torch.distributed.all_reduce(tensor)

    def evaluate(self) -> float:
        """Exact match (%) on the dev rows, greedy, in mode ``fusion``."""
        decoder, engine = self._engine.decoder, self._engine
        options = DecodingOptions(engine.settings.max_new_tokens)
        decoder.model.eval()
        right = 0
        for start in range(0, len(self._dev), EVAL_BATCH):
            rows = self._dev[start : start + EVAL_BATCH]
            requests = [
                engine.request(
                    r.question, [p.document(str(n)) for n, p in enumerate(r.passages)], None, "fusion", options
                )
                for r in rows
            ]
            answers = engine.answer_all(requests, options, time.perf_counter())
            right += sum(exact_match(a.text.split("\n")[0], r.answers) for a, r in zip(answers, rows, strict=True))
        decoder.model.train()
        return 100 * right / len(self._dev)

    def _checkpoint(self, seconds: float) -> None:
        """Evaluate, keep the best decoder, and write the state to go on from."""
        former = self.progress.best
        if self._dev:
            self.progress.scores.append((self.progress.step, self.evaluate()))
        if not self._processes.is_main_process:
            return
        record = self._record(seconds)
        if former is None or not self._dev or self.progress.scores[-1][1] > former:
            settings = replace(self._engine.settings, tuned_concat=self.config.joined_share > 0)
            save_decoder(self.output / "best", self._engine.decoder, settings, record)
        save_state(self.output / "checkpoint", self.weights, self._optimizer, record)

    def _record(self, seconds: float) -> dict[str, Any]:
        """Everything that made this decoder, for the JSON beside it."""
        return {
            "kvfusion_rag": __version__,
            "torch": torch.__version__,
            "base_model": self._engine.backbone.model_id,
            "base_weights": self._engine.backbone.weights_digest,
            "config": asdict(self.config),
            "rows": len(self.examples),
            "processes": self._processes.num_processes,
            "device": str(self._engine.decoder.device),
            "seconds": round(seconds, 1),
            "progress": asdict(self.progress),
        }

    def _load_state(self) -> None:
        record = load_state(self.output / "checkpoint", self.weights, self._optimizer)
        done = record["progress"]
        self.progress = Progress(
            done["step"], [(s, loss) for s, loss in done["losses"]], [(s, score) for s, score in done["scores"]]
        )
        for _ in range(self.progress.step):
            self._schedule.step()
