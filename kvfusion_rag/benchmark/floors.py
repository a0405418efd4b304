"""What a machine must do at least for an answer, in operations and bytes, and how fast it can do that at best.

A floor counts the products of matrices and of attention, each weight read once a step, and each document's keys and
values moved once, whatever the number of questions over it. Of a token whose successor is not asked for, the last
layer computes keys and values alone. All else (norms, rotations, masks, sampling, launches) is left out, and so are
the embeddings, of which a step reads a few rows: no program can be faster than its floor.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch

from .shapes import Shape
from .workload import Case, System

TRIES = 10  # of each measurement of the machine, after a first one that does not count


class Peaks(NamedTuple):
    """What this machine was measured to do in a second, at best.

    Attributes:
        operations: multiplications and additions of one large matrix product.
        memory: bytes that the device's memory gives or takes.
        load: bytes that come from host memory to where the model computes.
    """

    operations: float
    memory: float
    load: float


@dataclass(frozen=True, slots=True)
class Work:
    """Operations, bytes moved in the device's memory, and bytes brought to it from elsewhere."""

    operations: float
    moved: float
    loaded: float = 0

    def seconds(self, peaks: Peaks) -> float:
        """At best: computing hides moving, or moving computing, but what is loaded has to be there first."""
        return max(self.operations / peaks.operations, self.moved / peaks.memory) + self.loaded / peaks.load


@dataclass(frozen=True, slots=True)
class Costs:
    """Of one model.

    Attributes:
        layers: of the model.
        body: weights of all layers' matrices.
        kv_projections: weights of one layer that make keys and values.
        head: weights of the output matrix.
        attention: operations for one token that looks at one other, or at itself.
        kv: bytes of one token's keys and values.
        width: bytes of a weight of the output matrix.
        body_width: bytes of a layer's weight.
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
        """That every step reads."""
        return self.body * self.body_width + self.head * self.width

    def first_token(self, case: Case, system: System) -> Work:
        """Until all questions of ``case`` have their first token."""
        head = 2 * self.head * case.batch
        if system == "generate":
            tokens = case.joined_tokens
            return Work(
                case.batch * self._read(tokens, asked=True) + head, self.weight_bytes + case.batch * tokens * self.kv
            )
        stored = 0 if system == "cold" else case.hits
        computed = case.lists * (case.documents - stored) * self._read(case.document_tokens, asked=False)
        questions = case.batch * self._read(case.question_tokens, case.documents * case.document_tokens, asked=True)
        return Work(
            computed + questions + head,
            self.weight_bytes + self._known_tokens(case, system) * self.kv,
            case.lists * stored * case.document_tokens * self.kv if system == "disk" else 0,
        )

    def next_token(self, case: Case, system: System) -> Work:
        """One further token of every answer, at the mean length of context over them."""
        grown = case.answer_tokens / 2  # 1, 2, ... up to all but the last, with the token itself
        seen = case.joined_tokens + grown
        return Work(
            case.batch * (2 * (self.body + self.head) + self.attention * seen),
            self.weight_bytes + (self._known_tokens(case, system) + case.batch * grown) * self.kv,
        )

    def _read(self, tokens: int, before: int = 0, *, asked: bool) -> float:
        """Operations of ``tokens`` that each look at all ``before``, those in front of them and themselves.

        Args:
            asked: whether the last one's successor is asked for.
        """
        pairs = tokens * before + tokens * (tokens + 1) / 2
        unasked_pairs = pairs - asked * (before + tokens)
        spared = 2 * (self.body / self.layers - self.kv_projections) * (tokens - asked)
        spared += self.attention / self.layers * unasked_pairs
        return 2 * self.body * tokens + self.attention * pairs - spared

    def _known_tokens(self, case: Case, system: System) -> int:
        """Tokens with keys and values of their own once all questions are read."""
        if system == "generate":
            return case.batch * case.joined_tokens
        return case.lists * case.documents * case.document_tokens + case.batch * case.question_tokens


def measure_peaks(device: torch.device, dtype: torch.dtype) -> Peaks:
    """What this machine does now, with the threads that it has now; takes a few seconds."""
    is_cpu = device.type == "cpu"
    side, size = (2048, 1 << 29) if is_cpu else (8192, 1 << 30)
    square = torch.rand(side, side, device=device).to(dtype)
    product = _best_seconds(lambda: torch.mm(square, square), device)
    numbers = torch.ones(size // 4, device=device)  # larger than caches
    other = torch.empty_like(numbers)
    copy = _best_seconds(lambda: other.copy_(numbers), device)
    add = _best_seconds(lambda: numbers.sum(), device)
    load = size / copy
    if not is_cpu:
        host = torch.ones(size // 4, pin_memory=True)
        load = size / _best_seconds(lambda: numbers.copy_(host, non_blocking=True), device)
    return Peaks(2 * side**3 / product, max(2 * size / copy, size / add), load)


def _best_seconds(do: Callable[[], object], device: torch.device) -> float:
    found = []
    for _ in range(TRIES + 1):
        began = time.perf_counter()
        do()
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
        found.append(time.perf_counter() - began)
    return min(found[1:])
