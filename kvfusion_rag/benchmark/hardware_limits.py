"""Computes the floor of an answer: its minimum number of operations and bytes, and the time these take on this
machine.

A floor counts matrix products and attention, each weight read once per step, and each document's KV moved once for all
its questions. For a token whose next token is not needed, the last layer only computes its KV. Everything else (norms,
rotations, masks, sampling, launches, embeddings) is excluded, so no program can be faster than its floor.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch

from .shapes import Shape
from .workload import Case, System

TRIES = 10  # repetitions of each measurement of the machine, after one warm-up


class Peaks(NamedTuple):
    """Measured peak rates of this machine, per second.

    Attributes:
        operations: multiplications and additions in one large matrix product.
        memory: bytes read from or written to the device's memory.
        load: bytes copied from host memory to the device.
    """

    operations: float
    memory: float
    load: float


@dataclass(frozen=True, slots=True)
class Work:
    """Operations, bytes moved in the device's memory, and bytes loaded into it."""

    operations: float
    moved: float
    loaded: float = 0

    def seconds(self, peaks: Peaks) -> float:
        """Return the minimum time. Computing and moving overlap, but loading comes first."""
        return max(self.operations / peaks.operations, self.moved / peaks.memory) + self.loaded / peaks.load


@dataclass(frozen=True, slots=True)
class Costs:
    """Costs of one model.

    Attributes:
        layers: number of layers.
        body: number of weights in the matrices of all layers.
        kv_projections: number of weights in the key and value projections of one layer.
        head: number of weights in the output matrix.
        attention: operations for one token that attends to one token.
        kv: bytes of one token's KV.
        width: bytes per weight of the output matrix.
        body_width: bytes per weight of the layers.
    """

    layers: int
    body: int
    kv_projections: int
    head: int
    attention: int
    kv: int
    width: int
    body_width: int

    @classmethod
    def of(cls, shape: Shape, dtype: torch.dtype, *, body_width: int | None = None) -> Costs:
        hidden, width = shape.hidden_size, shape.hidden_size // shape.heads
        kv_projections = 2 * hidden * shape.kv_heads * width
        layer = kv_projections + 2 * hidden * shape.heads * width + 3 * hidden * shape.intermediate_size
        return cls(
            layers=shape.layers,
            body=shape.layers * layer,
            kv_projections=kv_projections,
            head=hidden * shape.vocabulary,
            attention=4 * shape.layers * shape.heads * width,
            kv=2 * shape.layers * shape.kv_heads * width * dtype.itemsize,
            width=dtype.itemsize,
            body_width=body_width or dtype.itemsize,
        )

    @property
    def weight_bytes(self) -> int:
        """Bytes of weights that every step reads."""
        return self.body * self.body_width + self.head * self.width

    def first_token(self, case: Case, system: System) -> Work:
        """Return the work until all questions of ``case`` have their first token."""
        head = 2 * self.head * case.batch
        if system == "generate":
            tokens = case.joined_tokens
            return Work(
                case.batch * self._read(tokens, predict=True) + head, self.weight_bytes + case.batch * tokens * self.kv
            )
        stored = 0 if system == "cold" else case.hits
        computed = case.lists * (case.documents - stored) * self._read(case.document_tokens, predict=False)
        questions = case.batch * self._read(case.question_tokens, case.documents * case.document_tokens, predict=True)
        return Work(
            computed + questions + head,
            self.weight_bytes + self._cached_tokens(case, system) * self.kv,
            case.lists * stored * case.document_tokens * self.kv if system == "disk" else 0,
        )

    def next_token(self, case: Case, system: System) -> Work:
        """Return the work of one further token of every answer, with the mean length of context."""
        generated = case.answer_tokens / 2  # mean of 1, 2, ... answer_tokens - 1
        context = case.joined_tokens + generated
        return Work(
            case.batch * (2 * (self.body + self.head) + self.attention * context),
            self.weight_bytes + (self._cached_tokens(case, system) + case.batch * generated) * self.kv,
        )

    def _read(self, tokens: int, before: int = 0, *, predict: bool) -> float:
        """Return the operations of reading ``tokens`` after ``before`` tokens with causal attention.

        Args:
            predict: whether the token after the last one is needed.
        """
        pairs = tokens * before + tokens * (tokens + 1) / 2
        skipped_pairs = pairs - predict * (before + tokens)
        skipped = 2 * (self.body / self.layers - self.kv_projections) * (tokens - predict)
        skipped += self.attention / self.layers * skipped_pairs
        return 2 * self.body * tokens + self.attention * pairs - skipped

    def _cached_tokens(self, case: Case, system: System) -> int:
        """Return the number of tokens with KV after all questions are read."""
        if system == "generate":
            return case.batch * case.joined_tokens
        return case.lists * case.documents * case.document_tokens + case.batch * case.question_tokens


def measure_peaks(device: torch.device, dtype: torch.dtype) -> Peaks:
    """Measure this machine with the current number of threads. It takes a few seconds."""
    is_cpu = device.type == "cpu"
    side, size = (2048, 1 << 29) if is_cpu else (8192, 1 << 30)
    square = torch.rand(side, side, device=device).to(dtype)
    product = _best_seconds(lambda: torch.mm(square, square), device)
    numbers = torch.ones(size // 4, device=device)  # larger than the caches
    other = torch.empty_like(numbers)
    copy = _best_seconds(lambda: other.copy_(numbers), device)
    add = _best_seconds(lambda: numbers.sum(), device)
    load = size / copy
    if not is_cpu:
        host = torch.ones(size // 4, pin_memory=True)
        load = size / _best_seconds(lambda: numbers.copy_(host, non_blocking=True), device)
    return Peaks(2 * side**3 / product, max(2 * size / copy, size / add), load)


def _best_seconds(do: Callable[[], object], device: torch.device) -> float:
    seconds = []
    for _ in range(TRIES + 1):
        began = time.perf_counter()
        do()
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
        seconds.append(time.perf_counter() - began)
    return min(seconds[1:])
