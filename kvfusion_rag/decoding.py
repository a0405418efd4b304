"""Dt: from a fused context and encoded questions to answers, one token of every row a step.

Our own loop over the backbone in place of ``generate``: a stream is then a plain generator that raises where
it fails and stops when it is closed, rows sample from random generators of their own, and positions and
masks are never guessed. Owns sampling, stop strings and the growing text. Knows nothing of documents.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from transformers.generation.logits_process import (
    LogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from .ape import Ape
from .backbone import Backbone
from .errors import InvalidInputError
from .fusion import FusedContext
from .schema import FinishReason
from .settings import is_count

GREEDY_BELOW = 1e-4  # temperatures at which logits would overflow and the likeliest token is all but certain
_INCOMPLETE = "\ufffd"  # what a tokenizer shows for a character whose bytes have not all come


@dataclass(frozen=True, slots=True)
class DecodingOptions:
    """How tokens are chosen and when an answer ends.

    Attributes:
        max_new_tokens: longest answer, in tokens.
        temperature: 0 for greedy; above it, sampling.
        top_p: keep the likeliest tokens that hold this share of the probability.
        top_k: keep this many likeliest tokens; ``None`` for all.
        stop: strings that end an answer wherever their letters fall on tokens; not part of it.
        seed: of the random generator of each row, below 2**63; ``None`` for a fresh one.
    """

    max_new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int | None = None
    stop: Sequence[str] = ()
    seed: int | None = None

    def __post_init__(self) -> None:
        _require(is_count(self.max_new_tokens), "max_new_tokens", self.max_new_tokens, "a whole number from 1")
        _require(
            _is_number(self.temperature) and self.temperature >= 0, "temperature", self.temperature, "a number from 0"
        )
        _require(_is_number(self.top_p) and 0 < self.top_p <= 1, "top_p", self.top_p, "above 0 and at most 1")
        _require(self.top_k is None or is_count(self.top_k), "top_k", self.top_k, "a whole number from 1, or None")
        is_list = isinstance(self.stop, Sequence) and not isinstance(self.stop, str)
        _require(is_list, "stop", self.stop, "a list of strings; put a single one into a list")
        _require(all(isinstance(s, str) and s for s in self.stop), "stop", self.stop, "a list of non-empty strings")
        is_seed = isinstance(self.seed, int) and not isinstance(self.seed, bool) and 0 <= self.seed < 1 << 63
        _require(self.seed is None or is_seed, "seed", self.seed, "a whole number from 0 to 2**63 - 1, or None")


@dataclass(frozen=True, slots=True)
class Question:
    """One row to decode: its ids and the position of the first (``positions.question_start``)."""

    ids: tuple[int, ...]
    start: int


class Row:
    """One answer as it grows: its tokens, its text, and why it ended.

    White space around an answer is dropped, in front of it before stop strings are looked for.
    """

    def __init__(
        self, decode: Callable[[list[int]], str], stop: Sequence[str], unsettling_ids: frozenset[int] = frozenset()
    ) -> None:
        self._decode = decode
        self._stop = stop
        self._unsettling_ids = unsettling_ids
        self._emitted = self._settled = 0
        self.ids: list[int] = []
        self.text = ""
        self.finish_reason: FinishReason | None = None

    def push(self, token: int, *, is_end: bool, is_last: bool) -> None:
        """Take the next token; ``is_end`` for an end token, ``is_last`` when no more may come."""
        self.ids.append(token)
        if is_end:
            self.finish_reason = "stop"
            return
        text = self._decode(self.ids).lstrip()
        ends = [end for stop in self._stop if (end := text.find(stop)) >= 0]
        if ends:
            text, self.finish_reason = text[: min(ends)], "stop"
        elif is_last:
            self.finish_reason = "length"
        self.text = text.rstrip()
        if token not in self._unsettling_ids:
            self._settled = len(self.text)

    def take(self) -> str:
        """Text that is certain by now and was not taken before.

        Held back: a character still incomplete, a run of byte tokens, and an ending that may become a stop string.
        """
        ready = len(self.text) if self.finish_reason else len(self.text) - self._uncertain()
        piece = self.text[self._emitted : max(ready, self._emitted)]
        self._emitted += len(piece)
        return piece

    def _uncertain(self) -> int:
        """Length of the ending that may still change."""
        text = self.text[: self._settled].rstrip(_INCOMPLETE)
        open_stop = max((_overlap(text, stop) for stop in self._stop), default=0)
        return len(self.text) - len(text) + open_stop


@torch.inference_mode()
def decode(
    backbone: Backbone,
    context: FusedContext,
    questions: Sequence[Question],
    options: DecodingOptions,
    decode_ids: Callable[[list[int]], str],
    *,
    adapter: bool,
    ape: Ape | None = None,
    unsettling_ids: frozenset[int] = frozenset(),
    on_logits: Callable[[torch.Tensor], None] | None = None,
) -> Generator[list[Row], None, None]:
    """Answer every row of ``context``, yielding all rows after each step.

    Args:
        context: fused context of B rows; it is used up.
        questions: B encoded questions.
        options: one set for all rows.
        decode_ids: ids -> text.
        adapter: whether the adapter takes part.
        ape: attend to the documents' slots as APE does.
        unsettling_ids: tokens after which the text so far may still be read anew.
        on_logits: called with the logits (B, V) of each step.
    """
    device = backbone.device
    rows = [Row(decode_ids, options.stop, unsettling_ids) for _ in questions]
    choose = _sampler(options, len(rows), device)
    ids, positions, mask, last = _first_step(questions, context.mask)
    next_position = (positions[torch.arange(len(rows), device=device), last] + 1)[:, None]  # (B, 1)
    for step in range(options.max_new_tokens):
        logits = backbone.forward(ids, positions, mask, context.cache, last, adapter=adapter, ape=ape)
        if on_logits is not None:
            on_logits(logits)
        ids = choose(logits)[:, None]  # (B, 1)
        for row, token in zip(rows, ids[:, 0].tolist(), strict=True):
            if row.finish_reason is None:
                row.push(token, is_end=token in backbone.end_ids, is_last=step + 1 == options.max_new_tokens)
        yield rows
        if all(row.finish_reason for row in rows):
            return
        positions, next_position = next_position, next_position + 1
        mask = torch.cat([mask, mask.new_ones(len(rows), 1)], dim=1)
        last = torch.zeros_like(last)


def _first_step(
    questions: Sequence[Question], context_mask: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Right-padded ids and positions (B, Q), mask (B, K + Q) and index (B,) of each question's last token."""
    longest = max(len(question.ids) for question in questions)
    ids = torch.zeros(len(questions), longest, dtype=torch.long)
    positions, used = torch.zeros_like(ids), torch.zeros_like(ids)
    for row, question in enumerate(questions):
        length = len(question.ids)
        ids[row, :length] = torch.tensor(question.ids)
        steps = torch.arange(longest).clamp(max=length - 1)  # pads stay at the last position, inside the window
        positions[row] = question.start + steps
        used[row, :length] = 1
    device = context_mask.device
    last = used.sum(dim=1) - 1
    mask = torch.cat([context_mask, used.to(device)], dim=1)
    return ids.to(device), positions.to(device), mask, last.to(device)


def _sampler(options: DecodingOptions, rows: int, device: torch.device) -> Callable[[torch.Tensor], torch.Tensor]:
    """Function from logits (B, V) to the next tokens (B,)."""
    if options.temperature < GREEDY_BELOW:
        return lambda logits: logits.argmax(dim=-1)
    warpers: list[LogitsProcessor] = [TemperatureLogitsWarper(float(options.temperature))]
    if options.top_k is not None:
        warpers.append(TopKLogitsWarper(options.top_k))
    if options.top_p < 1:
        warpers.append(TopPLogitsWarper(options.top_p))
    # A generator a row: an answer does not depend on what is sampled beside it, nor on torch's global state.
    generators = [torch.Generator(device) for _ in range(rows)]
    for generator in generators:
        generator.seed() if options.seed is None else generator.manual_seed(options.seed)

    no_ids = cast(torch.LongTensor, torch.empty(0, dtype=torch.long))  # these warpers do not look at ids

    def sample(logits: torch.Tensor) -> torch.Tensor:
        for warper in warpers:
            logits = warper(no_ids, cast(torch.FloatTensor, logits))
        probabilities = logits.softmax(dim=-1)
        drawn = [torch.multinomial(p, 1, generator=g) for p, g in zip(probabilities, generators, strict=True)]
        return torch.cat(drawn)

    return sample


def _overlap(text: str, stop: str) -> int:
    """Length of the longest ending of ``text`` that begins ``stop``."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _require(holds: bool, name: str, value: object, allowed: str) -> None:
    if not holds:
        raise InvalidInputError(f"{name} is {value!r}, but it must be {allowed}.")
