"""One context of llama.cpp: a cache of cells that sequences share, and passes over it.

A sequence is a set of cells. Copying a sequence to another one marks its cells and moves no data. Each document's rows
are restored into cells of their own, even if their positions are equal.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from threading import Lock
from typing import Any

import numpy as np
import torch

from ..errors import MemoryLimitError, UnsupportedModelError
from .library import Weights, library
from .states import cells_of

MAX_SEQUENCES = 64  # a batch has at most 32 questions
TOKENS_PER_BATCH = 2048  # per call of llama_decode
TOKENS_PER_PASS = 512
CELLS_STEP = 256  # llama.cpp rounds the cells up to this
KEPT_CONTEXTS = 2
CACHE_TYPES = {"f16": (1, torch.float16), "q8_0": (8, torch.uint8)}  # ggml's type, and the dtype that rows are kept in

NO_FREE_CELLS = 1  # status of a pass
FLASH_ATTENTION_ON = 1  # values are not transposed, so a cell's row is contiguous


@dataclass(frozen=True, slots=True)
class ContextOptions:
    """Attributes:
    threads: number of threads of a pass.
    cache_type: type of keys and values in the cache: "f16" or "q8_0".
    """

    threads: int
    cache_type: str = "f16"


@dataclass(frozen=True, slots=True)
class Tokens:
    """Tokens that are appended to one sequence in a pass.

    Attributes:
        start: position of the first token: one more than the largest position of the sequence.
        predicted: number of tokens at the end whose next tokens are predicted.
    """

    ids: Sequence[int]
    start: int
    sequence: int
    predicted: int = 0


class Context:
    """A cache of ``cells`` cells for sequences 0 to 63. One thread uses it at a time.

    Raises:
        MemoryLimitError: there is not enough memory for the cells.
    """

    def __init__(self, weights: Weights, options: ContextOptions, cells: int) -> None:
        self._lib, self._weights, self._options = library(), weights, options
        self._adapter: Any = None
        self._open(cells)

    def _open(self, cells: int) -> None:
        lib, options = self._lib, self._options
        self.cells = -(-cells // CELLS_STEP) * CELLS_STEP
        params = lib.llama_context_default_params()
        params.n_ctx, params.n_seq_max, params.kv_unified = self.cells, MAX_SEQUENCES, True
        params.n_batch, params.n_ubatch = TOKENS_PER_BATCH, TOKENS_PER_PASS
        params.n_threads = params.n_threads_batch = options.threads
        params.type_k = params.type_v = CACHE_TYPES[options.cache_type][0]
        params.flash_attn_type = FLASH_ATTENTION_ON
        self._pointer = lib.llama_init_from_model(self._weights.pointer, params)
        if not self._pointer:
            raise MemoryLimitError(
                f"llama.cpp cannot make a context of {self.cells} tokens for {self._weights.name!r}: memory is short, "
                f"or its heads are too narrow for cache_type={self._options.cache_type!r} or flash attention."
            )
        self._memory = lib.llama_get_memory(self._pointer)
        self._finalizer = weakref.finalize(self, _free, lib, self._pointer, self._weights)

    def use_adapter(self, adapter: Any) -> None:
        """Apply a LoRA adapter in the next passes, or none."""
        if adapter is self._adapter:
            return
        adapters = (self._lib.llama_adapter_lora_p_ctypes * 1)(adapter) if adapter else None
        scales = (ctypes.c_float * 1)(1.0) if adapter else None
        self._lib.llama_set_adapters_lora(self._pointer, adapters, 1 if adapter else 0, scales)
        self._adapter = adapter

    # Sequences

    def clear(self) -> None:
        self._lib.llama_memory_clear(self._memory, False)

    def remove(self, sequence: int) -> None:
        """Remove a sequence. Cells that no other sequence uses become free."""
        self._lib.llama_memory_seq_rm(self._memory, sequence, -1, -1)

    def copy(self, source: int, target: int) -> None:
        """Let ``target`` also use the cells of ``source``."""
        self._lib.llama_memory_seq_cp(self._memory, source, target, -1, -1)

    def last_position(self, sequence: int) -> int:
        """Return the largest position of a sequence, or -1 if it has no cells."""
        return self._lib.llama_memory_seq_pos_max(self._memory, sequence)

    def state(self, sequence: int) -> memoryview:
        """Return the saved state of a sequence."""
        size = self._lib.llama_state_seq_get_size(self._pointer, sequence)
        data = np.empty(size, np.uint8)
        written = self._lib.llama_state_seq_get_data(self._pointer, _bytes(data), size, sequence)
        return data.data[:written]

    def restore(self, sequence: int, state: np.ndarray) -> None:
        """Replace a sequence by a saved one, in free cells.

        Raises:
            MemoryLimitError: too few cells are free.
        """
        if not self._lib.llama_state_seq_set_data(self._pointer, _bytes(state), state.nbytes, sequence):
            raise MemoryLimitError(f"a context of {self.cells} tokens is too small for the documents of this batch.")

    def _grow(self) -> None:
        """Move all sequences into a context of at least twice as many cells. Cells that they shared are copied."""
        numbers = [number for number in range(MAX_SEQUENCES) if self.last_position(number) >= 0]
        states = {number: self.state(number) for number in numbers}
        adapter, self._adapter = self._adapter, None
        self.close()
        self._open(max(2 * self.cells, sum(map(cells_of, states.values())) + TOKENS_PER_BATCH))
        self.use_adapter(adapter)
        for number, state in states.items():
            self.restore(number, np.frombuffer(state, np.uint8))

    # Passes

    def decode(self, inputs: Sequence[Tokens]) -> torch.Tensor:
        """Append tokens to sequences and return the logits (n, V), float32, of those whose next token is predicted.

        The n rows are in the order of ``inputs``.

        The cache grows if it has too few free cells.

        Raises:
            UnsupportedModelError: a sequence has a gap of positions.
            MemoryLimitError: there is not enough memory.
        """
        for part in inputs:
            last = self.last_position(part.sequence)
            if last >= 0 and part.start != last + 1:
                raise UnsupportedModelError(
                    f"a text starts at position {part.start} after position {last}, but llama.cpp needs consecutive "
                    "positions; leave passage_length, positions and long_documents at their defaults, or use "
                    "engine='torch'."
                )
        rows = sum(part.predicted for part in inputs)
        logits = torch.empty(rows, self._weights.vocabulary_size)
        flat = [
            (token, part.start + n, part.sequence, n >= len(part.ids) - part.predicted)
            for part in inputs
            for n, token in enumerate(part.ids)
        ]
        filled = 0
        for start in range(0, len(flat), TOKENS_PER_BATCH):
            filled += self._decode_batch(flat[start : start + TOKENS_PER_BATCH], logits[filled:])
        return logits

    def _decode_batch(self, tokens: Sequence[tuple[int, int, int, bool]], logits: torch.Tensor) -> int:
        """Run one call over (token, position, sequence, is predicted), and fill the first rows of ``logits``."""
        lib, count = self._lib, len(tokens)
        batch = lib.llama_batch_init(count, 0, 1)
        try:
            batch.n_tokens = count
            for n, (token, position, sequence, predicted) in enumerate(tokens):
                batch.token[n], batch.pos[n], batch.logits[n] = token, position, predicted
                batch.n_seq_id[n] = 1
                batch.seq_id[n][0] = sequence
            status = lib.llama_decode(self._pointer, batch)
            if status == NO_FREE_CELLS:
                self._grow()
                status = lib.llama_decode(self._pointer, batch)
        finally:
            lib.llama_batch_free(batch)
        if status:
            raise MemoryLimitError(
                f"llama.cpp failed with status {status} for {count} tokens in a context of {self.cells}; pass fewer "
                "or shorter documents."
            )
        rows = sum(predicted for *_, predicted in tokens)
        if rows:
            found = lib.llama_get_logits(self._pointer)
            data = np.ctypeslib.as_array(found, shape=(rows, self._weights.vocabulary_size))
            logits[:rows] = torch.from_numpy(data)
        return rows

    def close(self) -> None:
        """Free the memory."""
        self._finalizer()


def _free(lib: Any, context: Any, weights: Weights) -> None:
    """Free a context. The argument ``weights`` keeps them until then."""
    lib.llama_free(context)


def _bytes(data: np.ndarray) -> Any:
    return data.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))


class ContextPool:
    """Contexts of one model, each used by one thread at a time. A few are kept, because making one takes a while."""

    def __init__(self, make: Callable[[int], Context]) -> None:
        self._make = make
        self._free: list[Context] = []
        self._lock = Lock()

    @contextmanager
    def context(self, cells: int, adapter: Any = None) -> Generator[Context, None, None]:
        """Return an empty context of at least ``cells`` cells that applies ``adapter``."""
        found = self._take(cells)
        try:
            found.use_adapter(adapter)
            yield found
        finally:
            found.clear()
            self._put(found)

    def _take(self, cells: int) -> Context:
        with self._lock:
            fitting = [context for context in self._free if context.cells >= cells]
            if fitting:
                found = min(fitting, key=lambda context: context.cells)
                self._free.remove(found)
                return found
        return self._make(cells)

    def _put(self, context: Context) -> None:
        with self._lock:
            self._free = sorted([*self._free, context], key=lambda kept: kept.cells)
            dropped, self._free = self._free[:-KEPT_CONTEXTS], self._free[-KEPT_CONTEXTS:]
        for one in dropped:
            one.close()

    def clear(self) -> int:
        """Free the contexts that are not in use, and return their number of cells."""
        with self._lock:
            dropped, self._free = self._free, []
        for one in dropped:
            one.close()
        return sum(one.cells for one in dropped)
