"""Limits the tokens of an answer to those that keep it in its format. Needs the extra ``structured``."""

from __future__ import annotations

import json
import re
import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..errors import InvalidInputError, MissingDependencyError
from ..text.answer_format import AnswerFormat, FormatKind, with_fixed_space
from ..text.encoder import with_hidden_controls

CACHED = 64  # compiled formats of one tokenizer
_NAMES: dict[FormatKind, str] = {
    "json_schema": "the JSON schema", "regex": "the regular expression", "choices": "the list of choices",
    "grammar": "the list of tools",
}  # fmt: skip
_WORD_BITS = 32


class Constraint:
    """The tokens that keep one answer in its format, given those before.

    Args:
        matcher: llguidance's state.
        end_ids: tokens that end the answer. A model's other end tokens are ordinary text.
    """

    def __init__(self, format: AnswerFormat, matcher: Any, end_ids: frozenset[int]) -> None:
        self.format = format
        self._matcher = matcher
        self.end_ids = end_ids

    def copy(self) -> Constraint:
        """Return the same state for another answer."""
        return Constraint(self.format, self._matcher.deep_copy(), self.end_ids)

    def accept(self, token: int) -> None:
        """Add the next token.

        Raises:
            InvalidInputError: the format needs too much time or memory at this point of the answer.
        """
        if not self._matcher.consume_token(token):
            self._raise()

    def fill(self, mask: torch.Tensor) -> None:
        """Set the bits of the allowed next tokens in ``mask``, a contiguous row of int32 on the CPU."""
        self._matcher.unsafe_compute_mask_ptr(mask.data_ptr(), mask.numel() * mask.element_size())
        if self._matcher.is_error():
            self._raise()

    @property
    def is_complete(self) -> bool:
        """Whether the answer matches and cannot be longer."""
        return self._matcher.is_stopped()

    def _raise(self) -> None:
        raise InvalidInputError(
            f"the format of the answer cannot be followed further: {_reason(self._matcher.get_error())}; simplify it."
        )


@dataclass(frozen=True, slots=True)
class Allowed:
    """What the next token of an answer may be.

    Attributes:
        also: a token besides those of the constraint.
    """

    constraint: Constraint
    also: int | None = None


class ConstraintCompiler:
    """Compiles formats for one tokenizer, and keeps the last ones. Safe from several threads.

    Args:
        vocabulary_size: number of logits.
        end_ids: tokens that end an answer.
    """

    def __init__(self, tokenizer: Any, vocabulary_size: int, end_ids: frozenset[int]) -> None:
        # A configuration may name an ordinary token, and then a text with that token could not be written.
        self._end_ids = end_ids & tokenizer.added_tokens_decoder.keys() or end_ids
        self._arguments = tokenizer, vocabulary_size, sorted(self._end_ids)
        self._lock = threading.Lock()
        self._tokenizer: Any = None  # made at the first use, which takes up to a second
        self._compiled: OrderedDict[AnswerFormat, Constraint] = OrderedDict()

    def compile(self, format: AnswerFormat) -> Constraint:
        """Return the constraint of ``format`` in front of the first token.

        Raises:
            InvalidInputError: the format contains something unsupported, or the tokenizer cannot be constrained.
            MissingDependencyError: llguidance is not installed.
        """
        with self._lock:
            if (found := self._compiled.get(format)) is None:
                if self._tokenizer is None:
                    self._tokenizer = _tokenizer(*self._arguments)
                found = self._compiled[format] = Constraint(format, _matcher(self._tokenizer, format), self._end_ids)
            self._compiled.move_to_end(format)
            if len(self._compiled) > CACHED:
                self._compiled.popitem(last=False)
            return found


def constrained(logits: torch.Tensor, allowed: Sequence[Allowed | None]) -> torch.Tensor:
    """Return logits (n, V) in which tokens that an answer may not continue with are -inf.

    Rows without a limit keep their bits.
    """
    if not any(allowed):
        return logits
    rows, vocabulary = logits.shape
    mask = torch.full((rows, -(-vocabulary // _WORD_BITS)), -1, dtype=torch.int32)
    for row, one in zip(mask, allowed, strict=True):
        if one is not None:
            one.constraint.fill(row)
            if one.also is not None:
                word, bit = divmod(one.also, _WORD_BITS)
                row[word] |= torch.tensor(1, dtype=torch.int32) << bit
    bits = torch.arange(_WORD_BITS, dtype=torch.int32, device=logits.device)
    is_allowed = ((mask.to(logits.device)[..., None] >> bits) & 1).flatten(1)[:, :vocabulary]
    return logits.masked_fill(is_allowed == 0, -torch.inf)


def _tokenizer(tokenizer: Any, vocabulary_size: int, end_ids: list[int]) -> Any:
    try:
        from llguidance import LLTokenizer
    except ImportError as error:
        raise MissingDependencyError.of_extra("response_format or tools", "llguidance", "structured") from error
    try:
        # Texts that a format forces are tokenized, and must not become control tokens.
        return LLTokenizer(with_hidden_controls(tokenizer), n_vocab=vocabulary_size, eos_token=end_ids or None)
    except ValueError as error:
        raise InvalidInputError(
            f"answers of this model cannot be limited to a format, because its tokenizer is of an unsupported kind: "
            f"{_reason(str(error))}."
        ) from error


def _matcher(tokenizer: Any, format: AnswerFormat) -> Any:
    from llguidance import LLMatcher, LLParserLimits

    matcher = LLMatcher(tokenizer, _grammar(format), log_level=0, limits=LLParserLimits(verbose_errors=False))
    if matcher.is_error():
        reason = _reason(matcher.get_error())
        raise InvalidInputError(f"{_NAMES[format.kind]} cannot be used for an answer: {reason}; simplify it.")
    return matcher


def _grammar(format: AnswerFormat) -> str:
    from llguidance import LLMatcher

    if format.kind == "json_schema":
        return LLMatcher.grammar_from_json_schema(with_fixed_space(format.text))
    if format.kind == "regex":
        return LLMatcher.grammar_from_regex(format.text)
    if format.kind == "choices":
        texts = " | ".join(json.dumps(choice, ensure_ascii=False) for choice in json.loads(format.text))
        return LLMatcher.grammar_from_lark(f"start: {texts}")
    return LLMatcher.grammar_from_lark(format.text)


def _reason(message: str) -> str:
    """Return the first lines of an error of llguidance as one line. The rest shows its state."""
    return " ".join(re.split("<state>|<non-verbose/>", message)[0].split())[:300].rstrip(".")
