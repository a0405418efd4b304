"""Dt: from a fused context and encoded questions to answers, one token of every open answer a step.

Our own loop over the backbone in place of ``generate``: a stream is then a plain generator that raises where
it fails and stops when it is closed, answers sample from random generators of their own, and positions and
masks are never guessed. Owns sampling, stop strings and the growing text. Knows nothing of documents.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import TypedDict, cast

import torch
from transformers.generation.logits_process import (
    LogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from ..errors import InvalidInputError, UnsupportedModelError
from ..model.ape import Ape
from ..model.backbone import Backbone
from ..model.positions import packed_mask
from ..schema import FinishReason
from ..text.settings import is_count
from .fused_cache import FusedContext
from .recording import Asked, Recorder, Steps

GREEDY_BELOW = 1e-4  # temperatures at which logits would overflow and the likeliest token is all but certain
_NO_TOKEN = -1
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
        seed: of the random generator of each answer, below 2**63; ``None`` for a fresh one.
        may_shorten: the limit is a default, so an answer with less room in the window gets a lower one.
    """

    max_new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int | None = None
    stop: Sequence[str] = ()
    seed: int | None = None
    may_shorten: bool = False

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
        object.__setattr__(self, "stop", tuple(self.stop))  # the caller's list may change while answers are decoded
        is_seed = isinstance(self.seed, int) and not isinstance(self.seed, bool) and 0 <= self.seed < 1 << 63
        _require(self.seed is None or is_seed, "seed", self.seed, "a whole number from 0 to 2**63 - 1, or None")


class DecodingKwargs(TypedDict, total=False):
    """Options of one call, as :class:`DecodingOptions` describes them."""

    max_new_tokens: int | None
    temperature: float
    top_p: float
    top_k: int | None
    stop: Sequence[str]
    seed: int | None


def decoding_options(given: DecodingKwargs, *, max_new_tokens: int) -> DecodingOptions:
    """What a caller gave, with defaults for what was not.

    Raises:
        InvalidInputError: an unknown option, or a value that is not allowed.
    """
    allowed = DecodingKwargs.__annotations__
    if unknown := sorted(given.keys() - allowed.keys()):
        raise InvalidInputError(f"{unknown[0]!r} is no option; the options are {', '.join(allowed)}.")
    wanted = given.get("max_new_tokens")
    limit = {"max_new_tokens": max_new_tokens, "may_shorten": True} if wanted is None else {"max_new_tokens": wanted}
    return DecodingOptions(**{**given, **limit, "stop": given.get("stop") or ()})


@dataclass(frozen=True, slots=True)
class Question:
    """One question to decode: its ids and the position of the first (``positions.question_start``)."""

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
        self._emitted = 0  # characters
        self._length = self._settled = 0  # tokens that are text, and that are certain text
        self._spelt = 0, ""  # so many of the first tokens, and what they spell
        self.ids: list[int] = []
        self.finish_reason: FinishReason | None = None

    def push(self, token: int, *, is_end: bool, is_last: bool) -> None:
        """Take the next token; ``is_end`` for an end token, ``is_last`` when no more may come."""
        self.ids.append(token)
        if is_end:
            self.finish_reason = "stop"
            return
        self._length = len(self.ids)
        if token not in self._unsettling_ids:
            self._settled = self._length
        if self._stop and self._stopped_at(self._spell(self._length)) is not None:
            self.finish_reason = "stop"
        elif is_last:
            self.finish_reason = "length"

    @property
    def text(self) -> str:
        """The answer so far; decoded when it is asked for, since that takes as long as the answer is."""
        return self._text(self._length)

    def take(self) -> str:
        """Text that is certain by now and was not taken before.

        Held back: a character still incomplete, a run of byte tokens, and an ending that may become a stop string.
        """
        text = self.text
        ready = len(text) if self.finish_reason else len(text) - self._uncertain()
        piece = text[self._emitted : max(ready, self._emitted)]
        self._emitted += len(piece)
        return piece

    def _uncertain(self) -> int:
        """Length of the ending that may still change."""
        text = self.text
        settled = text[: len(self._text(self._settled))].rstrip(_INCOMPLETE)
        open_stop = max((_overlap(settled, stop) for stop in self._stop), default=0)
        return len(text) - len(settled) + open_stop

    def _text(self, length: int) -> str:
        """What the first ``length`` tokens spell, up to a stop string."""
        spelt = self._spell(length)
        return spelt[: self._stopped_at(spelt)].rstrip()

    def _spell(self, length: int) -> str:
        if self._spelt[0] != length:
            self._spelt = length, self._decode(self.ids[:length]).lstrip() if length else ""
        return self._spelt[1]

    def _stopped_at(self, text: str) -> int | None:
        """Where the first stop string begins."""
        return min((end for stop in self._stop if (end := text.find(stop)) >= 0), default=None)


@torch.inference_mode()
def decode(
    backbone: Backbone,
    context: FusedContext,
    questions: Sequence[Question],
    options: DecodingOptions,
    decode_ids: Callable[[list[int]], str],
    *,
    row_of: Sequence[int] | None = None,
    seen: torch.Tensor | None = None,
    adapter: bool,
    ape: Ape | None = None,
    recorder: Recorder | None = None,
    unsettling_ids: frozenset[int] = frozenset(),
    on_logits: Callable[[torch.Tensor], None] | None = None,
    is_cancelled: Callable[[int], bool] = lambda number: False,
    limits: Sequence[int] | None = None,
) -> Generator[list[Row], None, None]:
    """Answer every question over ``context``, yielding all answers so far after each step.

    Answers that have ended take no further part, nor do rows of the context without an open one.

    Args:
        context: fused context of R rows; it is used up.
        questions: N encoded questions.
        options: one set for all.
        decode_ids: ids -> text.
        row_of: N rows of the context, which questions may share; by default one each.
        seen: (N, K) bool, the slots that each question may see; by default all of its row.
        adapter: whether the adapter takes part.
        ape: attend to the documents' slots as APE does.
        recorder: records steps, so that a device runs them as one.
        unsettling_ids: tokens after which the text so far may still be read anew.
        on_logits: called with the logits (n, V) of the n open questions at each step.
        is_cancelled: asked at each step whether a question's answer is still wanted.
        limits: most tokens of each answer; by default ``options.max_new_tokens``.

    Raises:
        UnsupportedModelError: the model's logits are no numbers.
    """
    answers = [Row(decode_ids, options.stop, unsettling_ids) for _ in questions]
    choose = _sampler(options, len(answers), backbone.device)
    table = _Table(context, list(range(len(questions))) if row_of is None else row_of, seen)
    steps = Steps(backbone, context, adapter=adapter, ape=ape, recorder=recorder)
    open_ones = list(range(len(answers)))
    tokens: list[Sequence[int]] = [question.ids for question in questions]  # that each reads next
    positions = [question.start for question in questions]
    limits = [options.max_new_tokens] * len(answers) if limits is None else limits
    longest = max(limits)
    for step in range(longest):
        asked = table.seat(
            open_ones, [tokens[i] for i in open_ones], [positions[i] for i in open_ones], columns=steps.columns
        )
        logits = steps.read(asked, still=longest - step if step else 0)  # questions are read once
        if on_logits is not None:
            on_logits(logits)
        chosen = choose(logits, open_ones)
        if _NO_TOKEN in chosen:
            raise UnsupportedModelError(
                f"{backbone.model_id!r} gives logits that are no finite numbers in {backbone.dtype}, so no token can "
                "be chosen; load it in 'float32' or 'bfloat16' (dtype)."
            )
        for i, token in zip(open_ones, chosen, strict=True):
            positions[i] += len(tokens[i])
            tokens[i] = (token,)
            answers[i].push(token, is_end=token in backbone.end_ids, is_last=step + 1 == limits[i])
            if answers[i].finish_reason is None and is_cancelled(i):
                answers[i].finish_reason = "cancelled"
        yield answers
        open_ones = [i for i in open_ones if answers[i].finish_reason is None]
        if not open_ones:
            return
        if steps.may_drop(table.rows_of(open_ones)) and (kept := table.keep(open_ones)):
            steps.drop(kept)


@torch.inference_mode()
def log_probabilities(
    backbone: Backbone,
    context: FusedContext,
    questions: Sequence[Question],
    answer: Sequence[int],
    *,
    seen: torch.Tensor | None = None,
    adapter: bool,
    ape: Ape | None = None,
) -> list[float]:
    """Natural logarithm of the probability that each of several questions over one row has this ``answer``.

    Arguments are those of :func:`decode`. One pass; logits of every answer's tokens are in memory at once.
    """
    table = _Table(context, [0] * len(questions), seen)
    read = [(*question.ids, *answer[:-1]) for question in questions]
    asked = table.seat(range(len(questions)), read, [question.start for question in questions])
    back = torch.arange(len(answer) - 1, -1, -1, device=asked.columns.device)
    columns = (asked.columns[:, None] - back).flatten()  # (N A,): where each of the answer's tokens is asked for
    logits = backbone.forward(
        asked.ids, asked.positions, asked.mask, context.cache, columns, rows=torch.zeros_like(columns),
        adapter=adapter, ape=ape,
    )  # fmt: skip
    tokens = torch.tensor([*answer] * len(questions), device=logits.device)
    chosen = logits.log_softmax(dim=-1).gather(1, tokens[:, None])  # (N A, 1)
    return chosen.view(len(questions), -1).double().sum(dim=1).tolist()


class _Table:
    """Which slot of which row belongs to which question.

    A question of its own row needs a mask of padding alone, (R, S), which every attention takes.
    """

    def __init__(self, context: FusedContext, row_of: Sequence[int], seen: torch.Tensor | None) -> None:
        self._context, self._seen = context, seen
        self._row_of = list(row_of)
        self._padding_alone = seen is None and len(set(row_of)) == len(row_of)
        rows = context.mask.shape[0]
        self._written = torch.empty(rows, 0, dtype=torch.long, device=context.mask.device)  # owners; -1 for pads

    def seat(
        self, open_ones: Sequence[int], tokens: Sequence[Sequence[int]], starts: Sequence[int], *, columns: int = 0
    ) -> Asked:
        """Put the tokens of open questions side by side into their rows, padded on the right, ``columns`` at least."""
        rows = self._context.mask.shape[0]
        ids: list[list[int]] = [[] for _ in range(rows)]
        positions: list[list[int]] = [[] for _ in range(rows)]
        owners: list[list[int]] = [[] for _ in range(rows)]
        asked_for: list[int] = []
        for i, own, start in zip(open_ones, tokens, starts, strict=True):
            row = self._row_of[i]
            ids[row] += own
            positions[row] += range(start, start + len(own))
            owners[row] += [i] * len(own)
            asked_for.append(len(ids[row]) - 1)
        longest = max(columns, *map(len, ids))
        for row in range(rows):
            missing = longest - len(ids[row])
            ids[row] += [0] * missing
            positions[row] += (positions[row][-1:] or [0]) * missing  # pads stay at a position inside the window
            owners[row] += [-1] * missing
        device = self._context.mask.device
        owner = torch.tensor(owners, device=device)
        asked = Asked(
            torch.tensor(ids, device=device),
            torch.tensor(positions, device=device),
            self._mask(owner),
            torch.tensor([self._row_of[i] for i in open_ones], device=device),
            torch.tensor(asked_for, device=device),
        )
        self._written = torch.cat([self._written, owner], dim=1)
        return asked

    def rows_of(self, open_ones: Sequence[int]) -> int:
        """How many rows have an open question."""
        return len({self._row_of[i] for i in open_ones})

    def keep(self, open_ones: Sequence[int]) -> list[int] | None:
        """Drop rows without an open question; which are left, in their new order, where that are fewer."""
        used = {self._row_of[i] for i in open_ones}
        if len(used) == self._context.mask.shape[0]:
            return None
        movable = sorted(row for row in used if row >= len(used))
        kept = [row if row in used else movable.pop() for row in range(len(used))]
        self._context.keep(kept)
        self._written = self._written[kept]
        for i in open_ones:
            self._row_of[i] = kept.index(self._row_of[i])
        return kept

    def _mask(self, owner: torch.Tensor) -> torch.Tensor:
        context = self._context.mask
        if self._padding_alone:
            return torch.cat([context, (torch.cat([self._written, owner], dim=1) >= 0).long()], dim=1)
        if self._seen is not None:  # pads see what is in their own row, so that their softmax is defined
            seen = self._seen[owner.clamp(min=0)]  # (R, Q, K)
            context = torch.where((owner >= 0)[..., None], seen, context.bool()[:, None])
        return packed_mask(context, owner, self._written)


def _sampler(
    options: DecodingOptions, answers: int, device: torch.device
) -> Callable[[torch.Tensor, Sequence[int]], list[int]]:
    """Function from logits (n, V), and which answers they are for, to the next token of each, or ``_NO_TOKEN``."""
    if options.temperature < GREEDY_BELOW:
        return lambda logits, open_ones: _likeliest(logits)
    warpers: list[LogitsProcessor] = [TemperatureLogitsWarper(float(options.temperature))]
    if options.top_k is not None:
        warpers.append(TopKLogitsWarper(options.top_k))
    if options.top_p < 1:
        warpers.append(TopPLogitsWarper(options.top_p))
    # A generator each: an answer does not depend on what is sampled beside it, nor on torch's global state.
    generators = [torch.Generator(device) for _ in range(answers)]
    for generator in generators:
        generator.seed() if options.seed is None else generator.manual_seed(options.seed)

    no_ids = cast(torch.LongTensor, torch.empty(0, dtype=torch.long))  # these warpers do not look at ids

    def sample(logits: torch.Tensor, open_ones: Sequence[int]) -> list[int]:
        for warper in warpers:
            logits = warper(no_ids, cast(torch.FloatTensor, logits))
        # The largest p / q, q from an exponential distribution, is each with probability p, as in torch.multinomial.
        draws = torch.empty_like(logits)
        for draw, i in zip(draws, open_ones, strict=True):
            draw.exponential_(generator=generators[i])
        return _likeliest(logits.softmax(dim=-1) / draws)

    return sample


def _likeliest(scores: torch.Tensor) -> list[int]:
    """The place of the largest score of each row (n, V), or ``_NO_TOKEN`` where they are no numbers."""
    largest, places = scores.max(dim=-1)
    return places.where(largest.isfinite(), _NO_TOKEN).tolist()


def _overlap(text: str, stop: str) -> int:
    """Length of the longest ending of ``text`` that begins ``stop``."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _require(holds: bool, name: str, value: object, allowed: str) -> None:
    if not holds:
        raise InvalidInputError(f"{name} is {value!r}, but it must be {allowed}.")
