"""Chooses the next token of each answer from its logits, as the caller's options say."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict, cast

import torch
from transformers.generation.logits_process import (
    LogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from ..errors import InvalidInputError
from ..text.json_text import is_a, is_number, is_sequence
from ..text.settings import is_count, is_whole

GREEDY_BELOW = 1e-4  # at lower temperatures logits would overflow, and the most likely token is all but certain
NO_TOKEN = -1  # the logits are NaN or infinite


@dataclass(frozen=True, slots=True)
class DecodingOptions:
    """How tokens are chosen and when an answer ends.

    Attributes:
        max_new_tokens: limit of an answer, in tokens, without its reasoning.
        max_reasoning_tokens: limit of the reasoning in front of an answer, in tokens. Then it is closed with the
            model's own tokens, and the answer begins. None: reasoning is not told apart from the answer.
        temperature: 0 for greedy decoding, above 0 for sampling.
        top_p: keep the most likely tokens whose probabilities add up to this share.
        top_k: keep this many of the most likely tokens; None keeps all.
        stop: strings that end an answer, even inside a token. They are not part of it.
        seed: seed of each answer's random generator, below 2**63; None for a random one.
        may_shorten, may_shorten_reasoning: the limit is a default, so it is lowered if the window has less room.
    """

    max_new_tokens: int
    max_reasoning_tokens: int | None = None
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int | None = None
    stop: Sequence[str] = ()
    seed: int | None = None
    may_shorten: bool = False
    may_shorten_reasoning: bool = False

    def __post_init__(self) -> None:
        _require(is_count(self.max_new_tokens), "max_new_tokens", self.max_new_tokens, "a whole number from 1")
        reasoning, allowed = self.max_reasoning_tokens, "a whole number from 0, or None"
        _require(reasoning is None or is_whole(reasoning), "max_reasoning_tokens", reasoning, allowed)
        _require(
            is_number(self.temperature) and self.temperature >= 0, "temperature", self.temperature, "a number from 0"
        )
        _require(is_number(self.top_p) and 0 < self.top_p <= 1, "top_p", self.top_p, "above 0 and at most 1")
        _require(self.top_k is None or is_count(self.top_k), "top_k", self.top_k, "a whole number from 1, or None")
        is_list = is_sequence(self.stop) and not isinstance(self.stop, str)
        _require(is_list, "stop", self.stop, "a list of strings; put a single one into a list")
        _require(all(is_a(s, str) and s for s in self.stop), "stop", self.stop, "a list of non-empty strings")
        object.__setattr__(self, "stop", tuple(self.stop))  # the caller may change its list while answers are decoded
        is_seed = isinstance(self.seed, int) and not isinstance(self.seed, bool) and 0 <= self.seed < 1 << 63
        _require(self.seed is None or is_seed, "seed", self.seed, "a whole number from 0 to 2**63 - 1, or None")


class DecodingKwargs(TypedDict, total=False):
    """Options of one call; :class:`DecodingOptions` describes them."""

    max_new_tokens: int | None
    max_reasoning_tokens: int | None
    temperature: float
    top_p: float
    top_k: int | None
    stop: Sequence[str]
    seed: int | None


def decoding_options(given: Mapping[str, Any], *, max_new_tokens: int, max_reasoning_tokens: int) -> DecodingOptions:
    """Return the caller's options (``DecodingKwargs``) with defaults for the others.

    Raises:
        InvalidInputError: a value is not allowed.
    """
    defaults = {"max_new_tokens": max_new_tokens, "max_reasoning_tokens": max_reasoning_tokens}
    limits: dict[str, Any] = {name: given.get(name) for name in defaults}
    limits = {name: defaults[name] if limit is None else limit for name, limit in limits.items()}
    values: dict[str, Any] = {**given, **limits, "stop": given.get("stop") or ()}
    return DecodingOptions(
        **values,
        may_shorten=given.get("max_new_tokens") is None,
        may_shorten_reasoning=given.get("max_reasoning_tokens") is None,
    )


def sampler(
    options: DecodingOptions, answers: int, device: torch.device
) -> Callable[[torch.Tensor, Sequence[int]], list[int]]:
    """Return a function from logits (n, V) and the n answers they belong to, to the next tokens (or ``NO_TOKEN``)."""
    if options.temperature < GREEDY_BELOW:
        return lambda logits, open_ones: _likeliest(logits)
    warpers: list[LogitsProcessor] = [TemperatureLogitsWarper(float(options.temperature))]
    if options.top_k is not None:
        warpers.append(TopKLogitsWarper(options.top_k))
    if options.top_p < 1:
        warpers.append(TopPLogitsWarper(options.top_p))
    # One generator per answer: it does not depend on the other answers or on torch's global state.
    generators = [torch.Generator(device) for _ in range(answers)]
    for generator in generators:
        generator.seed() if options.seed is None else generator.manual_seed(options.seed)

    no_ids = cast(torch.LongTensor, torch.empty(0, dtype=torch.long))  # these warpers ignore ids

    def sample(logits: torch.Tensor, open_ones: Sequence[int]) -> list[int]:
        for warper in warpers:
            logits = warper(no_ids, cast(torch.FloatTensor, logits))
        # With q from an exponential distribution, each token has the largest p / q with probability p, as in
        # torch.multinomial.
        draws = torch.empty_like(logits)
        for draw, i in zip(draws, open_ones, strict=True):
            draw.exponential_(generator=generators[i])
        return _likeliest(logits.softmax(dim=-1) / draws)

    return sample


def _likeliest(scores: torch.Tensor) -> list[int]:
    """Return the index of the largest score of each row (n, V), or ``NO_TOKEN`` if scores are NaN or infinite."""
    largest, places = scores.max(dim=-1)
    return to_list(places.where(largest.isfinite(), NO_TOKEN))


def to_list(numbers: torch.Tensor) -> list[Any]:
    """Return a tensor's numbers. torch declares no type for them."""
    return cast(Any, numbers).tolist()


def _require(holds: bool, name: str, value: object, allowed: str) -> None:
    if not holds:
        raise InvalidInputError(f"{name} is {value!r}, but it must be {allowed}.")
