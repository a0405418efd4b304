"""Dt: decodes answers over a fused cache, one token of every open answer per step.

This is our own loop instead of ``generate``: a stream is a plain generator that can raise and be closed, each answer
samples from its own random generator, and positions and masks are explicit. It does not know about documents.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, replace

import torch

from ..errors import UnsupportedModelError
from ..model.attention.ape import Ape
from ..model.attention.weights import AttentionSum
from ..model.backbone import Backbone
from .constraints import constrained
from .fused_cache import FusedContext
from .growing_answer import GrowingAnswer
from .interface import Question
from .sampling import NO_TOKEN, DecodingOptions, sampler, to_list
from .slot_table import SlotTable, StepInputs


@dataclass(frozen=True, slots=True)
class DecodingPlan:
    """The weights and the attention that answer questions.

    Attributes:
        decoder: the model that answers.
        adapter: whether its adapter is on.
        ape: APE's attention to the documents' slots, or None for the model's own attention.
    """

    decoder: Backbone
    adapter: bool
    ape: Ape | None = None

    def logits(
        self, context: FusedContext, inputs: StepInputs, attention_sum: AttentionSum | None = None
    ) -> torch.Tensor:
        """Run one forward pass and return logits (n, V), float32; the context grows by Q slots."""
        return self.decoder.forward(
            inputs.ids,
            inputs.positions,
            inputs.mask,
            context.cache,
            inputs.columns,
            rows=inputs.rows,
            adapter=self.adapter,
            ape=self.ape,
            attention_sum=attention_sum,
        )

    def keep(self, rows: Sequence[int]) -> DecodingPlan:
        """Return the plan for a context that kept only these rows."""
        return replace(self, ape=self.ape and self.ape.keep(rows))


@torch.inference_mode()
def decode(
    plan: DecodingPlan,
    context: FusedContext,
    questions: Sequence[Question],
    answers: Sequence[GrowingAnswer],
    options: DecodingOptions,
    *,
    row_of: Sequence[int] | None = None,
    visible: torch.Tensor | None = None,
    on_logits: Callable[[torch.Tensor], None] | None = None,
    is_cancelled: Callable[[int], bool] = lambda number: False,
) -> Generator[None, None, None]:
    """Answer every question over ``context``, and yield after each step, in which each open answer grows by a token.

    Finished answers are not computed further, and neither are rows of the context without an open answer.

    Args:
        context: fused context of R rows. It cannot be used again.
        questions: N encoded questions.
        answers: N empty answers. Each says itself which tokens it allows, and when it has ended.
        options: how tokens are chosen, one set for all questions.
        row_of: (N,) row of each question; questions may share a row. Default: one row per question.
        visible: (N, K) bool, the slots that each question may attend to. Default: all slots of its row.
        on_logits: called with the logits (n, V) of the n open questions at each step.
        is_cancelled: called at each step; True ends the question's answer.

    Raises:
        UnsupportedModelError: the logits are NaN or infinite.
    """
    backbone = plan.decoder
    table = SlotTable(context, list(range(len(questions))) if row_of is None else row_of, visible)

    def logits_of(open_ones: Sequence[int], tokens: Sequence[Sequence[int]], starts: Sequence[int]) -> torch.Tensor:
        return plan.logits(context, table.add(open_ones, tokens, starts))

    def keep(open_ones: Sequence[int]) -> None:
        nonlocal plan
        if kept := table.keep(open_ones):
            plan = plan.keep(kept)

    loop = DecodingLoop(backbone.model_id, str(backbone.dtype), backbone.end_ids, logits_of, keep)
    yield from loop.run(questions, answers, sampler(options, len(answers), backbone.device), on_logits, is_cancelled)


@dataclass(frozen=True, slots=True)
class DecodingLoop:
    """The part of decoding that is the same for every engine.

    Attributes:
        logits_of: appends tokens, from their positions on, to the open questions, and returns logits (n, V).
        keep: told which questions are still open, whenever one has ended.
    """

    model_id: str
    dtype: str
    end_ids: frozenset[int]
    logits_of: Callable[[Sequence[int], Sequence[Sequence[int]], Sequence[int]], torch.Tensor]
    keep: Callable[[Sequence[int]], None]

    def run(
        self,
        questions: Sequence[Question],
        answers: Sequence[GrowingAnswer],
        choose: Callable[[torch.Tensor, Sequence[int]], list[int]],
        on_logits: Callable[[torch.Tensor], None] | None,
        is_cancelled: Callable[[int], bool],
    ) -> Generator[None, None, None]:
        """Let every answer grow by one token per step; see :func:`decode`."""
        open_ones = list(range(len(answers)))
        tokens: list[Sequence[int]] = [question.ids for question in questions]  # input of each question's next step
        positions = [question.start for question in questions]
        while open_ones:
            logits = self.logits_of(open_ones, [tokens[i] for i in open_ones], [positions[i] for i in open_ones])
            if on_logits is not None:
                on_logits(logits)
            chosen = choose(constrained(logits, [answers[i].allowed for i in open_ones]), open_ones)
            self._require_tokens(chosen)
            for i, token in zip(open_ones, chosen, strict=True):
                positions[i] += len(tokens[i])
                tokens[i] = (answers[i].push(token, is_end=token in self.end_ids),)
                if answers[i].finish_reason is None and is_cancelled(i):
                    answers[i].finish_reason = "cancelled"
            yield
            still_open = [i for i in open_ones if answers[i].finish_reason is None]
            if still_open and len(still_open) < len(open_ones):
                self.keep(still_open)
            open_ones = still_open

    def _require_tokens(self, chosen: Sequence[int]) -> None:
        if NO_TOKEN in chosen:
            raise UnsupportedModelError(
                f"{self.model_id!r} produced NaN or infinite logits in {self.dtype}; load it with dtype='float32' or "
                "'bfloat16'."
            )


@torch.inference_mode()
def log_probabilities(
    plan: DecodingPlan,
    context: FusedContext,
    questions: Sequence[Question],
    answer: Sequence[int],
    *,
    visible: torch.Tensor | None = None,
) -> list[float]:
    """Return log p(answer | question), in nats, for several questions over one row.

    Arguments are those of :func:`decode`. This is one pass; the logits of every answer token are in memory at once.
    """
    table = SlotTable(context, [0] * len(questions), visible)
    inputs = table.add(
        range(len(questions)),
        [(*question.ids, *answer[:-1]) for question in questions],
        [question.start for question in questions],
    )
    back = torch.arange(len(answer) - 1, -1, -1, device=inputs.columns.device)
    columns = (inputs.columns[:, None] - back).flatten()  # (N A,): the column that predicts each answer token
    logits = plan.logits(context, replace(inputs, rows=torch.zeros_like(columns), columns=columns))
    tokens = torch.tensor([*answer] * len(questions), device=logits.device)
    chosen = logits.log_softmax(dim=-1).gather(1, tokens[:, None])  # (N A, 1)
    return to_list(chosen.view(len(questions), -1).double().sum(dim=1))
