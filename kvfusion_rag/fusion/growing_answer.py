"""One answer while it is decoded: its tokens, its reasoning and its text so far, and where it ends."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from ..schema import FinishReason
from ..text.reasoning import Reader
from .constraints import Allowed, Constraint

_INCOMPLETE = "\ufffd"  # what a character with missing bytes is decoded to
_PIECES_PER_LENGTH = 256  # a stream decodes its whole text for each piece, so pieces grow with the text


class GrowingText:
    """The text of tokens so far, up to a stop string.

    White space around the text is dropped unless ``exact``; leading white space is dropped before stop strings are
    searched.
    """

    def __init__(
        self,
        decode: Callable[[list[int]], str],
        stop: Sequence[str],
        unsettling_ids: frozenset[int] = frozenset(),
        *,
        exact: bool = False,
    ) -> None:
        self._decode = decode
        self._exact = exact
        self._stop = stop
        self._unsettling_ids = unsettling_ids
        self._emitted = 0  # characters
        self._taken = 0  # number of tokens when the last piece was taken
        self._settled = 0  # number of tokens whose text is final
        self._spelt = 0, ""  # number of tokens, and their text
        self._lead = ""
        self.ids: list[int] = []

    def begin(self, lead: str) -> None:
        """Put ``lead`` in front of the tokens' text, unless the text is exact."""
        if not self._exact:
            self._lead = lead
            self._spelt = 0, lead.lstrip()

    def add(self, tokens: Iterable[int]) -> None:
        for token in tokens:
            self.ids.append(token)
            if token not in self._unsettling_ids:
                self._settled = len(self.ids)

    @property
    def is_stopped(self) -> bool:
        """Whether the text contains a stop string."""
        return bool(self._stop) and self._stopped_at(self._spell(len(self.ids))) is not None

    @property
    def text(self) -> str:
        """The text so far. It is decoded on access, because decoding takes time proportional to the length."""
        return self._text(len(self.ids))

    def take(self, *, is_complete: bool) -> str:
        """Return the final text that has not been returned yet.

        Incomplete characters, runs of byte tokens and endings that may become a stop string are held back. Of a long
        text, several tokens become one piece.
        """
        if not is_complete and len(self.ids) - self._taken < len(self.ids) // _PIECES_PER_LENGTH:
            return ""
        self._taken = len(self.ids)
        text = self.text
        ready = len(text) if is_complete else len(text) - self._uncertain()
        piece = text[self._emitted : max(ready, self._emitted)]
        self._emitted += len(piece)
        return piece

    def _uncertain(self) -> int:
        """Return the length of the ending that may still change."""
        text = self.text
        settled = text[: len(self._text(self._settled))].rstrip(_INCOMPLETE)
        open_stop = max((_overlap(settled, stop) for stop in self._stop), default=0)
        return len(text) - len(settled[: len(settled) - open_stop].rstrip())

    def _text(self, length: int) -> str:
        """Return the text of the first ``length`` tokens, up to a stop string."""
        spelt = self._spell(length)
        text = spelt[: self._stopped_at(spelt)]
        return text if self._exact else text.rstrip()

    def _spell(self, length: int) -> str:
        if self._spelt[0] != length:
            spelt = self._decode(self.ids[:length]) if length else ""
            self._spelt = length, spelt if self._exact else (self._lead + spelt).lstrip()
        return self._spelt[1]

    def _stopped_at(self, text: str) -> int | None:
        """Return the start of the first stop string, or None."""
        return min((end for stop in self._stop if (end := text.find(stop)) >= 0), default=None)


class GrowingAnswer:
    """Tokens, reasoning and text of one answer so far, and why it ended.

    Args:
        stop: strings that end the answer. The reasoning may contain them.
        limit: maximum tokens of the answer, without its reasoning.
        reader: finds the end of the reasoning; None if there is none.
        reasoning_limit: tokens of the reasoning after which it is closed with the model's own tokens.
        constraint: format of the answer behind its reasoning; None for any text.
        exact: keep white space around the answer.

    Attributes:
        ids: all tokens, with those of the reasoning and of the marks around it.
        reasoning_tokens: number of tokens in front of the answer.
    """

    def __init__(
        self,
        decode: Callable[[list[int]], str],
        stop: Sequence[str] = (),
        unsettling_ids: frozenset[int] = frozenset(),
        *,
        limit: int,
        reader: Reader | None = None,
        reasoning_limit: int = 0,
        constraint: Constraint | None = None,
        exact: bool = False,
    ) -> None:
        self._answer = GrowingText(decode, stop, unsettling_ids, exact=exact)
        self._reasoning = GrowingText(decode, () if reader is None else reader.cut, unsettling_ids)
        self._limit, self._left = limit, reasoning_limit
        self._reader = reader  # None once the answer has begun
        self._constraint = constraint
        self._ends: frozenset[int] = frozenset()
        self._closing: list[int] = []  # tokens still to come that close the reasoning
        self.ids: list[int] = []
        self.reasoning_tokens = 0
        self.finish_reason: FinishReason | None = None
        if reader is not None:
            self._close_if_used_up(reader)

    def push(self, token: int, *, is_end: bool) -> int:
        """Add the model's token, or in its place the next one that closes the reasoning, and return the added one.

        Args:
            is_end: whether the model's token is an end token.
        """
        reader = self._reader
        if is_end and self._constraint is not None:
            is_end = token in self._constraint.end_ids
            if reader is not None and reader.stage == "reasoning" and not self._closing:
                self._closing = list(reader.closing())  # the end token ends only the reasoning
        is_closing = bool(self._closing)
        if is_closing:
            token = self._closing.pop(0)
        self.ids.append(token)
        if not is_closing and (is_end or token in self._ends):
            self._end()
        elif reader is None:
            self._add([token])
        else:
            self.reasoning_tokens += 1
            if not is_closing:
                self._read(reader, token)
            elif not self._closing:
                self._begin(reader)
        if self._reader is None and self.finish_reason is None:
            self._finish_if_full()
        return token

    @property
    def allowed(self) -> Allowed | None:
        """What the next token may be, or None for any token."""
        if self._constraint is None or self._closing:
            return None
        if self._reader is None:
            return Allowed(self._constraint)
        return Allowed(self._constraint, self._reader.opening) if self._reader.stage == "before" else None

    @property
    def text(self) -> str:
        """The answer so far, without its reasoning."""
        return self._answer.text

    @property
    def reasoning(self) -> str:
        """The reasoning so far."""
        return self._reasoning.text

    def take(self) -> str:
        """Return the final text of the answer that has not been returned yet."""
        return self._answer.take(is_complete=self.finish_reason is not None)

    def take_reasoning(self) -> str:
        """Return the final text of the reasoning that has not been returned yet."""
        return self._reasoning.take(is_complete=self._reader is None or self.finish_reason is not None)

    def _add(self, tokens: Sequence[int]) -> None:
        self._answer.add(tokens)
        if self._constraint is not None:
            for token in tokens:
                self._constraint.accept(token)

    def _read(self, reader: Reader, token: int) -> None:
        if self._constraint is not None and reader.stage == "before" and token != reader.opening:
            reader.held.append(token)  # the format allows no white space in front of reasoning
            self._begin(reader)
            return
        self._left -= reader.stage == "reasoning"  # the opening tag is not counted
        self._reasoning.add(reader.read(token))
        if reader.stage == "answer" and self._constraint is not None and not reader.lead:
            self._closing = list(reader.gap)
        if (reader.stage == "answer" and not self._closing) or len(reader.held) == self._limit:
            self._begin(reader)
        else:
            self._close_if_used_up(reader)

    def _close_if_used_up(self, reader: Reader) -> None:
        if reader.stage == "reasoning" and self._left <= 0:
            self._closing = list(reader.closing())

    def _begin(self, reader: Reader) -> None:
        """Begin the answer, with the tokens that could have been the beginning of reasoning."""
        self._reader, self._ends = None, reader.ends
        self.reasoning_tokens -= len(reader.held)
        self._answer.begin(reader.lead)
        self._add(reader.held)

    def _end(self) -> None:
        if self._reader is not None and self._reader.stage == "before":
            self._begin(self._reader)
        self.finish_reason = "stop"

    def _finish_if_full(self) -> None:
        if self._answer.is_stopped or (self._constraint is not None and self._constraint.is_complete):
            self.finish_reason = "stop"
        elif len(self._answer.ids) >= self._limit:
            self.finish_reason = "length"


def _overlap(text: str, stop: str) -> int:
    """Return the length of the longest suffix of ``text`` that is a prefix of ``stop``."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
