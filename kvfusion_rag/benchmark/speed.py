"""What answering costs: transformers' ``generate`` on the joined prompt against ours, cold and from a store.

All figures come from one process over the same weights, documents and questions. Weights are random: only their shape
counts here. Systems take turns, so that a slow minute of a shared machine is spread over all of them.
"""

from __future__ import annotations

import ctypes
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers.generation.streamers import BaseStreamer

from ..errors import KVFusionError, MemoryLimitError
from ..generator import KVFusionGenerator
from ..store import DiskStore, DocumentStore, MemoryStore
from .floors import Costs, Work, measure_peaks
from .shapes import END, random_backbone, random_text, shape_named
from .workload import SYSTEMS, Case, System

NO_CAP = 1 << 50  # tokens, or bytes of a store
_OUT_OF_MEMORY = (MemoryLimitError, torch.OutOfMemoryError)


@dataclass(frozen=True, slots=True)
class AnswerBenchmark:
    """What all cases of one run have in common.

    Attributes:
        systems: "generate" (the joined prompt), "cold" (documents computed, nothing stored), "memory", "disk".
        warmups: runs of each system and case that do not count.
        generate_up_to: longest joined prompt, in tokens, that "generate" is asked; the time it takes grows with the
            square.
        weights: of the layers: in ``dtype`` (``None``), or in 8 bit through torchao, "int8" or "float8".
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


class _Asked(NamedTuple):
    """The texts of a case: a question and its documents for each row, and which documents a store has and has not."""

    questions: list[str]
    documents: list[list[str]]
    stored: list[str]
    missing: list[str]


class _Measured(NamedTuple):
    """Of one run, in seconds; ``hit_share`` of document tokens came from a store."""

    first_token: float
    per_token: float
    in_all: float
    hit_share: float = 0.0


class AnswerRun:
    """One model with its stores, ready to measure cases; ``folder`` is where documents are put on disk."""

    def __init__(self, options: AnswerBenchmark, folder: Path) -> None:
        self.options = options
        self._backbone = random_backbone(options.shape, options.dtype, options.device, options.seed, options.weights)
        width = None if options.weights is None else 1  # bytes
        self._costs = Costs.of(shape_named(options.shape), self._backbone.dtype, body_width=width)
        self._peaks = measure_peaks(self._backbone.device, self._backbone.dtype)
        memory = MemoryStore(NO_CAP) if "memory" in options.systems else None
        disk = DiskStore(folder / "store", NO_CAP) if "disk" in options.systems else None
        stores = {"cold": DocumentStore(), "memory": DocumentStore(memory),
                  "disk": DocumentStore(None, disk)}  # fmt: skip
        self._generators = {name: self._generator(stores[name]) for name in stores if name in options.systems}
        kept = DocumentStore(memory, disk)  # the same tiers, so that a document is computed once for both
        self._filler = None if kept.is_empty else self._generator(kept)
        self._stored: list[str] = []

    def facts(self) -> dict[str, Any]:
        """What holds for all rows: options, the model's size, and what the machine was measured to do at best."""
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
        """One row a system: medians and spreads, floors, and ratios to both floor and ``generate``."""
        options, asked = self.options, self._asked(case)
        found: dict[System, list[tuple[_Measured, _Memory]]] = {name: [] for name in options.systems}
        left_out: dict[System, str] = {}
        if options.generate_up_to is not None and case.joined_tokens > options.generate_up_to:
            left_out["generate"] = f"{case.joined_tokens} tokens are more than generate_up_to"
        try:
            self._fill(asked.stored)
        except _OUT_OF_MEMORY:
            left_out |= {"memory": "out of memory", "disk": "out of memory"}
        for turn in range(-options.warmups, options.repeats):
            for name in options.systems:
                if name in left_out:
                    continue
                try:
                    measured = self._measure(name, case, asked)
                except _OUT_OF_MEMORY:
                    left_out[name] = "out of memory"
                else:
                    found[name] += [measured] if turn >= 0 else []
        rows = [
            {"system": name, **asdict(case)}
            | ({"left_out": left_out[name]} if name in left_out else self._row(name, case, found[name]))
            for name in options.systems
        ]
        return _compared(rows)

    def _generator(self, store: DocumentStore) -> KVFusionGenerator:
        return KVFusionGenerator(self._backbone, store=store, max_fused_tokens=NO_CAP)

    def _asked(self, case: Case) -> _Asked:
        """A document is made by its length and number alone, so that cases of a sweep share what is stored."""

        def text(kind: str, number: int, tokens: int) -> str:
            return random_text(random.Random(f"{self.options.seed} {kind} {number}"), tokens)

        lists = [
            [text("document", case.documents * number + one, case.document_tokens) for one in range(case.documents)]
            for number in range(case.lists)
        ]
        return _Asked(
            questions=[text("question", number, case.question_tokens) for number in range(case.batch)],
            documents=lists if case.over == "different" else lists * case.batch,
            stored=[document for documents in lists for document in documents[: case.hits]],
            missing=[document for documents in lists for document in documents[case.hits :]],
        )

    def _fill(self, documents: list[str]) -> None:
        """Have these documents stored and no others."""
        if self._filler is None:
            return
        former, self._stored = self._stored, documents
        self._filler.forget(sorted(set(former) - set(documents)))
        self._filler.prefill(documents)

    def _measure(self, name: System, case: Case, asked: _Asked) -> tuple[_Measured, _Memory]:
        if name in ("memory", "disk"):
            self._generators[name].forget(asked.missing)  # that the last run has stored
        ask = self._generate if name == "generate" else self._answer_with(self._generators[name])
        memory = _Memory(self._backbone.device)
        measured = ask(case, asked)
        memory.note()
        return measured, memory

    def _answer_with(self, generator: KVFusionGenerator) -> Callable[[Case, _Asked], _Measured]:
        def answer(case: Case, asked: _Asked) -> _Measured:
            began = time.perf_counter()
            answers = generator.answer_batch(asked.questions, asked.documents, max_new_tokens=case.answer_tokens)
            in_all = time.perf_counter() - began
            _require_length(case, [len(answer.token_ids) for answer in answers])
            times = [answer.timings for answer in answers]  # all the same, but where rows are decoded in groups
            return _Measured(
                statistics.mean(time.first_token for time in times),
                statistics.mean((time.total - time.first_token) / (case.answer_tokens - 1) for time in times),
                in_all,
                sum(answer.usage.cached_document_tokens for answer in answers)
                / sum(answer.usage.document_tokens for answer in answers),
            )

        return answer

    def _generate(self, case: Case, asked: _Asked) -> _Measured:
        """As a user of transformers would: one prompt a question, rows in a batch, the library's own attention.

        It runs without inference mode.
        """
        model: Any = self._backbone.model
        ours = model.config._attn_implementation
        model.set_attn_implementation("sdpa")  # transformers' default
        try:
            return self._generated(model, case, asked)
        finally:
            model.set_attn_implementation(ours)

    def _generated(self, model: Any, case: Case, asked: _Asked) -> _Measured:
        clock = _Clock()
        began = time.perf_counter()
        prompts = [" ".join([*d, question]) for question, d in zip(asked.questions, asked.documents, strict=True)]
        ids = torch.tensor(self._backbone.tokenizer(prompts)["input_ids"], device=self._backbone.device)
        made = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=case.answer_tokens,
            do_sample=False,
            pad_token_id=END,
            streamer=clock,
        )
        in_all = time.perf_counter() - began
        _require_length(case, [made.shape[1] - ids.shape[1]])
        first, last = clock.tokens[1], clock.tokens[-1]
        return _Measured(first - began, (last - first) / (case.answer_tokens - 1), in_all)

    def _row(self, name: System, case: Case, found: Sequence[tuple[_Measured, _Memory]]) -> dict[str, Any]:
        times = [measured for measured, _ in found]
        first, further = self._costs.first_token(case, name), self._costs.next_token(case, name)
        row: dict[str, Any] = {
            "hit_share": min(one.hit_share for one in times),
            "seconds_to_first_token": _spread([one.first_token for one in times]),
            "seconds_per_token": _spread([one.per_token for one in times]),
            "seconds_in_all": _spread([one.in_all for one in times]),
            "tokens_per_second": _short(
                case.batch * case.answer_tokens / statistics.median(one.in_all for one in times)
            ),
            "peak_memory_bytes": max(one.most for _, one in found),
            "peak_memory_growth_bytes": max(one.growth for _, one in found),
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


class _Clock(BaseStreamer):
    """Notes when the prompt (the first) and each token are handed over, which is when they are known."""

    def __init__(self) -> None:
        self.tokens: list[float] = []

    def put(self, value: object) -> None:
        self.tokens.append(time.perf_counter())

    def end(self) -> None:
        pass


class _Memory:
    """Most memory in use from now until :meth:`note`, and how much above what is in use now.

    On CUDA what tensors take, elsewhere the process's resident pages as Linux counts them; 0 where nothing counts.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        elif _CLEAR.exists():
            libc = ctypes.CDLL(None)
            if hasattr(libc, "malloc_trim"):  # glibc keeps freed blocks, which would hide that they are used again
                libc.malloc_trim(0)
            _CLEAR.write_text("5", encoding="ascii")  # the kernel's word for: the peak begins anew
        self._before = self._peak()
        self.most = self.growth = 0

    def note(self) -> None:
        self.most = self._peak()
        self.growth = self.most - self._before

    def _peak(self) -> int:
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device)
        if not _CLEAR.exists():
            return 0
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


_CLEAR = Path("/proc/self/clear_refs")


def _compared(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of one case with how many times faster than ``generate`` each is, where that was measured."""
    base = next((row for row in rows if row["system"] == "generate" and "left_out" not in row), None)
    for row in rows:
        if base is not None and "left_out" not in row:
            row["times_faster_than_generate"] = {
                name: _short(base[seconds]["median"] / row[seconds]["median"])
                for name, seconds in (("first_token", "seconds_to_first_token"), ("in_all", "seconds_in_all"))
            }
    return rows


def _require_length(case: Case, lengths: Sequence[int]) -> None:
    """Times of answers of other lengths could not be compared."""
    if set(lengths) != {case.answer_tokens}:
        raise KVFusionError(
            f"answers have {sorted(set(lengths))} tokens in place of {case.answer_tokens}; an end token came early."
        )


def _spread(found: Sequence[float]) -> dict[str, float]:
    figures = {"median": statistics.median(found), "least": min(found), "most": max(found)}
    return {name: _short(figure) for name, figure in figures.items()}


def _short(figure: float) -> float:
    """Four digits: more than any time repeats in."""
    return float(f"{figure:.4g}")
