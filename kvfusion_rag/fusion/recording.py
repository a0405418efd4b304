"""Decoding steps recorded as CUDA graphs: Python launches a step's hundreds of kernels slower than a GPU runs them.

A recorded step reads and writes the same memory each time, so the cache is taken whole, with a mask over what is not
filled yet, and a step's tokens keep their shape while answers end. Each decoding records its own, which costs a few
ordinary steps; nothing has to be compiled, and no lengths be rounded up. Knows tensors, neither questions nor text.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Protocol

import torch

from ..engine.limits import is_out_of_memory
from ..model.ape import Ape
from ..model.backbone import Backbone
from ..model.positions import additive
from .fused_cache import FusedContext
from .gate import TOLERANCE

logger = logging.getLogger(__name__)

WORTH = 8  # steps still to do, above which a recording pays
_EMPTIED_EVERY = 64  # recordings after which the memory of former ones goes back; torch keeps it until then
_CAPTURING = threading.Lock()  # a process may capture one graph at a time

Pass = Callable[[], torch.Tensor]  # always over the same memory; logits (R, Q, V)


class Recorder(Protocol):
    def record(self, run: Pass) -> Pass | None:
        """``run`` in a faster form; ``None`` where there is none."""
        ...

    def give_up(self, cause: str) -> None:
        """What was recorded last gave other logits; record nothing more."""
        ...


class CudaGraphs:
    """Records passes as CUDA graphs, until one cannot be recorded.

    Attributes:
        recorded: passes so far.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._usable = True
        self._side: torch.cuda.Stream | None = None  # one for all, since libraries keep memory for each stream
        self.recorded = 0

    def record(self, run: Pass) -> Pass | None:
        """``run`` as one launch; ``None`` where memory is short, or the model does what no graph can hold."""
        if not self._usable:
            return None
        try:
            with torch.cuda.device(self._device), _CAPTURING:
                replay = self._record(run)
        except RuntimeError as failure:
            if not is_out_of_memory(failure):
                self.give_up(str(failure))
            return None
        self.recorded += 1
        return replay

    def give_up(self, cause: str) -> None:
        self._usable = False
        logger.warning("decoding steps cannot be recorded as CUDA graphs, and run one kernel at a time: %s", cause)

    def _record(self, run: Pass) -> Pass:
        if self.recorded % _EMPTIED_EVERY == _EMPTIED_EVERY - 1:
            torch.cuda.empty_cache()
        side, graph = self._side or torch.cuda.Stream(), torch.cuda.CUDAGraph()
        self._side = side
        side.wait_stream(torch.cuda.current_stream())
        try:
            with torch.cuda.stream(side):
                run()  # libraries make what they need at a first pass
                # By hand, since torch.cuda.graph would empty the cache of memory. Other threads go on loading.
                graph.capture_begin(capture_error_mode="thread_local")
                try:
                    recorded = run()
                except BaseException:
                    with suppress(RuntimeError):  # which would hide the cause
                        graph.capture_end()
                    raise
                graph.capture_end()
        finally:  # what the pass wrote may not be written over before it is done
            torch.cuda.current_stream().wait_stream(side)

        def replay() -> torch.Tensor:
            graph.replay()
            return recorded

        return replay


@dataclass(frozen=True, slots=True)
class Asked:
    """One forward pass: ids and positions (R, Q), its mask, and the places of n tokens whose next one is asked for."""

    ids: torch.Tensor
    positions: torch.Tensor
    mask: torch.Tensor
    rows: torch.Tensor
    columns: torch.Tensor


class Steps:
    """The forward passes of one decoding: ordinary ones, or from some step on a recorded one over and over.

    The first recorded pass has to give the logits of the ordinary one.

    Args:
        recorder: what records, or ``None`` for ordinary passes alone. APE attends in a way of its own, and attentions
            that know masks of padding alone cannot leave out the slots that are not filled yet: they are not recorded.
    """

    def __init__(
        self, backbone: Backbone, context: FusedContext, *, adapter: bool, ape: Ape | None, recorder: Recorder | None
    ) -> None:
        self._backbone, self._context, self._adapter, self._ape = backbone, context, adapter, ape
        self._recorder = recorder if ape is None and backbone.takes_any_mask else None
        self._recording: _Recording | None = None

    @property
    def columns(self) -> int:
        """Tokens that each row has to bring, pads among them; 0 while passes are ordinary."""
        return 0 if self._recording is None else self._recording.columns

    def read(self, asked: Asked, *, still: int) -> torch.Tensor:
        """Logits (n, V), float32, of what is asked for; the cache grows.

        Args:
            still: steps, with this one, until the longest answer has to end.
        """
        if self._recording is not None and not self._recording.fits(asked):
            self.stop()
        if self._recording is not None:
            return self._recording.read(asked)
        logits = self._read(asked)
        # Steps enough to come, and room for all of them where the recorded pass writes.
        if self._recorder is not None and still > WORTH and self._context.room >= still * asked.ids.shape[1]:
            return self._record(asked, logits, self._recorder)
        return logits

    def may_drop(self, left: int) -> bool:
        """Whether rows may be dropped until ``left`` are: from a recording as soon as that halves them at least."""
        return self._recording is None or 2 * left <= len(self._recording.ids)

    def drop(self, kept: list[int]) -> None:
        """Rows were dropped but these."""
        self.stop()
        self._ape = self._ape and self._ape.keep(kept)

    def stop(self) -> None:
        """Go on with ordinary passes."""
        self._recording = None
        self._context.take_used()

    def _read(self, asked: Asked) -> torch.Tensor:
        return self._backbone.forward(
            asked.ids, asked.positions, asked.mask, self._context.cache, asked.columns, rows=asked.rows,
            adapter=self._adapter, ape=self._ape,
        )  # fmt: skip

    def _record(self, asked: Asked, expected: torch.Tensor, recorder: Recorder) -> torch.Tensor:
        """Record the pass that was just made in the ordinary way, and make it again; its logits."""
        self._context.grow(-asked.ids.shape[1])
        recording = _Recording(self._backbone, self._context, asked, adapter=self._adapter)
        if recording.made_by(recorder):
            logits = recording.read(asked)
            error = float((logits - expected).norm() / expected.norm())
            allowed = TOLERANCE.get(self._backbone.dtype, TOLERANCE[torch.float16])
            if error <= allowed:
                self._recording = recording
                return logits
            recorder.give_up(
                f"the recorded step gives other logits, relative error {error:.1e}, allowed {allowed:.0e}"
            )
            self._context.grow(-asked.ids.shape[1])
        self._recorder = None
        self._context.take_used()
        return self._read(asked)  # writes over what the attempt has written


class _Recording:
    """The memory that a recorded pass reads, and the pass."""

    def __init__(self, backbone: Backbone, context: FusedContext, asked: Asked, *, adapter: bool) -> None:
        rows, self.columns = asked.ids.shape
        self._backbone, self._context, self._adapter = backbone, context, adapter
        self.ids, self._positions = asked.ids.clone(), asked.positions.clone()
        self._slots = torch.arange(self.columns, device=asked.ids.device)
        hidden = torch.zeros(rows, 1, self.columns, context.slots, dtype=torch.bool, device=asked.ids.device)
        self._mask = additive(hidden, backbone.dtype)
        self._replay: Pass | None = None
        context.take_whole(self._slots)
        self._fill(asked)

    def made_by(self, recorder: Recorder) -> bool:
        """Whether ``recorder`` could record the pass."""

        def run() -> torch.Tensor:
            return self._backbone.step(
                self.ids, self._positions, self._mask, self._context.cache, adapter=self._adapter
            )

        self._replay = recorder.record(run)
        return self._replay is not None

    def fits(self, asked: Asked) -> bool:
        return asked.ids.shape == self.ids.shape

    def read(self, asked: Asked) -> torch.Tensor:
        assert self._replay is not None, "made_by comes first"
        self._fill(asked)
        logits = self._replay()
        self._context.grow(self.columns)
        return logits[asked.rows, asked.columns].float()

    def _fill(self, asked: Asked) -> None:
        used, mask = self._context.used, asked.mask
        self.ids.copy_(asked.ids)
        self._positions.copy_(asked.positions)
        torch.arange(used, used + self.columns, out=self._slots)
        seen = mask if mask.dim() == 4 else mask[:, None, None, :].bool()  # (R, 1, Q or 1, used + Q)
        self._mask.fill_(torch.finfo(self._mask.dtype).min)
        self._mask[..., : used + self.columns].masked_fill_(seen, 0)
