"""Measures answers: transformers' ``generate`` on the joined prompt, and this package with and without a store.

All figures come from one process with the same weights, documents and questions. Weights are random, since only their
shape matters. Systems are measured in turn, so that a slow minute of a shared machine affects all of them.
"""

from __future__ import annotations

import ctypes
import random
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers.generation.streamers import BaseStreamer

from ..engine.engine import EngineOptions
from ..errors import KVFusionError, MemoryLimitError
from ..fusion.torch_model import TorchModel
from ..generator import KVFusionGenerator
from ..store import DiskStore, DocumentStore, MemoryStore
from .hardware_limits import Costs, Work, measure_peaks
from .shapes import END, random_backbone, random_text, shape_named
from .workload import SYSTEMS, Case, System

NO_LIMIT = 1 << 50  # tokens, or bytes of a store
_OUT_OF_MEMORY = (MemoryLimitError, torch.OutOfMemoryError)


@dataclass(frozen=True, slots=True)
class AnswerBenchmark:
    """Settings of one run.

    Attributes:
        systems: "generate" (joined prompt), "cold" (documents are computed and not stored), "memory" and "disk".
        warmups: runs of each system and case that do not count.
        generate_up_to: maximum tokens of a joined prompt for "generate", whose time grows with the square.
        weights: precision of the layers' weights: None for ``dtype``, or "int8" or "float8" through torchao.
    """

    shape: str = "qwen2.5-0.5b"
    dtype: str = "bfloat16"
    device: str = "cpu"
    systems: tuple[System, ...] = SYSTEMS
    repeats: int = 3
    warmups: int = 1
    generate_up_to: int | None = None
    weights: str | None = None
    seed: int = 0


class _Texts(NamedTuple):
    """The texts of a case: questions, their documents, and which documents are stored beforehand and which are not."""

    questions: list[str]
    documents: list[list[str]]
    stored: list[str]
    missing: list[str]


class _Measured(NamedTuple):
    """Times of one run in seconds, and the share of document tokens that came from a store."""

    first_token: float
    per_token: float
    total: float
    hit_share: float = 0.0


class AnswerRun:
    """One model with its stores, ready to measure cases. ``folder`` contains the store on disk."""

    def __init__(self, options: AnswerBenchmark, folder: Path) -> None:
        self.options = options
        self._backbone = random_backbone(options.shape, options.dtype, options.device, options.seed, options.weights)
        width = None if options.weights is None else 1  # bytes
        self._costs = Costs.of(shape_named(options.shape), self._backbone.dtype, body_width=width)
        self._peaks = measure_peaks(self._backbone.device, self._backbone.dtype)
        memory = MemoryStore(NO_LIMIT) if "memory" in options.systems else None
        disk = DiskStore(folder / "store", NO_LIMIT) if "disk" in options.systems else None
        stores = {"cold": DocumentStore(), "memory": DocumentStore(memory),
                  "disk": DocumentStore(None, disk)}  # fmt: skip
        self._generators = {name: self._generator(stores[name]) for name in stores if name in options.systems}
        both = DocumentStore(memory, disk)  # the same tiers, so that a document is computed once for both
        self._filler = None if both.is_empty else self._generator(both)
        self._stored: list[str] = []

    def facts(self) -> dict[str, Any]:
        """Return the facts of all rows: options, the model's size, and the machine's peak rates."""
        return {
            "options": asdict(self.options),
            "model": {
                "parameters": self._backbone.model.num_parameters(),
                "weight_bytes_of_a_step": self._costs.weight_bytes,
                "kv_bytes_of_a_token": self._costs.kv,
            },
            "peaks": {
                "gflops": round(self._peaks.operations / 1e9, 1),
                "memory_gb_per_second": round(self._peaks.memory / 1e9, 2),
                "load_gb_per_second": round(self._peaks.load / 1e9, 2),
            },
        }

    def measure(self, case: Case) -> list[dict[str, Any]]:
        """Return a row per system: medians and spreads, floors, and ratios to both floor and ``generate``."""
        options, texts = self.options, self._texts(case)
        runs: dict[System, list[tuple[_Measured, _Memory]]] = {name: [] for name in options.systems}
        left_out: dict[System, str] = {}
        if options.generate_up_to is not None and case.joined_tokens > options.generate_up_to:
            left_out["generate"] = f"{case.joined_tokens} tokens are more than generate_up_to"
        try:
            self._fill(texts.stored)
        except _OUT_OF_MEMORY:
            left_out |= {"memory": "out of memory", "disk": "out of memory"}
        for number in range(-options.warmups, options.repeats):
            for name in options.systems:
                if name in left_out:
                    continue
                try:
                    measured = self._measure(name, case, texts)
                except _OUT_OF_MEMORY:
                    left_out[name] = "out of memory"
                else:
                    runs[name] += [measured] if number >= 0 else []
        rows = [
            {"system": name, **asdict(case)}
            | ({"left_out": left_out[name]} if name in left_out else self._row(name, case, runs[name]))
            for name in options.systems
        ]
        return _compared(rows)

    def _generator(self, store: DocumentStore) -> KVFusionGenerator:
        return KVFusionGenerator(
            TorchModel(self._backbone), store=store, options=EngineOptions(max_fused_tokens=NO_LIMIT)
        )

    def _texts(self, case: Case) -> _Texts:
        """Return random texts that depend only on length and number, so that cases of a sweep share documents."""

        def text(kind: str, number: int, tokens: int) -> str:
            return random_text(random.Random(f"{self.options.seed} {kind} {number}"), tokens)

        lists = [
            [text("document", case.documents * number + one, case.document_tokens) for one in range(case.documents)]
            for number in range(case.lists)
        ]
        return _Texts(
            questions=[text("question", number, case.question_tokens) for number in range(case.batch)],
            documents=lists if case.over == "different" else lists * case.batch,
            stored=[document for documents in lists for document in documents[: case.hits]],
            missing=[document for documents in lists for document in documents[case.hits :]],
        )

    def _fill(self, documents: list[str]) -> None:
        """Store these documents and no others."""
        if self._filler is None:
            return
        before, self._stored = self._stored, documents
        self._filler.forget(sorted(set(before) - set(documents)))
        self._filler.prefill(documents)

    def _measure(self, name: System, case: Case, texts: _Texts) -> tuple[_Measured, _Memory]:
        if name in ("memory", "disk"):
            self._generators[name].forget(texts.missing)  # stored by the previous run
        memory = _Memory(self._backbone.device)
        measured = self._generate(case, texts) if name == "generate" else self._answer(name, case, texts)
        memory.stop()
        return measured, memory

    def _answer(self, name: System, case: Case, texts: _Texts) -> _Measured:
        began = time.perf_counter()
        answers = self._generators[name].answer_batch(
            texts.questions, texts.documents, max_new_tokens=case.answer_tokens
        )
        total = time.perf_counter() - began
        _require_length(case, [len(answer.token_ids) for answer in answers])
        times = [answer.timings for answer in answers]  # they differ only if rows are decoded in groups
        return _Measured(
            statistics.mean(time.first_token for time in times),
            statistics.mean((time.total - time.first_token) / (case.answer_tokens - 1) for time in times),
            total,
            sum(answer.usage.cached_document_tokens for answer in answers)
            / sum(answer.usage.document_tokens for answer in answers),
        )

    def _generate(self, case: Case, texts: _Texts) -> _Measured:
        """Answer as a user of transformers would: a batch of prompts with the library's own attention.

        Inference mode is off, as it is for such a user.
        """
        model: Any = self._backbone.model
        ours = model.config._attn_implementation
        model.set_attn_implementation("sdpa")  # transformers' default
        try:
            return self._generated(model, case, texts)
        finally:
            model.set_attn_implementation(ours)

    def _generated(self, model: Any, case: Case, texts: _Texts) -> _Measured:
        clock = TokenClock()
        began = time.perf_counter()
        prompts = [" ".join([*d, question]) for question, d in zip(texts.questions, texts.documents, strict=True)]
        ids = torch.tensor(self._backbone.tokenizer(prompts)["input_ids"], device=self._backbone.device)
        output = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=case.answer_tokens, do_sample=False,
            pad_token_id=END, streamer=clock,
        )  # fmt: skip
        total = time.perf_counter() - began
        _require_length(case, [output.shape[1] - ids.shape[1]])
        first, last = clock.tokens[1], clock.tokens[-1]
        return _Measured(first - began, (last - first) / (case.answer_tokens - 1), total)

    def _row(self, name: System, case: Case, runs: Sequence[tuple[_Measured, _Memory]]) -> dict[str, Any]:
        times = [measured for measured, _ in runs]
        first, further = self._costs.first_token(case, name), self._costs.next_token(case, name)
        row: dict[str, Any] = {
            "hit_share": min(one.hit_share for one in times),
            "seconds_to_first_token": spread([one.first_token for one in times]),
            "seconds_per_token": spread([one.per_token for one in times]),
            "seconds_in_all": spread([one.total for one in times]),
            "tokens_per_second": _short(
                case.batch * case.answer_tokens / statistics.median(one.total for one in times)
            ),
            "peak_memory_bytes": max(memory.peak for _, memory in runs),
            "peak_memory_growth_bytes": max(memory.growth for _, memory in runs),
            "floors": {"first_token": self._floor(first), "token": self._floor(further)},
        }
        return row | {
            "times_floor": {
                "first_token": _short(row["seconds_to_first_token"]["median"] / first.seconds(self._peaks)),
                "token": _short(row["seconds_per_token"]["median"] / further.seconds(self._peaks)),
            }
        }

    def _floor(self, work: Work) -> dict[str, float]:
        return {"seconds": _short(work.seconds(self._peaks)), **asdict(work)}


class TokenClock(BaseStreamer):
    """Records the times of the prompt (first) and of each token."""

    def __init__(self) -> None:
        self.tokens: list[float] = []

    def put(self, value: object) -> None:
        self.tokens.append(time.perf_counter())

    def end(self) -> None:
        pass


class _Memory:
    """Peak memory in bytes from now until :meth:`stop`, and its growth over the memory in use now.

    On CUDA it is the memory of tensors, on Linux the process's resident pages, and 0 elsewhere.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        elif _CLEAR.exists():
            libc = ctypes.CDLL(None)
            if hasattr(libc, "malloc_trim"):  # glibc keeps freed blocks, whose reuse would not be counted
                libc.malloc_trim(0)
            _CLEAR.write_text("5", encoding="ascii")  # resets the peak
        self._before = self._read()
        self.peak = self.growth = 0

    def stop(self) -> None:
        self.peak = self._read()
        self.growth = self.peak - self._before

    def _read(self) -> int:
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device)
        if not _CLEAR.exists():
            return 0
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


_CLEAR = Path("/proc/self/clear_refs")


def _compared(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Add to each row of a case how many times faster than ``generate`` it is, if both were measured."""
    base = next((row for row in rows if row["system"] == "generate" and "left_out" not in row), None)
    for row in rows:
        if base is not None and "left_out" not in row:
            row["times_faster_than_generate"] = {
                name: _short(base[seconds]["median"] / row[seconds]["median"])
                for name, seconds in (("first_token", "seconds_to_first_token"), ("in_all", "seconds_in_all"))
            }
    return rows


def _require_length(case: Case, lengths: Sequence[int]) -> None:
    """Raise KVFusionError if an answer has another length, since its times cannot be compared."""
    if set(lengths) != {case.answer_tokens}:
        raise KVFusionError(
            f"answers have {sorted(set(lengths))} tokens, but they must have {case.answer_tokens}; an end token came "
            "early."
        )


def spread(seconds: Sequence[float]) -> dict[str, float]:
    """Return the median, minimum and maximum of repeated times."""
    figures = {"median": statistics.median(seconds), "least": min(seconds), "most": max(seconds)}
    return {name: _short(figure) for name, figure in figures.items()}


def _short(figure: float) -> float:
    """Round to four significant digits, which is more than repeated measurements agree on."""
    return float(f"{figure:.4g}")
