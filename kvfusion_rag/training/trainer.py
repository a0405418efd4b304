"""The training loop of the answering decoder Dt, as in the paper, with a LoRA adapter or in full.

Each step takes the documents' KV from the frozen Dp (kept in the store across epochs if they fit), computes the loss
on the answers, and updates only Dt. Several processes share the rows of a step and sum their gradients.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from peft import LoraConfig
from tqdm import tqdm
from transformers import get_cosine_schedule_with_warmup

from ..data.answer_match import is_right
from ..data.rows import QARow
from ..engine.engine import Engine, Request
from ..errors import ContextLimitError, InvalidInputError, TrainingError, UnsupportedModelError
from ..fusion.sampling import DecodingOptions
from ..fusion.torch_model import TorchModel
from ..schema import Document
from ..text.documents import EncodedDocuments
from ..text.layouts import Layout
from ..text.settings import FILE_NAME, TUNED_MAX_NEW_TOKENS, ModelSettings
from .batches import Step, epoch_steps
from .checkpoint import load_record, load_state, save_decoder, save_state
from .config import TrainingConfig
from .examples import Batch, Example, collate, encode_row, encode_rows
from .loss import checkpoint_exactly, distillation_loss, fusion_loss
from .processes import require_agreement
from .progress import Progress, write_losses
from .record import make_record, require_same_run
from .shards import Shards
from .weights import MasterWeights

logger = logging.getLogger(__name__)

EVAL_BATCH = 16


class Trainer:
    """One training run. It changes the engine's settings to those of the trained model.

    Args:
        engine: engine with Dp as its backbone and Dt as its decoder: the same backbone for LoRA, a second one for full
            training.
        rows: rows to train on.
        dev: rows for choosing the checkpoint; if empty, the last one is kept.
        config: all settings.
        output: folder for ``best/`` (which ``from_pretrained`` loads), ``checkpoint/`` (to resume) and
            ``losses.json``.
        files: sources of the rows, for the record.
        shards: the weights of the engine's backbone, if several processes share them.

    Raises:
        InvalidInputError: no row fits into the model's window, or the model cannot be trained in its precision.
        UnsupportedModelError: the architecture loses the fused cache under gradient checkpointing.
    """

    def __init__(
        self,
        engine: Engine[TorchModel],
        rows: Sequence[QARow],
        dev: Sequence[QARow],
        config: TrainingConfig,
        output: Path,
        *,
        files: Mapping[str, Any] | None = None,
        shards: Shards | None = None,
    ) -> None:
        self._shards = shards
        self._processes = PartialState(cpu=engine.model.decoder.device.type == "cpu")
        torch.manual_seed(config.seed)  # fresh adapters and dropout draw from torch's own generator
        self.config = config
        self.output = output
        engine.settings = _trained(engine.settings, config)
        self._engine = engine
        self._dev = self._read_dev(dev)
        self.examples = self._encode(rows)
        self._prepare_decoder()
        self.weights = {n: p for n, p in engine.model.decoder.model.named_parameters() if p.requires_grad}
        self._masters = MasterWeights(self.weights)
        self._optimizer = torch.optim.AdamW(
            self._masters.copies.values(), config.learning_rate, config.betas, weight_decay=config.weight_decay
        )
        self._plan = self._plan_steps()
        self.total_steps = len(self._plan)
        self._schedule = get_cosine_schedule_with_warmup(
            self._optimizer, round(config.warmup * self.total_steps), self.total_steps
        )
        self._record = make_record(engine, config, rows, dev, processes=self._processes.num_processes, files=files) | {
            "trained_rows": len(self.examples)
        }
        self.progress = Progress()

    def run(
        self, *, resume: bool = False, report: Callable[[Progress], None] | None = None, progress: bool = True
    ) -> Progress:
        """Train to the end, and call ``report`` after each evaluation on the main process.

        With ``resume``, continue from ``checkpoint/`` if it exists. If ``epochs`` or ``max_steps`` is higher than
        before, the learning rate follows the longer schedule.

        Raises:
            ModelLoadError: the checkpoint is damaged, or belongs to another base model.
            InvalidInputError: the checkpoint has other rows or settings, or more steps than this run, or another
                process has other ones than this.
        """
        if resume and (self.output / "checkpoint").is_dir():
            self._load_state()
        compared = ("base_weights", "dtype", "settings", "config", "rows", "dev")
        agreed = {name: self._record[name] for name in compared} | {"step": self.progress.step}
        self._finish_passes()
        require_agreement(self._processes, agreed)
        began = time.perf_counter() - self.progress.elapsed
        hidden = not (progress and self._processes.is_main_process)
        total, done = self.total_steps, self.progress.step
        with tqdm(total=total, initial=done, desc="train", unit="step", delay=1, disable=hidden) as bar:
            for batches, tokens in self._steps():
                rate = float(self._schedule.get_last_lr()[0])
                loss = self._step(batches, tokens)
                self.progress.add_step(loss, rate, time.perf_counter() - began)
                bar.set_postfix(loss=f"{loss:.3f}")
                bar.update()
                if self.progress.step % self.config.eval_every == 0 or self.progress.step == self.total_steps:
                    self._checkpoint()
                    if report is not None and self._processes.is_main_process:
                        report(self.progress)
        return self.progress

    def _encode(self, rows: Sequence[QARow]) -> list[Example]:
        end_id = self._engine.model.decoder.end_id
        if end_id is None:
            raise InvalidInputError("the model has no end token to end answers with; set the tokenizer's eos_token.")
        joined = torch.Generator().manual_seed(self.config.seed)
        read = _reading_once(self._engine)

        def encode(row: QARow) -> Example:
            is_joined = float(torch.rand((), generator=joined)) < self.config.joined_share
            options: dict[str, Any] = {"evidence": self.config.evidence, "loss": self.config.loss, "read": read}
            return encode_row(row, self._engine, end_id=end_id, joined=is_joined, **options)

        examples, left_out = encode_rows(rows, encode)
        if left_out:
            logger.warning("%d of %d rows do not fit and were dropped: %s", len(left_out), len(rows), left_out[0][1])
        if not examples:
            raise InvalidInputError(f"none of the {len(rows)} rows fits into the model's window.")
        return examples

    def _prepare_decoder(self) -> None:
        """Mark the weights to train: those of a new adapter, or all of a second model."""
        decoder, config = self._engine.model.decoder, self.config
        if config.full == (decoder is self._engine.model.backbone):
            raise InvalidInputError(
                "full training needs a second model beside the frozen prefill decoder, and LoRA needs one model for "
                "both."
            )
        if decoder.dtype == torch.float16:
            raise InvalidInputError(
                "dtype is float16, whose gradients vanish without loss scaling, but it must be bfloat16 or float32."
            )
        if config.evidence and self._engine.encoder.evidence_mark is None:
            raise InvalidInputError(
                f"evidence_separator is {self._engine.settings.evidence_separator!r}, but the tokenizer of "
                f"{self._engine.model.backbone.model_id!r} loses it, so that answers cannot be separated from their "
                f"evidence; set another one in {FILE_NAME}, or train without evidence."
            )
        if not config.full:
            targets = config.targets[0] if config.targets == ("all-linear",) else list(config.targets)
            settings = LoraConfig(
                r=config.rank, lora_alpha=config.alpha, lora_dropout=config.dropout, target_modules=targets
            )
            try:
                decoder.add_adapter(settings)
            except ValueError as error:
                raise InvalidInputError(
                    f"targets is {config.targets!r}, but peft rejects it: {' '.join(str(error).split())[:300]}"
                ) from error
        if config.gradient_checkpointing:
            checkpoint_exactly(self._engine, self.examples[0])
        decoder.model.train()

    def _plan_steps(self) -> list[Step]:
        """Return the rows of every step of the run, over all processes."""
        config = self.config
        documents = [example.shared or number for number, example in enumerate(self.examples)]
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
        """Yield this process's batches of each remaining step, and the number of target tokens of all processes."""
        for step in self._plan[self.progress.step :]:
            mine = step[self._processes.process_index :: self._processes.num_processes]
            batches = [collate([self.examples[row] for row in rows]) for rows in mine]
            yield batches, sum(len(self.examples[row].target) for rows in step for row in rows)

    def _step(self, batches: list[Batch], tokens: int) -> float:
        """Make one optimiser step, and return the loss in nats per token over all processes."""
        # Dropout is seeded by step and process, so that a resumed run draws the same.
        torch.manual_seed((self.config.seed << 32) + (self.progress.step << 12) + self._processes.process_index)
        self._optimizer.zero_grad()
        total = torch.zeros((), device=self._engine.model.decoder.device)
        loss_of = distillation_loss if self.config.loss == "distill" else fusion_loss
        for batch in batches:
            loss = loss_of(self._engine, batch) / tokens
            loss.backward()
            self._masters.take_gradients()
            total += loss.detach()
        self._sum_over_processes([total, *self._masters.gradients()])
        norm = torch.nn.utils.clip_grad_norm_(self._masters.copies.values(), self.config.max_grad_norm)
        if not torch.isfinite(total + norm):
            step = self.progress.step + 1
            raise self._diverged(f"step {step} has a loss of {float(total)} and a gradient of {float(norm)}")
        self._optimizer.step()
        self._masters.write_back()
        self._schedule.step()
        return float(total)

    def _diverged(self, what: str) -> TrainingError:
        return TrainingError(
            f"{what}, so training diverged; resume from the last checkpoint, or start again with a learning_rate "
            f"below {self.config.learning_rate}."
        )

    def _sum_over_processes(self, tensors: Sequence[torch.Tensor]) -> None:
        self._finish_passes()
        if self._processes.num_processes > 1:
            for tensor in tensors:
                torch.distributed.all_reduce(tensor)

    def _finish_passes(self) -> None:
        """Wait until the other processes need no weights of this one."""
        if self._shards is not None:
            self._shards.finish()

    def evaluate(self) -> float:
        """Return the share of right answers (%) on the dev rows, with greedy decoding in the trained mode.

        The processes share the batches of rows.
        """
        decoder, processes = self._engine.model.decoder, self._processes
        decoder.model.eval()
        fitting = [(row, request) for row, request in self._dev if request is not None]
        batches = [fitting[start : start + EVAL_BATCH] for start in range(0, len(fitting), EVAL_BATCH)]
        right, failure = 0, None
        for batch in batches[processes.process_index :: processes.num_processes]:
            rows, requests = zip(*batch, strict=True)
            try:
                answers = self._engine.answer_all(requests, self._dev_options)
            except UnsupportedModelError as error:
                failure = error
                break
            right += sum(is_right(a.text, r.answers) for a, r in zip(answers, rows, strict=True))
        counts = torch.tensor([right, failure is not None], device=decoder.device)
        self._sum_over_processes([counts])
        if counts[1]:
            raise self._diverged(f"after step {self.progress.step} the logits are NaN or infinite") from failure
        decoder.model.train()
        return 100 * int(counts[0]) / len(self._dev)

    @property
    def _dev_options(self) -> DecodingOptions:
        return DecodingOptions(self._engine.max_new_tokens)

    def _read_dev(self, rows: Sequence[QARow]) -> list[tuple[QARow, Request | None]]:
        """Return the dev rows with their requests, or with None for a row that does not fit."""
        found: list[tuple[QARow, Request | None]] = []
        causes: list[str] = []
        for row in rows:
            documents = [passage.document(str(n)) for n, passage in enumerate(row.passages)]
            try:
                request = self._engine.request(row.question, documents, None, None, self._dev_options)
            except ContextLimitError as error:
                request = None
                causes.append(str(error))
            found.append((row, request))
        if causes:
            logger.warning("%d of %d dev rows do not fit and count as wrong: %s", len(causes), len(rows), causes[0])
        return found

    def _checkpoint(self) -> None:
        """Evaluate, keep the best decoder, and write the state to resume from."""
        if self._dev:
            self.progress.scores.append((self.progress.step, self.evaluate()))
        if not self._processes.is_main_process:
            return
        record = self._record | {"progress": asdict(self.progress)}
        if not self._dev or self.progress.best_step == self.progress.step:
            save_decoder(self.output / "best", self._engine.model.decoder, self._engine.settings, record)
        save_state(self.output / "checkpoint", self._masters.copies, self._optimizer, record)
        write_losses(self.output, self.progress)

    def _load_state(self) -> None:
        folder = self.output / "checkpoint"
        record = load_record(folder)
        require_same_run(record, self._record)
        progress = Progress.from_dict(record["progress"])
        if progress.step > self.total_steps:
            raise InvalidInputError(
                f"the checkpoint is at step {progress.step}, but this run ends after {self.total_steps} steps; "
                "raise epochs or max_steps."
            )
        load_state(folder, self._masters.copies, self._optimizer)
        self._masters.write_back()
        self.progress = progress
        for _ in range(self.progress.step):
            self._schedule.step()


def _reading_once(engine: Engine[TorchModel]) -> Callable[[tuple[Document, ...], Layout], EncodedDocuments]:
    """Return the engine's ``read`` with a cache of one result, since rows with the same documents are adjacent."""
    last: tuple[Any, EncodedDocuments] | None = None

    def read(documents: tuple[Document, ...], layout: Layout) -> EncodedDocuments:
        nonlocal last
        if last is None or last[0] != (documents, layout.prefix):
            last = (documents, layout.prefix), engine.read(documents, layout)
        return last[1]

    return read


def _trained(settings: ModelSettings, config: TrainingConfig) -> ModelSettings:
    """Return the settings of a model with ``settings`` after training with ``config``."""
    limit = TUNED_MAX_NEW_TOKENS if config.layout == "fixed" else None  # in the chat template, the base model's limit
    return replace(
        settings,
        layout=config.layout,
        mode="concat" if config.joined_share == 1 else "fusion",
        max_new_tokens=settings.max_new_tokens or limit,
        tuned_concat=config.joined_share > 0,
        tuned_evidence=config.evidence,
    )
