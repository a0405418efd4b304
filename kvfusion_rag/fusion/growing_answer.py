"""One answer while it is decoded: its tokens, its text so far, and where it ends."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ..schema import FinishReason

_INCOMPLETE = "\ufffd"  # what a tokenizer shows for a character whose bytes have not all come


class GrowingAnswer:
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


def _overlap(text: str, stop: str) -> int:
    """Length of the longest ending of ``text`` that begins ``stop``."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
